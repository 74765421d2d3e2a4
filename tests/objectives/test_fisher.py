"""Fisher's discriminant, on features whose directions are planted, and as LiT computes it."""
from types import SimpleNamespace

import numpy as np

from config import Config
from inputs import sources
from inputs.images import Augment
from objectives import fisher, lit
from runtime.curriculum import parse_stages
from tests.helpers.samples import members, reader, spill
from tests.objectives.small import make_model, make_params

n, F, K, COPIES = 60, 16, 6, 8


def planted(seed: int) -> list[np.ndarray]:
    """(n,F) of each copy: six directions tell images apart, the others are loud and differ between
    the copies of one image."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(np.random.default_rng(9).normal(size=(F, F)))[0]
    own, copies = np.random.default_rng(8).normal(size=(n, K)), []
    for _ in range(COPIES):
        noise = [own + 0.1 * rng.normal(size=(n, K)), 4 * rng.normal(size=(n, F - K))]
        copies.append((np.concatenate(noise, 1) @ rotation).astype(np.float32))
    return copies


def nearest(test: np.ndarray, train: np.ndarray) -> np.ndarray:
    return np.linalg.norm(test[:, None] - train, axis=2).argmin(1)


def test_the_directions_are_those_that_tell_images_apart():
    copies, new = planted(0), planted(1)[0]
    found = fisher.discriminant(copies.__getitem__, COPIES, K)
    assert found["mean"].shape == (F,) and found["matrix"].dtype == np.float32
    project = lambda x: (x - found["mean"]) @ found["matrix"]  # noqa: E731
    means = np.mean(copies, axis=0)
    assert (nearest(project(new), project(means)) == np.arange(n)).mean() > 0.8
    assert (nearest(new, means) == np.arange(n)).mean() < 0.4
    deviations = project(means).std(0)
    assert (np.diff(deviations) <= 1e-5).all()


def test_directions_beyond_the_number_of_images_are_zero():
    found = fisher.discriminant(lambda c: planted(0)[c][:4], COPIES, K)
    assert found["matrix"][:, :3].any(axis=0).all() and not found["matrix"][:, 3:].any()


def test_a_new_lit_run_computes_it_from_the_tokens_of_all_copies(tmp_path, monkeypatch):
    """A damaged image is left out. A continued run has it already."""
    broken = [(name, b"no image" if name == "000000002.jpg" else data) for name, data in members(6)]
    source, model = sources.open_source(spill(tmp_path, broken)), make_model("lit")
    model = model._replace(image_pool="grid", num_patches=4)
    run = SimpleNamespace(loader=reader(source, augment=Augment(min_crop_area=0.5)), model=model,
                          cfg=Config(feature_copies=3, workers=1), step=0,
                          stages=parse_stages("resolution=16 steps=9 batch=8 lr=1"),
                          parallel=SimpleNamespace(is_main=False))
    seen, params = [], make_params(model)

    def record(tokens_of_copy, copies, num_directions):
        seen.extend(tokens_of_copy(c) for c in range(copies))
        return fisher.discriminant(tokens_of_copy, copies, num_directions)
    monkeypatch.setattr(lit, "discriminant", record)
    loader = lit.training_loader(run, params)
    width, good = 4 * model.encoder.width, len(source) - 1
    assert [x.shape for x in seen] == 3 * [(good, width)] and len(loader.features) == 3 * good
    computed = params["discriminant"]["matrix"]
    assert computed.shape == (width, lit.NUM_DIRECTIONS)
    run.step = 1
    lit.training_loader(run, params)
    assert params["discriminant"]["matrix"] is computed and len(seen) == 3


def test_singular_vectors_are_the_same_from_either_matrix():
    """With rows of zeros, x has more rows than columns, and the same singular values."""
    wide = np.random.default_rng(0).normal(size=(F, n)).astype(np.float32)
    tall = np.concatenate([wide, np.zeros((n, n), np.float32)])
    (ratios, directions), (others, padded) = map(fisher.singular_vectors, (wide, tall))
    np.testing.assert_allclose(ratios, others, rtol=1e-4)
    assert padded.shape == (F + n, F) and not padded[F:].any()
    np.testing.assert_allclose(np.abs((directions * padded[:F]).sum(0)), 1, atol=1e-4)
    np.testing.assert_allclose(ratios, np.linalg.svd(wide, compute_uv=False), rtol=1e-4)


def test_features_in_bf16_are_summed_in_fp32():
    copies = [(100 + copy).astype("bfloat16") for copy in planted(0)]
    found = fisher.discriminant(copies.__getitem__, COPIES, K)
    expected = fisher.discriminant(lambda c: copies[c].astype(np.float32), COPIES, K)
    assert found["mean"].dtype == np.float32 and np.isfinite(found["matrix"]).all()
    assert all((found[name] == expected[name]).all() for name in found)


def test_equal_images_give_no_directions():
    rng = np.random.default_rng(0)
    copies = rng.normal(size=(4, 30, 8)).astype(np.float32)
    copies[:, 10:] = 1  # twenty images of one color, which augmentation cannot change
    found = fisher.discriminant(copies.__getitem__, 4, 20)
    assert np.isfinite(found["matrix"]).all()


def test_the_lengths_of_the_directions_follow_from_the_eigenvalues():
    """Of within^-1 between. A direction's length over all images is ratio**0.5, and its ratio is
    the root of its eigenvalue."""
    copies = planted(0)
    found = fisher.discriminant(copies.__getitem__, COPIES, K)
    means = np.mean(copies, axis=0, dtype=np.float64)
    centered = means - means.mean(0)
    within = np.mean([(copy - means).T @ (copy - means) / n for copy in copies], axis=0)
    values = np.linalg.eigvals(np.linalg.solve(fisher.shrink(within), centered.T @ centered)).real
    largest = np.sort(values)[::-1][:K]
    lengths = np.linalg.norm(centered @ found["matrix"], axis=0)
    np.testing.assert_allclose(lengths, largest ** 0.25, rtol=1e-3)
