"""Features of any image, from an encoder in a run, a checkpoint or a file."""
import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import train
import vit
from interop import transfer
from interop.encoder import batches, load_encoder, load_pixels
from objectives import registry
from runtime import checkpoint
from runtime.errors import BadSample, CheckpointError, ConfigError
from tests.helpers.encoders import equal_trees, random_image, untrained_run
from tests.helpers.paths import ROOT


def close(a, b, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and np.abs(a - b).max() < tolerance


def test_all_kinds_of_images_are_accepted(run, tmp_path):
    image, other = random_image(1), random_image(2)
    image.save(tmp_path / "a.png")
    encoder = load_encoder(run)
    assert encoder.resolution == 24
    pixels = np.stack([encoder.pixels(x)[0] for x in (image, other)])
    expected = vit.vit(encoder.params, pixels, encoder.cfg)
    assert expected["tokens"].shape == (2, 9, 96) and expected["pooled"].shape == (2, 96)
    for images in ([image, other], [str(tmp_path / "a.png"), np.asarray(other)],
                   [tmp_path / "a.png", other]):
        features = encoder(images)
        assert close(features.tokens, expected["tokens"])
        assert close(features.pooled, expected["pooled"])
    for single in (image, tmp_path / "a.png", np.asarray(image)):
        assert close(encoder(single).tokens, expected["tokens"][:1])
    assert encoder(np.zeros((3, 8, 9, 3), np.uint8)).tokens.shape == (3, 9, 96)


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_batches_cover_all_images_in_few_sizes_with_little_padding(batch):
    sizes = set()
    for count in range(1, 100):
        expected_start = 0
        for start, stop, size in batches(count, batch):
            assert start == expected_start < stop and 0.75 * size <= stop - start <= size <= batch
            expected_start = stop
            sizes.add(size)
        assert expected_start == count
    assert sizes <= {1, 2, 4, 8, 16, batch}


def test_the_batch_size_does_not_change_features(run):
    images, encoder = [random_image(i) for i in range(7)], load_encoder(run, resolution=16)
    tokens = encoder(images).tokens
    assert tokens.shape == (7, 4, 96)
    for batch in (1, 3, 4):
        assert close(encoder(images, batch=batch).tokens, tokens, 1e-5)


def test_a_jpeg_is_decoded_at_full_size(tmp_path):
    path = tmp_path / "a.jpg"
    random_image(0, (640, 480)).save(path)
    expected = np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(load_pixels(path, 32), expected)
    assert np.array_equal(load_pixels(Image.open(path), 32), expected)


@pytest.mark.parametrize("images, message", [
    ("absent.png", "absent.png does not exist"), (__file__, "cannot be opened"),
    (np.zeros((4, 4, 3)), "array is float64"), (np.zeros((4, 4, 2), np.uint8), "must be uint8"),
    ([], "there is no image")])
def test_what_is_no_image_is_named(run, images, message):
    with pytest.raises(BadSample, match=message):
        load_encoder(run)(images)


def test_an_encoder_is_the_same_from_run_checkpoint_and_file(run, tmp_path):
    transfer.export_encoder(run, "npz", str(tmp_path / "out"))
    params, cfg, meta = checkpoint.read_encoder(run)
    assert meta["resolution"] == 24 and meta["step"] == 4
    for path in (checkpoint.steps(run)[0][1], tmp_path / "out", tmp_path / "out/encoder.npz"):
        same_params, same_cfg, same_meta = checkpoint.read_encoder(str(path))
        assert equal_trees(same_params, params)
        assert (same_cfg, same_meta["resolution"]) == (cfg, 24)


def test_a_checkpoint_that_names_its_encoder_needs_no_settings(run, tmp_path):
    params, cfg, _ = checkpoint.read_encoder(run)
    meta = {"encoder": dataclasses.asdict(cfg), "resolution": 24, "config": {"unknown": 1}}
    path = checkpoint.save_step(str(tmp_path), 4, {"params": {"encoder": params}}, meta)
    same_params, same_cfg, same_meta = checkpoint.read_encoder(path)
    assert equal_trees(same_params, params)
    assert (same_cfg, same_meta["resolution"]) == (cfg, 24)


def test_settings_of_earlier_versions_give_the_encoder(tmp_path):
    cfg = untrained_run(str(tmp_path), cls_token=True, learned_pos_grid=3)
    path = checkpoint.steps(str(tmp_path))[0][1]
    arrays, meta = checkpoint.load(path)
    for new, old in (("cls_token", "cls"), ("learned_pos_grid", "positions")):
        meta["config"][old] = meta["config"].pop(new)
    checkpoint.save(path, arrays, meta)
    assert checkpoint.read_encoder(path)[1] == registry.model_spec(cfg).encoder


def test_an_encoder_that_cannot_be_used_is_named(run, tmp_path):
    with pytest.raises(ConfigError, match="5 is below the patch size 8"):
        load_encoder(run, resolution=5)
    path = str(tmp_path / "other.npz")
    checkpoint.save(path, {"a": np.zeros(3)}, {"of": "something else"})
    with pytest.raises(CheckpointError, match="is no encoder"):
        checkpoint.read_encoder(path)


BESIDE = """
import sys
import config, data, decoder, train
sys.path.append(sys.argv[1])
from interop.encoder import load_encoder
tokens, pooled = load_encoder(sys.argv[2])([sys.argv[3]])
print(tokens.shape, pooled.shape, config.NAME, data.NAME, decoder.NAME, train.NAME)
"""


def test_features_beside_other_modules_of_the_same_names(run, tmp_path, cache):
    """A project has its own config.py and so on; a run's checkpoint and an encoder.npz are read."""
    for name in ("config", "data", "decoder", "train"):
        (tmp_path / f"{name}.py").write_text(f"NAME = '{name}'\n")
    random_image().save(tmp_path / "a.png")
    transfer.export_encoder(run, "npz", str(tmp_path / "out"))
    (tmp_path / "main.py").write_text(BESIDE)
    for path in (run, "out/encoder.npz"):
        ended = subprocess.run([sys.executable, "main.py", ROOT, path, "a.png"], cwd=tmp_path,
                               env=cache, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout == "(1, 9, 96) (1, 96) config data decoder train\n"


def test_training_starts_from_an_encoder(run, tmp_path, capsys):
    flags = ["--encoder", "micro/8", "--scan-unroll", "1", "--num-devices", "1",
             "--stages", "resolution=32 steps=1 batch=2 lr=1e-12", "--val-samples", "2",
             "--init-encoder", run]
    folder = str(tmp_path / "next")
    assert train.main([*flags, "--workdir", folder]) == 0
    initial = checkpoint.read_encoder(run)[0]
    trained, _, meta = checkpoint.read_encoder(folder)
    assert meta["resolution"] == 32
    for a, b in zip(jax.tree.leaves(initial), jax.tree.leaves(trained), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)  # at such a learning rate nothing moves
    for change, message in ((["--cls-token"], "has cls_token False, not True"),
                            (["--encoder", "micro/4"], "has patch_size 8, not 4")):
        assert train.main([*flags, *change, "--workdir", os.path.join(folder, "other")]) == 1
        assert message in capsys.readouterr().err
