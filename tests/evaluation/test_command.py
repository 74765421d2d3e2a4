"""evaluate.py: what it measures, on which images, and how it reports mistakes."""
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import data
import decoder
import evaluate
from config import RECIPES
from evaluation import labels, run_data, vqa
from evaluation.questions import KINDS
from inputs import opening, scene_captions, scenes
from objectives import aimv2
from objectives.registry import model_spec
from runtime import checkpoint, devices, validation
from runtime.errors import ConfigError, DataError
from tests.evaluation.conftest import scene_vocabulary
from tests.helpers.compiling import several_devices
from tests.helpers.paths import ROOT
from train import openvision2_loss


def write_images(folder, count: int, caption: str = "", **fields) -> None:
    """count images with a caption and fields, in which {} is the number."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (20, 20), (4 * i, 0, 90)).save(folder / f"{i}.png")
        about = {"caption": f"big red {('circle', 'star')[i % 2]}{caption.format(i)}"}
        about |= {name: text.format(i) for name, text in fields.items()}
        (folder / f"{i}.json").write_text(json.dumps(about))


def test_one_command_measures_and_draws(run, tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert evaluate.main([str(run), "caption", "knn", "zeroshot", "images", "--num-samples", "8",
                          "--classnames", "all", "--out", str(tmp_path), "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert set(figures) == {"caption", "knn", "zeroshot", "images"}
    assert figures["zeroshot"]["names"] == 8
    assert set(figures["knn"]["neighbors"]) == set(labels.SCENE_LABELS)
    assert "% right" in capsys.readouterr().out
    for name in ("pca.png", "attention.png", "words.png"):
        assert min(Image.open(tmp_path / name).size) > 100


def test_vqa_measures_what_it_compares(run, tmp_path, capsys, monkeypatch):
    """Encoder, random encoder, raw pixels and no image, each by kind of question."""
    monkeypatch.setattr(vqa, "NUM_TRAIN", 60)
    monkeypatch.setattr(vqa, "NUM_VAL", 40)
    monkeypatch.setitem(decoder.DECODER_SIZES, "micro", (1, 48, 2, 96))
    path = tmp_path / "figures.json"
    assert evaluate.main([str(run / "encoder.npz"), "vqa", "--steps", "2",
                          "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["vqa"]
    assert set(rows) == {"encoder", "random encoder", "raw pixels", "without the image"}
    for shares in rows.values():
        assert tuple(shares) == (*KINDS, "all")
        assert all(0 <= share <= 1 for share in shares.values())
    assert capsys.readouterr().out.count("\n") == 5


def test_other_validation_images_and_one_checkpoint(run, tmp_path, capsys):
    write_images(tmp_path / "files", 6, name="thing {}")
    files = str(tmp_path / "files")
    argv = [str(run / "step-00000002.npz"), "--val", files, "--caption-field", "caption"]
    assert evaluate.main(argv) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {"val_loss", "val_loss_shuffled", "val_loss_blind"}
    assert figures["val_loss_blind"] == figures["val_loss_shuffled"]
    assert evaluate.main([*argv, "zeroshot"]) == 0
    assert json.loads(capsys.readouterr().out)["zeroshot"]["names"] == 2
    path = tmp_path / "figures"
    assert evaluate.main([str(run / "encoder.npz"), "knn", "--data", files, "--val", files,
                          "--label-fields", "caption,name", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["knn"]
    assert {"neighbors", "grid neighbors", "whitened", "random whitened"} < set(rows)
    assert rows["pixels nearest"] == {"caption": 1, "name": 1}
    assert rows["commonest"]["name"] == 1 / 6


def test_no_count_brings_in_training_images(run, tmp_path, monkeypatch):
    """Of 60 images the run has split off 6. Measures use these, and probes train on the others."""
    write_images(tmp_path, 60, caption=" {}")
    cfg = dataclasses.replace(RECIPES["toy"], encoder="micro/8", data=str(tmp_path),
                              caption_field="caption", val_samples=6)
    val_source = opening.open_validation_data(cfg)
    val_names = {val_source.name(i) for i in range(6)}
    assert len(val_names) == 6
    for count in (3, 6, 2000):
        sized = run_data.override_config(cfg, {}, count)
        train, test = labels.open_labeled_images(sized, ("caption",), count)
        assert len(test) == min(count, 6) and len(train) == min(54, 4 * count)
        assert {test.source.name(i) for i in test.indices} <= val_names
        assert not {train.source.name(i) for i in train.indices} & val_names
    for changes in ({"data": "elsewhere", "val": ""}, {"val": "elsewhere"}):
        assert run_data.override_config(cfg, changes, 3).val_samples == 3

    arrays, meta = checkpoint.load(str(run / "step-00000002.npz"))
    settings = {name: getattr(cfg, name) for name in ("data", "caption_field", "val_samples")}
    meta = meta | {"config": meta["config"] | settings,
                   "data": {"validation data": val_source.fingerprint()}}
    path = str(tmp_path / "step-00000002.npz")
    checkpoint.save(path, arrays, meta)
    measured, losses = [], validation.ValidationSet.losses

    def record(self, params):
        for i in self.samples[:self.count].tolist():
            measured.append((self.count, self.loader.source.name(i) in val_names))
        return losses(self, params)
    monkeypatch.setattr(validation.ValidationSet, "losses", record)
    assert evaluate.main([path, "--num-samples", "3"]) == 0 and measured == [(3, True)] * 3


def test_a_field_that_other_images_have_cannot_find_the_validation_images(tmp_path):
    """Of 60 captioned images one has no json, so that labels from there would redraw the split."""
    write_images(tmp_path, 60, kind="{}")
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text("a circle")
    cfg = dataclasses.replace(RECIPES["toy"], data=str(tmp_path), caption_field="txt")
    by_label = dataclasses.replace(cfg, caption_field="caption")
    run_data.check_split(cfg, by_label)
    (tmp_path / "30.json").unlink()
    with pytest.raises(ConfigError, match="name validation images with --val"):
        run_data.check_split(cfg, by_label)
    with pytest.raises(ConfigError, match="that have kind are not those that have txt"):
        labels.open_labeled_images(cfg, ("kind",), 6, run_cfg=cfg)
    other = dataclasses.replace(by_label, val=str(tmp_path))
    run_data.check_split(cfg, other)
    run_data.check_split(dataclasses.replace(cfg, data="elsewhere"), by_label)


def test_labels_that_are_numbers_are_refused_as_labels(tmp_path):
    write_images(tmp_path, 30)
    for path in tmp_path.glob("*.json"):
        path.write_text('{"caption": "a circle", "kind": 3}')
    cfg = dataclasses.replace(RECIPES["toy"], data=str(tmp_path), caption_field="caption")
    for names in (("kind",), ("caption", "kind")):
        with pytest.raises(DataError, match='a label must be text, as in "3", and is: 3'):
            labels.open_labeled_images(cfg, names, 6)


def test_mistakes_get_one_line(run, tmp_path, capsys):
    damaged, empty, only_encoder = tmp_path / "damaged", tmp_path / "empty", run / "encoder.npz"
    damaged.mkdir()
    empty.mkdir()
    contents = (run / "step-00000002.npz").read_bytes()
    (damaged / "step-00000002.npz").write_bytes(contents[:5000])
    (tmp_path / "cut.npz").write_bytes(only_encoder.read_bytes()[:9000])
    arrays, meta = checkpoint.load(str(run / "step-00000002.npz"))
    other = tmp_path / "step-00000003.npz"
    checkpoint.save(str(other), arrays, meta | {"config": meta["config"] | {"encoder": "Ti/8"}})
    foreign, torch_file = tmp_path / "foreign.npz", tmp_path / "model.bin"
    foreign.write_bytes(b"PK another format")
    torch_file.write_bytes(b"another format")
    one_class = tmp_path / "names"
    one_class.write_text("one\n")
    for argv, message in (
            ([damaged], "is damaged"), ([other], "does not fit this model"),
            ([other, "knn"], "does not fit this model"),
            ([foreign, "knn"], "damaged or no checkpoint"), ([torch_file, "knn"], "model.bin"),
            ([tmp_path / "none"], "none"), ([empty], "no checkpoint"),
            ([only_encoder], "holds only an encoder"),
            ([only_encoder, "zeroshot", "--num-samples", "4"], "holds only an encoder"),
            ([tmp_path / "cut.npz", "vqa"], "cut.npz"),
            ([tmp_path / "none.npz", "vqa"], "none.npz"),
            ([run, "knn", "--label-fields", "age"], "scenes have"),
            ([run, "zeroshot", "--classnames", one_class], "nothing to tell apart"),
            ([run, "zeroshot", "--classnames", tmp_path / "no"], "No such file"),
            ([run, "knn", "--resolution", "4"], "patch size"),
            ([run, "--data", tmp_path / "none"], "is no data")):
        assert evaluate.main([str(word) for word in argv]) == 1, argv
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1, (argv, err)
    assert os.listdir(damaged) == ["step-00000002.npz"]


@pytest.mark.parametrize("argv, message", [
    (["taste"], "unknown measure 'taste'"), (["pictures"], "pictures is now images"),
    (["--count", "4"], "--count is now --num-samples"),
    (["--names=x"], "--names is now --classnames"),
    (["--num-samples", "-1"], "2 or more"), (["vqa", "--steps", "0"], "--steps"),
    (["zeroshot", "--template", "x"], "needs {}")])
def test_a_wrong_command_line_says_what_to_change(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(["run", *argv])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_evaluation_uses_as_many_devices_as_divide_its_batch(cache, run, capsys):
    """Training needs a batch that all devices share. Evaluation uses fewer: 2 of 6 for 8 images."""
    assert evaluate.main([str(run)]) == 0
    expected = json.loads(capsys.readouterr().out)
    code = """
