"""What is read from frozen features, said without a classifier, and drawn: against planted answers and independent formulas."""
import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import bench
import caption
import data
import decoder
import evaluate
import train
import vit
from benchmarks import ablations
from config import RECIPES, Config
from evaluation import captioning, labels, probe, visualize, vqa, zeroshot
from inputs import scene_captions, scenes, tokenizer
from interop.encoder import Encoder
from objectives import aimv2
from objectives.registry import init_params, model_spec
from runtime import checkpoint, devices, run_folder, validation
from runtime.errors import DataError

SIZES = (3, 2)
CFG = vit.ViTConfig(2, 32, 2, 64, 8)


def planted(n: int, width: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features and two tasks that a line tells: (n,D), (n,2)."""
    x = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    return x, np.stack([x[:, :3].argmax(1), (x[:, 3] > 0).astype(int)], 1).astype(np.int32)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(vit.init(jax.random.key(0), CFG), CFG, 16)


@pytest.fixture(scope="module")
def captioner():
    texts = [scene_captions.caption(scenes.sample_scene(0, "train", i)) for i in range(60)]
    tok = tokenizer.train_vocab(texts, 150)
    cfg = decoder.DecoderConfig(2, 32, 2, 64, 150, CFG.width)
    params = {"encoder": vit.init(jax.random.key(0), CFG), "decoder": decoder.init(jax.random.key(1), cfg)}
    return caption.Captioner(params, CFG, cfg, tok, Config(max_text_len=40, keep_ratio=0.5), 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder as it would be without any training: what is measured matters elsewhere."""
    folder = str(tmp_path_factory.mktemp("run"))
    cfg = dataclasses.replace(RECIPES["toy"], stages="resolution=16 steps=2 batch=8 lr=1e-3", val_samples=8, max_text_len=40, vocab_size=150, workdir=folder)
    words = tokenizer.train_vocab((scene_captions.caption(scenes.sample_scene(0, "train", i)) for i in range(60)), cfg.vocab_size)
    networks = model_spec(cfg)
    params = init_params(cfg, networks)
    checkpoint.save_step(folder, 2, {"params": params}, {"config": dataclasses.asdict(cfg), "data": {"held-out data": "scenes"}, "best_shuffled": 5.0,
                                                         "vocabulary": words.state})
    checkpoint.save(os.path.join(folder, "encoder.npz"), params["encoder"], {"encoder": dataclasses.asdict(networks.encoder), "resolution": 16,
                                                                            "config": dataclasses.asdict(cfg)})
    return Path(folder)


def test_probe_finds_what_is_there_and_nothing_where_nothing_is():
    (x, y), (z, truth) = planted(600), planted(300, seed=1)
    assert ((probe.linear(x, z, y, SIZES, len(x)) == truth).mean(0) > 0.93).all()
    shuffled = np.random.default_rng(2).permutation(y)
    assert (np.abs((probe.linear(x, z, shuffled, SIZES, len(x)) == truth).mean(0) - (1 / 3, 1 / 2)) < 0.12).all()


def test_fit_ends_where_the_slope_of_the_loss_is_zero():
    """By differences of the loss as numpy writes it; one task has labels for half of the rows alone."""
    x, y = planted(200, 5)
    y[::2, 1] = -1
    x, _ = probe.rotate(*probe.standard(x, x))
    l2 = np.array([0.03, 0.1])
    w = np.asarray(probe.fit(x, probe.targets(y, SIZES), l2, probe.class_to_task(SIZES), steps=400), np.float64)

    def loss(w):
        total = 0.0
        for t, (a, b) in enumerate(probe.parts(SIZES)):
            rows = y[:, t] >= 0
            scores = x[rows].astype(np.float64) @ w[:, a:b]
            total += (np.log(np.exp(scores).sum(1)) - scores[np.arange(rows.sum()), y[rows, t]]).mean() + l2[t] / 2 * (w[:-1, a:b] ** 2).sum()
        return total
    for i, j in np.ndindex(w.shape):
        step = np.zeros_like(w)
        step[i, j] = 1e-4
        assert abs(loss(w + step) - loss(w - step)) / 2e-4 < 1e-4


def test_attended_probe_reads_the_token_that_tells():
    """The answer stands in a patch that a mark points out; the mean of the tokens hardly holds it."""
    rng = np.random.default_rng(0)

    def tokens(n):
        x, place, y = rng.normal(size=(n, 9, 10)).astype(np.float32), rng.integers(9, size=n), rng.integers(2, size=n)
        x[:, :, 0] = 0
        x[np.arange(n), place, 0], x[np.arange(n), place, 1] = 3, 2 * y - 1
        return x, y[:, None].astype(np.int32)
    (x, y), (z, truth) = tokens(1500), tokens(400)
    assert (probe.attended(x, z, y, (2,), len(x)) == truth).mean() > 0.9
    assert (probe.linear(x.mean(1), z.mean(1), y, (2,), len(x)) == truth).mean() < 0.8


def test_mixing_answers_is_answering_the_mixture():
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in (("query", (6, 2)), ("kernel", (6, 5)), ("bias", (5,)))}
    x, found = rng.normal(size=(4, 7, 6)).astype(np.float32), []
    for t, (a, b) in enumerate(probe.parts(SIZES)):
        looks = np.exp(x @ params["query"][:, t] / np.sqrt(6))
        mixed = ((looks / looks.sum(1, keepdims=True))[..., None] * x).sum(1)
        found.append(mixed @ params["kernel"][:, a:b] + params["bias"][a:b])
    np.testing.assert_allclose(probe.read(params, x, probe.class_to_task(SIZES)), np.concatenate(found, 1), atol=1e-5)


