"""The emoji in one command: from packages to shards that inputs/sources.py reads, to a run; and a sentence where npm or the network is missing."""
import json
import os
import re
import stat

import numpy as np
import pytest
from PIL import Image, ImageDraw

from inputs import emoji, sources

INKS = ("red", "green", "blue", "black")


@pytest.fixture
def packages(tmp_path):
    """A node_modules as npm would leave it: thirteen emoji, of which one vendor lacks the last, and one comes in five skin tones."""
    listed = []
    for n in range(13):
        drawn = {f"has_img_{v}": n < 12 or v == "google" for v in emoji.VENDORS}
        listed.append({"name": f"{INKS[n % 4].upper()} BALL", "unified": f"1F4{n:02d}", "image": f"1f4{n:02d}.png", "short_name": f"ball_{INKS[n % 4]}",
                       "short_names": [f"ball_{INKS[n % 4]}"], "category": "Activities", "subcategory": "ball-sport", **drawn})
    listed[0]["skin_variations"] = {t: {"unified": f"1F400-{t}", "image": f"1f400-{t.lower()}.png", "has_img_google": True,
                                         "has_img_twitter": True} for t in emoji.SKIN_TONES}
    listed[1] |= {"name": "Bolivia Flag", "short_name": "flag-bo", "short_names": ["flag-bo"], "category": "Flags", "subcategory": "country-flag"}
    for vendor in emoji.VENDORS:
        base = tmp_path / "node_modules" / f"emoji-datasource-{vendor}"
        (base / "img" / vendor / "64").mkdir(parents=True)
        (base / "emoji.json").write_text(json.dumps(listed))
        for n, entry in enumerate(listed):
            for one in [entry, *entry.get("skin_variations", {}).values()]:
                image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
                ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill=INKS[n % 4])
                image.save(base / "img" / vendor / "64" / one["image"])
    return str(tmp_path / "node_modules")


def fake_npm(folder, script):
    """A folder for PATH, with an npm that does what the script says."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(stat.S_IRWXU)
    return f"{folder}:/usr/bin:/bin"


def test_packed_shards_are_read_back(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji, "SHARD", 5)
    assert emoji.main(["--pack-only", "--packages", packages, "--data", str(tmp_path / "emoji")]) == 0
    assert "google: 14 captioned pictures" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "emoji" / "google")) == [f"0000{n}{end}" for n in range(3) for end in (".tar", "_stats.json")]
    found = {v: {f: sources.open_source(str(tmp_path / "emoji" / v / "*.tar"), f) for f in ("txt", "caption", "re_caption", "unified")} for v in emoji.VENDORS}
    assert [len(found[v]["txt"]) for v in emoji.VENDORS] == [14, 13] and not any(s.skipped for one in found.values() for s in one.values())
    google = {name: [s.caption(i) for i in range(len(s))] for name, s in found["google"].items()}
    assert google["txt"] == google["caption"] and google["txt"][0] == "ball red"
    assert google["txt"][1] in [f"ball red with {tone} skin" for tone in emoji.SKIN_TONES.values()] and google["txt"][2] == "bolivia flag"
    for i, (name, dense) in enumerate(zip(google["txt"], google["re_caption"])):
        ink = INKS[max(0, i - 1) % 4]
        assert name in dense and f"mostly {ink}" in dense and dense != name
        assert "ball sport" in dense or i == 2
        assert np.asarray(found["google"]["txt"].image(i).convert("RGBA"))[32, 32].tolist() == [*Image.new("RGB", (1, 1), ink).getpixel((0, 0)), 255]
    assert google["re_caption"][:13] == [found["twitter"]["re_caption"].caption(i) for i in range(13)]  # the same drawings: the same words
    assert len({c.replace(n, "") for c, n in zip(google["re_caption"], google["txt"])}) > 3
    before = os.stat(tmp_path / "emoji" / "google" / "00000.tar").st_mtime_ns
    assert emoji.main(["--pack-only", "--packages", "absent", "--data", str(tmp_path / "emoji")]) == 0
    assert os.stat(tmp_path / "emoji" / "google" / "00000.tar").st_mtime_ns == before


@pytest.mark.parametrize("script, says", [
    (None, "npm, which fetches the pictures, is not installed"),
    ("echo 'npm warn old' >&2; echo 'npm error code ENOTFOUND' >&2; exit 1",
     r"npm could not fetch emoji-datasource-google@.* \(npm error code ENOTFOUND\).*needs the network"),
    ("exit 3", "npm could not fetch .*ended with status 3"),
    ("exit 0", "emoji-datasource-google is not the npm package"),  # a proxy that answers, and gives nothing
])
def test_without_npm_or_network_one_sentence(script, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", fake_npm(tmp_path / "bin", script) if script else str(tmp_path / "nothing"))
    assert emoji.main(["--data", str(tmp_path / "emoji")]) == 1
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and re.search(says, said.err) and not said.out
    assert os.listdir(tmp_path / "emoji") == []


def test_from_npm_to_a_trained_run(packages, tmp_path, monkeypatch, capsys):
    """Twelve pictures, two steps: the run is on one vendor, its figures on the other."""
    script = f'for a; do case $last in --prefix-attention) cp -r {packages} "$a/";; esac; last=$a; done'
    monkeypatch.setenv("PATH", fake_npm(tmp_path / "bin", script))
    monkeypatch.chdir(tmp_path)
    assert emoji.main(["--stages", "resolution=16 steps=2 batch=4 lr=1e-3", "--val-samples", "8"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert "8 drawings of twitter" in said and os.path.join("runs", "emoji", "samples.png") in said
    settings = json.load(open("runs/emoji/config.json"))
    assert settings["data"] == "emoji/google/*.tar" and settings["val"] == "emoji/twitter/*.tar" and settings["caption_field"] == "re_caption"
    assert os.path.exists("runs/emoji/samples.png") and sorted(os.listdir("emoji")) == ["google", "packed.json", "twitter"]