import evaluate, sys
from evaluation import captioning
create = captioning.DataParallel
def report(count):
    print("devices", count)
    return create(count)
captioning.DataParallel = report
sys.exit(evaluate.main(sys.argv[1:]))
"""
    ended = subprocess.run([sys.executable, "-c", code, str(run)], env=several_devices(6, cache),
                           capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    first, _, rest = ended.stdout.partition("\n")
    assert first == "devices 2"
    assert json.loads(rest) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective, reads", [("openvision2", False), ("clip", False),
                                              ("cappa", False), ("aimv2", True)])
def test_only_a_loss_on_pixels_reads_them_for_its_blind_loss(objective, reads):
    cfg = dataclasses.replace(RECIPES["toy"], encoder="micro/8", objective=objective,
                              val_samples=8, max_text_len=80, vocab_size=150)
    source, tok = opening.open_validation_data(cfg), scene_vocabulary(cfg.vocab_size)
    loader = data.Loader(source, tok, cfg.max_text_len, cfg.seed, None, 1)
    val_set = validation.ValidationSet(cfg, loader, 16, 4, model_spec(cfg),
                                       devices.DataParallel(1), openvision2_loss)
    images = np.concatenate([batch["images"] for batch, _ in val_set.batches])
    blind_loss = val_set.blind_loss()
    assert blind_loss > 0
    if reads:
        targets = np.asarray(aimv2.pixel_targets(images, 8))
        num_tokens = np.array([(row[1:] != 0).sum() for row in val_set.texts["text"]])
        records = [scenes.sample_scene(0, "val", i) for i in range(8)]
        nats = np.array([scene_captions.caption_nats(record) for record in records])
        by_patch = np.var(targets, axis=0).mean(-1)
        by_prefix = [by_patch[length:].mean() for length in range(1, len(by_patch))]
        pixels = aimv2.PIXEL_WEIGHT * np.mean(by_prefix)  # each length is as likely
        assert blind_loss == pytest.approx((nats / num_tokens).mean() + pixels, rel=1e-5)
    else:
        for batch, _ in val_set.batches:
            del batch["images"]
        assert val_set.blind_loss() == blind_loss


def test_search_reads_the_data_that_its_flags_name(run, tmp_path, capsys):
    write_images(tmp_path / "files", 14)
    path = tmp_path / "new" / "folder"
    argv = [str(run), "search", "a red circle", "--val", str(tmp_path / "files"), "--json",
            str(tmp_path / "figures"), "--out", str(path)]
    assert evaluate.main(argv) == 0
    nearest = json.loads((tmp_path / "figures").read_text())["search"]["nearest"]
    assert all(name.startswith(str(tmp_path / "files")) for name in nearest)
    assert (path / "search.png").exists()


def test_weights_of_captions_are_no_part_of_a_label(run, tmp_path, capsys):
    write_images(tmp_path / "files", 6, dense="a big red circle, number {}")
    argv = [str(run), "zeroshot", "--val", str(tmp_path / "files"), "--caption-field",
            "caption:1,dense:3"]
    assert evaluate.main(argv) == 0
    assert json.loads(capsys.readouterr().out)["zeroshot"]["names"] == 2


def test_a_place_for_figures_that_cannot_be_written_is_refused_at_once(run, tmp_path, capsys,
                                                                        monkeypatch):
    monkeypatch.setattr(evaluate, "EvalContext", None)  # nothing is measured before
    assert evaluate.main([str(run), "knn", "--json", str(tmp_path / "none" / "figures")]) == 1
    assert "its folder does not exist" in capsys.readouterr().err