def test_neighbours_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    x, z, y = rng.normal(size=(40, 6)), rng.normal(size=(15, 6)), np.arange(40)[:, None]  # one picture a class
    found = probe.neighbours(x, z, y, (40,))
    for row, answer in zip((z - x.mean(0)) / x.std(0), found[:, 0]):
        cosines = [row @ b / np.linalg.norm(row) / np.linalg.norm(b) for b in (x - x.mean(0)) / x.std(0)]
        assert answer == int(np.argmax(cosines))
    assert probe.euclid(x, z, y).tolist() == [[int(np.argmin([np.linalg.norm(row - b) for b in x]))] for row in z]
    (x, y), (z, truth) = planted(800, 5), planted(200, 5, seed=1)
    assert (probe.neighbours(x, z, y, SIZES) == truth).mean() > 0.75


def test_one_picture_a_class_is_told_by_what_its_copies_share():
    """Half of the directions are loud, and say nothing of the picture."""
    rng = np.random.default_rng(0)
    own, turn, y = rng.normal(size=(60, 8)), np.linalg.qr(rng.normal(size=(16, 16)))[0], np.arange(60)[:, None]
    train, test = (np.concatenate([np.concatenate([own, 2 * rng.normal(size=(60, 8))], 1) @ turn for _ in range(n)]) for n in (5, 1))
    assert (probe.linear(train, test, np.tile(y, (5, 1)), (60,), 60) == y).mean() > 0.9
    assert (probe.nearest(train.reshape(5, 60, 16).mean(0), test, y, (60,)) == y).mean() < 0.6


def test_narrowed_features_lie_as_the_wide_ones(monkeypatch):
    monkeypatch.setattr(probe, "WIDEST", 32)
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(100, 20)) @ rng.normal(size=(20, 200))).astype(np.float32)
    train, test = probe.wide(x[:80].reshape(80, 10, 20), x[80:].reshape(20, 10, 20))
    assert train.shape == (80, 32)
    np.testing.assert_allclose(test @ train.T, x[80:] @ x[:80].T, atol=0.01)


def test_votes_are_counted():
    similar, y = np.array([[0.9, 0.88, 0.87, 0.1]]), np.array([0, 1, 1, 2])
    assert probe.vote(similar, y, 3, 1)[0] == 0 and probe.vote(similar, y, 3, 3)[0] == 1


