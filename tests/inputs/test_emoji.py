"""Emoji: from npm packages to tars that inputs/sources.py reads, and to a run."""
import json
import os
import re
import stat

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

import train
from inputs import emoji, sources
from runtime.errors import run_command

INKS = ("red", "green", "blue", "black")
FLAG = {"name": "Bolivia Flag", "short_name": "flag-bo", "short_names": ["flag-bo"],
        "category": "Flags", "subcategory": "country-flag"}


def entry(n):
    """Emoji n of 13, as a package lists it. One vendor lacks the last."""
    ink = INKS[n % 4]
    return {"name": f"{ink.upper()} BALL", "unified": f"1F4{n:02d}", "image": f"1f4{n:02d}.png",
            "short_name": f"ball_{ink}", "short_names": [f"ball_{ink}"], "category": "Activities",
            "subcategory": "ball-sport", "has_img_google": True, "has_img_twitter": n < 12}


def tone_entry(tone):
    return {"unified": f"1F400-{tone}", "image": f"1f400-{tone.lower()}.png",
            "has_img_google": True, "has_img_twitter": True}


@pytest.fixture
def packages(tmp_path):
    """A node_modules as npm leaves it. The first emoji comes in five skin tones."""
    listed = [entry(n) for n in range(13)]
    listed[0]["skin_variations"] = {tone: tone_entry(tone) for tone in emoji.SKIN_TONES}
    listed[1] |= FLAG
    for vendor in emoji.VENDORS:
        base = tmp_path / "node_modules" / f"emoji-datasource-{vendor}"
        images = base / "img" / vendor / "64"
        images.mkdir(parents=True)
        (base / "emoji.json").write_text(json.dumps(listed))
        for n, fields in enumerate(listed):
            image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
            ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill=INKS[n % 4])
            for drawn in (fields, *fields.get("skin_variations", {}).values()):
                image.save(images / drawn["image"])
    return str(tmp_path / "node_modules")


def fake_npm(folder, script):
    """A PATH with an npm that runs the script."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(stat.S_IRWXU)
    return f"{folder}:/usr/bin:/bin"


def read_captions(folder, vendor, field):
    source = sources.open_source(os.path.join(folder, vendor, "*.tar"), field)
    assert not source.skipped
    return [source.caption(i) for i in range(len(source))]


def test_packed_tars_are_read_back(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji, "SHARD_SAMPLES", 5)
    folder = str(tmp_path / "emoji")
    assert emoji.main(["--packages", packages, "--data", folder]) == 0
    assert "google: 14 captioned images" in capsys.readouterr().out
    files = [f"0000{n}{end}" for n in range(3) for end in (".tar", "_stats.json")]
    assert sorted(os.listdir(tmp_path / "emoji" / "google")) == files
    assert len(read_captions(folder, "twitter", "unified")) == 13

    names = read_captions(folder, "google", "txt")
    dense = read_captions(folder, "google", "re_caption")
    tones = [f"ball red with {tone} skin" for tone in emoji.SKIN_TONES.values()]
    assert len(names) == 14 and names == read_captions(folder, "google", "caption")
    assert names[0] == "ball red" and names[1] in tones and names[2] == "bolivia flag"
    source = sources.open_source(os.path.join(folder, "google", "*.tar"))
    for i, (name, text) in enumerate(zip(names, dense)):
        ink = INKS[max(0, i - 1) % 4]
        assert name in text and f"mostly {ink}" in text and text != name
        assert "ball sport" in text or i == 2
        center = np.asarray(source.image(i).convert("RGBA"))[32, 32].tolist()
        assert center == [*ImageColor.getrgb(ink), 255]
    assert dense[:13] == read_captions(folder, "twitter", "re_caption")  # the same wordings
    assert len({text.replace(name, "") for text, name in zip(dense, names)}) > 3


def test_packed_tars_are_kept(packages, tmp_path):
    folder = str(tmp_path / "emoji")
    assert emoji.main(["--packages", packages, "--data", folder]) == 0
    written = os.stat(os.path.join(folder, "google", "00000.tar")).st_mtime_ns
    assert emoji.main(["--packages", "absent", "--data", folder]) == 0
    assert os.stat(os.path.join(folder, "google", "00000.tar")).st_mtime_ns == written


@pytest.mark.parametrize("script, message", [
    (None, "npm, which downloads the images, is not installed"),
    ("echo 'npm warn old' >&2; echo 'npm error code ENOTFOUND' >&2; exit 1",
     r"npm could not download emoji-.*@.* \(npm error code ENOTFOUND\).*needs the network"),
    ("exit 3", "npm could not download .*ended with status 3"),
    # a proxy that answers, and gives nothing
    ("exit 0", "emoji-datasource-google is not the npm package"),
])
def test_without_npm_or_network_there_is_one_message(script, message, tmp_path, monkeypatch,
                                                     capsys):
    path = fake_npm(tmp_path / "bin", script) if script else str(tmp_path / "nothing")
    monkeypatch.setenv("PATH", path)
    assert run_command(emoji.main, ["--data", str(tmp_path / "emoji")]) == 1
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and not printed.out
    assert re.search(message, printed.err)
    assert os.listdir(tmp_path / "emoji") == []


def test_from_npm_to_a_trained_run(packages, tmp_path, monkeypatch):
    """Two steps: trained on one vendor, validated on the other."""
    script = f'for a; do case $last in --prefix) cp -r {packages} "$a/";; esac; last=$a; done'
    monkeypatch.setenv("PATH", fake_npm(tmp_path / "bin", script))
    monkeypatch.chdir(tmp_path)
    assert emoji.main([]) == 0
    assert sorted(os.listdir("emoji")) == ["google", "packed.json", "twitter"]
    stages = "resolution=16 steps=2 batch=4 lr=1e-3"
    assert train.main(["emoji", "--stages", stages, "--val-samples", "8"]) == 0
    with open("runs/emoji/config.json", encoding="utf-8") as f:
        settings = json.load(f)
    assert settings["data"] == "emoji/google/*.tar" and settings["val"] == "emoji/twitter/*.tar"
    assert settings["caption_field"] == "re_caption"
    assert os.path.exists("runs/emoji/samples.png")