def test_measure_has_rows_for_readers_and_baselines(encoder):
    pictures = [labels.select_labels(labels.scene_images(0, *part), ("size", "background_color")) for part in (("train", 48), ("val", 24))]
    found = probe.measure(encoder, *pictures, ("pooled", "neighbours"))
    assert set(found) == {"pooled", "neighbours", "random pooled", "random neighbours", "pixels linear", "pixels neighbours", "pixels nearest", "commonest"}
    assert all(set(row) == {"size", "background_color"} for row in found.values())
    assert found == probe.measure(encoder, *pictures, ("pooled", "neighbours"))
    assert set(probe.measure(encoder, *pictures, ("neighbours",), baselines=False)) == {"neighbours"}
    assert len(pictures[1].seen) <= 3 and encoder in pictures[1].seen


def test_what_no_training_picture_tells_is_not_asked():
    """A place that none of them has anything in, and a label that all of them share."""
    train, test = ({"color": np.array(texts), "kind": np.array([["x"]] * 3)} for texts in (
        [["red", ""], ["blue", ""], ["red", ""]], [["blue", "red"], ["green", "red"], ["", "blue"]]))
    names, sizes, y, truth = probe.tasks(train, test)
    assert (names, sizes, y.tolist(), truth.tolist()) == (["color"], (2,), [[1], [0], [1]], [[0], [-1], [-1]])
    with pytest.raises(DataError, match="all training pictures have the same kind"):
        probe.tasks({"kind": train["kind"]}, {"kind": test["kind"]})


def test_scene_labels_say_what_the_record_says():
    found = labels.scene_images(3, "val", 20)
    for n in range(20):
        record = scenes.sample_scene(3, "val", n)
        assert [p for p, told in zip(scenes.PLACES, found.labels["place"][n]) if told == "taken"] == [o["place"] for o in record["objects"]]
        assert [c for c in found.labels["color"][n] if c] == [o["color"] for o in record["objects"]]
        assert found.labels["word"][n, 0] == (record["word"] or "")


@pytest.mark.parametrize("prefix", ["causal", "bidirectional"])
def test_score_is_minus_the_caption_loss(captioner, prefix):
    cfg = dataclasses.replace(captioner.decoder, prefix_attention=prefix)
    tokens = np.random.default_rng(0).normal(size=(3, 4, CFG.width)).astype(np.float32)
    text = np.stack([captioner.tokenizer.encode(scene_captions.caption(scenes.sample_scene(0, "val", i)), 40) for i in range(5)])
    found = np.asarray(zeroshot.score(captioner.params["decoder"], tokens, text, cfg))
    for p in range(3):
        wanted = -decoder.caption_loss(captioner.params["decoder"], np.repeat(tokens[p:p + 1], 5, 0), text, cfg)
        np.testing.assert_allclose(found[p], wanted, rtol=2e-5)


@pytest.mark.parametrize("draws", [0, 2])
def test_likelihood_does_not_depend_on_the_sentences_beside(captioner, draws):
    tokens = np.random.default_rng(0).normal(size=(2, 4, CFG.width)).astype(np.float32)
    sentences = [scene_captions.caption(scenes.sample_scene(0, "val", i)) for i in range(3)]
    together = zeroshot.likelihood(captioner, tokens, sentences, draws)
    np.testing.assert_allclose(together[:, 1:2], zeroshot.likelihood(captioner, tokens, sentences[1:2], draws), rtol=2e-5)
    found = zeroshot.measure(captioner, tokens, sentences, together.argmax(1), draws)
    assert found["likelihood"] == 1 and found["names"] == 3 and found["pictures"] == 2
    twice = [*sentences, *map(str.upper, sentences)]  # of the same words: which of two is not known
    found = zeroshot.measure(captioner, tokens, twice, together.argmax(1), draws)
    assert found["likelihood"] == 0 and found["likelihood, first five"] == 1


def test_classes_come_from_labels_or_a_file(tmp_path):
    held = labels.LabeledImages(None, range(4), {"name": np.array([["Cat"], ["dog"], ["cow"], ["dog"]])})
    sentences, truth = zeroshot.classes(held, np.array([1, 2, 3]), None, "a {}.")
    assert sentences == ["a dog.", "a cow."] and truth.tolist() == [0, 1, 0]
    assert zeroshot.classes(held, np.array([1]), "all", "{}")[0] == ["Cat", "dog", "cow"]
    (tmp_path / "names").write_text("cat\ndog\n\n")
    sentences, truth = zeroshot.classes(held, np.arange(4), str(tmp_path / "names"), "{}")
    assert sentences == ["cat", "dog"] and truth.tolist() == [0, 1, -1, 1]
    (tmp_path / "names").write_text("Dog\ncat\nCAT\ndog\n")
    sentences, truth = zeroshot.classes(held, np.arange(4), str(tmp_path / "names"), "{}")
    assert sentences == ["Dog", "cat"] and truth.tolist() == [1, 0, -1, 0]
    (tmp_path / "names").write_bytes(b"caf\xe9\nbus\n")
    with pytest.raises(DataError, match="names is not UTF-8"):
        zeroshot.classes(held, np.arange(4), str(tmp_path / "names"), "{}")
    (tmp_path / "names").write_text("car\nbus\n")
    with pytest.raises(DataError, match="none of the labels"):
        zeroshot.classes(held, np.arange(4), str(tmp_path / "names"), "{}")


def test_patches_look_as_the_encoder_says():
    """By picture and layer, mean over heads, of patches among each other alone."""
    cfg = dataclasses.replace(CFG, cls_token=True)
    encoder, images = Encoder(vit.init(jax.random.key(0), cfg), cfg, 16), np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    whole = np.asarray(vit.vit(encoder.params, images, cfg, attention=True)["attention"])       # (L,B,H,1+N,1+N)
    looks = visualize.patch_attention(encoder, images)
    assert looks.shape == (3, 2, 4, 4)
    for b, layer in np.ndindex(3, 2):
        among = whole[layer, b].mean(0)[1:, 1:]
        np.testing.assert_allclose(looks[b, layer], among / among.sum(-1, keepdims=True), rtol=1e-5)


def test_words_look_at_the_picture_and_the_words_before(encoder, captioner):
    """With queries and keys of zero each looks at all alike: the word that is t + 1st sees 4 patches and the t + 1 words before it."""
    images, params = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8), captioner.params["decoder"]
    blocks = params["blocks"] | {"qkv": jax.tree.map(np.zeros_like, params["blocks"]["qkv"])}
    alike = captioner._replace(params=captioner.params | {"decoder": params | {"blocks": blocks}})
    text, maps, share = visualize.word_attention(alike, encoder(images).tokens)
    assert text.shape == (2, 40) and maps.shape == (2, 39, 4)
    np.testing.assert_allclose(share, np.broadcast_to(4 / (4 + np.arange(1, 40)), (2, 39)), rtol=1e-5)
    np.testing.assert_allclose(maps, 1 / 4, rtol=1e-5)
    assert np.ptp(visualize.word_attention(captioner, encoder(images).tokens)[1], axis=-1).min() > 1e-4  # they do tell patches apart


def test_colors_follow_the_strongest_directions():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    along = rng.normal(size=(2, 50, 8)) * (9, 5, 3, *[0.01] * 5)
    found = visualize.pca_colors(along @ axes.T)
    assert found.shape == (2, 50, 3) and found.min() == 0 and found.max() == 1
    for i in range(3):
        assert abs(np.corrcoef(found[..., i].ravel(), along[..., i].ravel())[0, 1]) > 0.9


def test_one_command_measures_and_draws(run, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    assert evaluate.main([str(run), "caption", "knn", "zeroshot", "pictures", "--num-samples", "8", "--classnames", "all", "--out", str(tmp_path),
                          "--json", str(figures)]) == 0
    found = json.load(open(figures))
    assert set(found) == {"caption", "knn", "zeroshot", "pictures"} and found["zeroshot"]["names"] == 8
    assert set(found["knn"]["neighbours"]) == set(labels.SCENE_LABELS) and "% right" in capsys.readouterr().out
    for name in ("pca.png", "attention.png", "words.png"):
        assert min(Image.open(tmp_path / name).size) > 100


def test_other_held_out_pictures_and_one_checkpoint(run, tmp_path, capsys):
    for i in range(6):
        Image.new("RGB", (20, 20), (40 * i, 0, 90)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.json").write_text(json.dumps({"caption": f"big red {('circle', 'star')[i % 2]}", "name": f"thing {i}"}))
    at = [str(run / "step-00000002.npz"), "--val", str(tmp_path), "--caption-field", "caption"]
    assert evaluate.main(at) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"val_loss", "val_loss_shuffled", "val_loss_blind"} and found["val_loss_blind"] == found["val_loss_shuffled"]
    assert evaluate.main([*at, "zeroshot"]) == 0
    assert json.loads(capsys.readouterr().out)["zeroshot"]["names"] == 2
    files, figures = ["--data", str(tmp_path), "--val", str(tmp_path)], tmp_path / "figures"
    assert evaluate.main([str(run / "encoder.npz"), "knn", *files, "--label-fields", "caption,name", "--json", str(figures)]) == 0
    found = json.load(open(figures))["knn"]
    assert {"neighbours", "whitened", "random whitened", "pixels whitened", "pixels nearest"} < set(found)
    assert found["pixels nearest"] == {"caption": 1, "name": 1} and found["commonest"]["name"] == 1 / 6


def test_no_count_brings_in_pictures_that_the_run_was_trained_on(run, tmp_path, monkeypatch):
    """Of 60, the run has held out 6: whatever is asked for is of these, and probes train on the other 54."""
    for i in range(60):
        Image.new("RGB", (20, 20), (4 * i, 0, 90)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.json").write_text(json.dumps({"caption": f"big red {('circle', 'star')[i % 2]} {i}"}))
    own = dataclasses.replace(RECIPES["toy"], data=str(tmp_path), caption_field="caption", val_samples=6)
    held = {data.name(i) for data in [run_folder.open_held_out(own)] for i in range(6)}
    assert len(held) == 6
    for count in (3, 6, 2000):
        train, test = labels.open_labeled_images(captioning.override_config(own, {}, count), ("caption",), count)
        assert len(test) == min(count, 6) and len(train) == min(54, 4 * count)
        assert {test.source.name(i) for i in test.indices} <= held and not {train.source.name(i) for i in train.indices} & held
    other = captioning.override_config(own, {"data": "elsewhere", "val": ""}, 3)
    assert other.val_samples == captioning.override_config(own, {"val": "elsewhere"}, 3).val_samples == 3

    arrays, meta = checkpoint.load(str(run / "step-00000002.npz"))
    mine = meta | {"config": meta["config"] | {k: getattr(own, k) for k in ("data", "caption_field", "val_samples")},
                   "data": {"held-out data": run_folder.open_held_out(own).fingerprint()}}
    checkpoint.save(str(tmp_path / "step-00000002.npz"), arrays, mine)
    seen, measure = [], validation.ValidationSet.losses
    monkeypatch.setattr(validation.ValidationSet, "losses", lambda self, params: seen.extend(
        (self.count, self.loader.source.name(i) in held) for i in self.source_index[:self.count].tolist()) or measure(self, params))
    assert evaluate.main([str(tmp_path / "step-00000002.npz"), "--num-samples", "3"]) == 0 and seen == [(3, True)] * 3


def test_mistakes_get_a_sentence(run, tmp_path, capsys):
    damaged, empty, alone = tmp_path / "damaged", tmp_path / "empty", str(run / "encoder.npz")
    damaged.mkdir(), empty.mkdir()
    (damaged / "step-00000002.npz").write_bytes((run / "step-00000002.npz").read_bytes()[:5000])
    arrays, meta = checkpoint.load(str(run / "step-00000002.npz"))
    other = tmp_path / "step-00000003.npz"
    checkpoint.save(str(other), arrays, meta | {"config": meta["config"] | {"encoder": "Ti/8"}})
    (tmp_path / "foreign.npz").write_bytes(b"PK nothing of ours")
    (tmp_path / "model.bin").write_bytes(b"nothing of theirs")
    (tmp_path / "names").write_text("one\n")
    for argv, said in (([str(damaged)], "is damaged"), ([str(other)], "does not fit this model"), ([str(other), "knn"], "does not fit this model"),
                       ([str(tmp_path / "foreign.npz"), "knn"], "damaged or no checkpoint"), ([str(tmp_path / "model.bin"), "knn"], "model.bin"),
                       ([str(tmp_path / "none")], "none"), ([str(empty)], "no checkpoint"), ([alone], "holds only an encoder"),
                       ([alone, "zeroshot", "--num-samples", "4"], "holds only an encoder"), ([str(run), "knn", "--label-fields", "age"], "scenes have"),
                       ([str(run), "zeroshot", "--classnames", str(tmp_path / "names")], "nothing to tell apart"),
                       ([str(run), "zeroshot", "--classnames", str(tmp_path / "no")], "No such file"), ([str(run), "knn", "--resolution", "4"], "patch size"),
                       ([str(run), "--data", str(tmp_path / "none")], "is no data")):
        assert evaluate.main(argv) == 1, argv
        err = capsys.readouterr().err
        assert err.startswith("error: ") and said in err and err.count("\n") == 1, (argv, err)
    for argv in ([str(run), "taste"], [str(run), "--num-samples", "-1"], [str(run), "zeroshot", "--template", "x"]):
        with pytest.raises(SystemExit) as end:
            evaluate.main(argv)
        assert end.value.code == 2
    assert os.listdir(damaged) == ["step-00000002.npz"]


def test_evaluation_takes_as_many_devices_as_share_its_batch(cache, run, tmp_path, capsys):
    """Training asks for a batch that all devices share. Evaluation takes fewer devices instead: a batch of 8 on 2 of 6."""
    assert evaluate.main([str(run)]) == 0
    wanted = json.loads(capsys.readouterr().out)
    code = ("import evaluate, sys\n"
            "place = evaluate.Place\n"
            "evaluate.Place = lambda *count: print('devices', (made := place(*count)).total) or made\n"
            "sys.exit(evaluate.main(sys.argv[1:]))")
    env = cache | {"XLA_FLAGS": "--xla_force_host_platform_device_count=6"}
    ended = subprocess.run([sys.executable, "-c", code, str(run)], env=env, capture_output=True, text=True,
                           cwd=Path(evaluate.__file__).parent)
    assert ended.returncode == 0, ended.stderr
    first, _, rest = ended.stdout.partition("\n")
    assert first == "devices 2"
    assert json.loads(rest) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("objective, reads", [("openvision2", False), ("clip", False), ("cappa", False), ("aimv2", True)])
def test_only_a_loss_on_pixels_reads_them_for_its_blind_value(objective, reads):
    cfg = dataclasses.replace(RECIPES["toy"], objective=objective, val_samples=8, max_text_len=80, vocab_size=150)
    tok = tokenizer.train_vocab((scene_captions.caption(scenes.sample_scene(0, "train", i)) for i in range(60)), cfg.vocab_size)
    reader = data.Reader(run_folder.open_held_out(cfg), tok, cfg.max_text_len, cfg.seed, None, 1)
    held = validation.ValidationSet(cfg, reader, 16, 4, model_spec(cfg), devices.DataParallel(1), train.openvision2_loss)
    images = np.concatenate([batch["images"] for batch, _ in held.batches])
    known = held.blind_loss()
    assert known > 0
    if reads:
        targets = np.asarray(aimv2.pixel_targets(images, 8))
        words = np.array([(row[1:] != 0).sum() for row in held.texts["text"]])
        nats = np.array([scene_captions.caption_nats(scenes.sample_scene(0, "val", i)) for i in range(8)])
        assert known == pytest.approx((nats / words).mean() + aimv2.PIXEL_WEIGHT * np.var(targets, axis=0).mean(), rel=1e-5)
    else:
        for batch, _ in held.batches:
            del batch["images"]
        assert held.blind_loss() == known


def strict(path) -> dict:
    """What a JSON file holds; NaN and Infinity, which are not JSON, fail."""
    def refuse(name):
        raise AssertionError(f"{path} holds {name}")
    return json.loads(Path(path).read_text(), parse_constant=refuse)


def test_what_is_no_number_is_null_in_json():
    found = {"a": float("nan"), "b": [1, float("inf"), {"c": (-float("inf"), 2.5)}], "d": "NaN", "e": None, "f": np.float64("nan")}
    assert json.loads(checkpoint.to_json(found)) == {"a": None, "b": [1, None, {"c": [None, 2.5]}], "d": "NaN", "e": None, "f": None}


def test_a_label_that_training_does_not_have_is_null_in_json(run, tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for i in range(6):
            Image.new("RGB", (20, 20), (40 * i, 0, 90)).save(tmp_path / part / f"{i}.png")
            about = {"caption": f"big red {('circle', 'star')[i % 2]}", "name": f"{part} {i}"}
            (tmp_path / part / f"{i}.json").write_text(json.dumps(about))
    figures = tmp_path / "figures"
    assert evaluate.main([str(run / "encoder.npz"), "knn", "--data", str(tmp_path / "train"), "--val", str(tmp_path / "val"),
                          "--label-fields", "caption,name", "--json", str(figures)]) == 0
    row = strict(figures)["knn"]["pixels nearest"]
    assert row["name"] is None and row["caption"] == 1
    assert "nan" in capsys.readouterr().out  # the table keeps its form


def test_vqa_and_bench_write_null(tmp_path, monkeypatch):
    shares = {"color": float("nan"), "all": 0.5}
    monkeypatch.setattr(vqa, "load_encoder", lambda path: None)
    monkeypatch.setattr(vqa, "table", lambda *asked: {"encoder": shares})
    assert vqa.main(["some", "--json", str(tmp_path / "vqa")]) == 0
    assert strict(tmp_path / "vqa") == {"encoder": {"color": None, "all": 0.5}}
    rows = [{"what": "a", "ms": float("nan"), "rate": float("inf"), "all": [float("nan")]}]
    monkeypatch.setattr(bench, "parse", lambda argv: argparse.Namespace(run=lambda args: rows, json=str(tmp_path / "bench"), lr=float("nan")))
    assert bench.main([]) == 0
    found = strict(tmp_path / "bench")
    assert found["rows"] == [{"what": "a", "ms": None, "rate": None, "all": [None]}] and found["asked"]["lr"] is None


def test_the_ablations_keep_null_and_leave_it_out_of_means(tmp_path):
    path = str(tmp_path / "results" / "ablations.json")
    cells = {"base": {"0": {"all": float("nan")}, "1": {"all": 0.5}}}
    ablations.store({"machine": "", "costs": {"base": {"MiB": float("nan")}}, "cells": cells}, path)
    assert strict(path)["cells"]["base"]["0"] == {"all": None}
    found = ablations.load(path)
    assert ablations.figure(found, "base", "all") == [0.5] and ablations.figure(found, "base", "MiB") == []
    assert "–" in ablations.markdown(found, "predecessor")
    del found["cells"]["base"]["1"]
    ablations.draw(found, str(tmp_path / "plot.png"))
    assert Image.open(tmp_path / "plot.png").size[0] > 100


def test_a_run_writes_null(tmp_path, monkeypatch):
    """In the summary and in the metrics."""
    monkeypatch.setattr(validation, "caption_metrics", lambda held, params: {"object_accuracy": float("nan")})
    monkeypatch.setattr(validation.ValidationSet, "losses", lambda held, params: {"val_loss": 1.0, "val_loss_shuffled": 2.0, "other": float("nan")})
    assert train.main(["toy", "--stages", "resolution=16 steps=1 batch=8 lr=1e-3", "--val-samples", "8", "--max-text-len", "12",
                       "--num-devices", "1", "--workdir", str(tmp_path / "run")]) == 0
    summary = strict(tmp_path / "run" / "summary.json")
    assert summary["object_accuracy"] is None and summary["other"] is None and summary["val_loss"] == 1
    assert strict(tmp_path / "run" / "config.json")["seed"] == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (row,) = [json.loads(line) for line in lines if "val_loss" in line]
    assert row["other"] is None and "NaN" not in "".join(lines)
