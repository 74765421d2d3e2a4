"""The systems that the method is compared with: their losses by closed formulas, who may see whom, and a run of each."""
import dataclasses
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import caption
import config
import decoder
import layers
import masking
import train
import vit
from interop.encoder import load_encoder
from objectives import aimv2, cappa, contrastive, openvision, registry
from tests.helpers.models import matmul_flops, perturbed
from tests.helpers.paths import ROOT

B, T, V, SIDE = 4, 10, 40, 24  # 9 patches
ENC = vit.ViTConfig(depth=2, width=32, num_heads=2, mlp_dim=48, patch_size=8)
DEC = decoder.DecoderConfig(depth=2, width=24, num_heads=2, mlp_dim=40, vocab_size=V, image_width=32)
NAMES = registry.RIVALS


def captions(seed: int) -> np.ndarray:
    text = np.random.default_rng(seed).integers(3, V, (B, T)).astype(np.int32)
    text[:, 0] = decoder.BOS
    for row, end in zip(text, (T - 1, 6, 3, 4)):
        row[end], row[end + 1:] = decoder.EOS, decoder.PAD
    return text


def batch() -> dict[str, np.ndarray]:
    return {"images": np.random.default_rng(0).integers(0, 256, (B, SIDE, SIDE, 3), np.uint8), "text": captions(1), "alt": captions(2)}


KEYS = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(1), n))(np.arange(B))


def model(name: str, cls: bool = False) -> registry.ModelSpec:
    return registry.ModelSpec(dataclasses.replace(ENC, cls_token=cls), DEC, 1.0, name, max_text_len=T)


def parameters(of: registry.ModelSpec) -> dict:
    declared = {"encoder": vit.param_specs(of.encoder)} | registry.param_specs(of)
    return perturbed(layers.init_params(jax.random.key(0), declared))


def sums(name: str, found: dict, devices: int = 1, **how) -> tuple[float, float]:
    """(loss, count) of the whole batch, over pretend devices."""
    of = model(name)
    cut = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), (found, KEYS))
    loss = jax.jit(jax.vmap(lambda params, b, k: registry.rival(name).loss(params, b, k, of, **how), (None, 0, 0), axis_name="devices"))
    return tuple(float(x.sum()) for x in loss(parameters(of), *cut))


def crossed(scores: np.ndarray) -> float:
    """The mean of both directions' cross-entropies, by optax."""
    right = np.arange(len(scores))
    return float(sum(optax.softmax_cross_entropy_with_integer_labels(s, right).mean() for s in (scores, scores.T)) / 2)


def test_contrast_is_clips_loss_on_any_number_of_devices():
    rng = np.random.default_rng(0)
    image, text = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in rng.standard_normal((2, 8, 5)).astype(np.float32))
    real = np.array([True] * 3 + [False] + [True] * 3 + [False])
    wanted = crossed(7.0 * (image @ text.T)[real][:, real])
    for devices in (1, 2, 8):
        cut = [a.reshape(devices, -1, *a.shape[1:]) for a in (image, text, real)]
        found = jax.vmap(lambda a, b, r: contrastive.contrastive_loss(a, b, r, 7.0), axis_name="devices")(*cut).reshape(-1)
        assert float(found.sum()) / 6 == pytest.approx(wanted, rel=1e-5) and (found[~real] == 0).all()


def test_temperature_starts_at_clips_and_can_leave_its_bound():
    at = lambda log: contrastive.logit_scale({"pair": {"temperature": {"log": log}}})  # noqa: E731
    assert float(at(0.0)) == pytest.approx(1 / 0.07) and float(at(5.0)) == pytest.approx(100)
    assert float(jax.grad(at)(5.0)) == pytest.approx(100)  # it would be 0 behind a plain bound


def test_pixel_targets_are_maes():
    found = np.asarray(aimv2.pixel_targets(batch()["images"], 8))
    pixels = (batch()["images"] / 255 - vit.IMAGENET_MEAN) / vit.IMAGENET_STD
    one = pixels[1, 8:16, 16:24].reshape(-1)  # second row, third column
    np.testing.assert_allclose(found[1, 5], (one - one.mean()) / np.sqrt(one.var(ddof=1) + 1e-6), atol=1e-5)
    flat = aimv2.pixel_targets(np.full((1, 8, 8, 3), 90, np.uint8), 8)
    assert np.isfinite(flat).all()


def test_openvision_is_the_sum_of_its_terms():
    found, of = batch(), model("openvision")
    params = parameters(of)
    encoded = vit.vit(params["encoder"], found["images"], ENC)
    image = contrastive.l2_normalize(encoded["pooled"] @ params["pair"]["image"]["kernel"])
    scale, pairs = contrastive.logit_scale(params), []
    for words in (found["alt"], found["text"]):
        _, feature = contrastive.encode_text(params["text"], words, DEC)
        pairs.append(crossed(scale * image @ contrastive.l2_normalize(feature).T))
    web, _ = contrastive.encode_text(params["text"], found["alt"], DEC)
    prefix = jnp.concatenate([encoded["tokens"], web @ params["web"]["kernel"]], axis=1)
    scores = decoder.logits(params["decoder"], prefix, found["text"][:, :-1], dataclasses.replace(DEC, prefix_attention="bidirectional"))
    targets = found["text"][:, 1:]
    told = optax.softmax_cross_entropy_with_integer_labels(scores, targets)[targets != 0].mean()
    loss, words = sums("openvision", found)
    assert words == (targets != 0).sum()
    assert loss / words == pytest.approx(2 * float(told) + sum(pairs) / 2, rel=1e-5)
    assert sums("openvision", found, 2)[0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("cls", [False, True])
def test_aimv2_is_the_mean_over_pictures_of_both_terms(cls):
    found, of = batch(), model("aimv2", cls)
    params, N = parameters(of), 9
    total = 0.0
    for b, key in enumerate(KEYS):
        M = int(jax.random.randint(key, (), 1, N))
        see = np.tril(np.ones((N + cls, N + cls), bool))
        see[:, :M + cls] = True
        tokens = vit.vit(params["encoder"], found["images"][b:b + 1], of.encoder, mask=see)["tokens"]
        text = found["text"][b:b + 1]
        length = int((text[0] != 0).sum()) - 1
        told = optax.softmax_cross_entropy_with_integer_labels(decoder.logits(params["decoder"], tokens, text[:, :length], DEC), text[:, 1:length + 1]).mean()
        hidden = layers.layer_norm(decoder.hidden_states(params["decoder"], tokens, text[:, :1], DEC), params["decoder"]["norm"])[0]
        guess = hidden[M - 1:N - 1] @ params["decoder"]["pixels"]["kernel"] + params["decoder"]["pixels"]["bias"]
        total += float(told) + 0.4 * float(optax.squared_error(guess, aimv2.pixel_targets(found["images"][b:b + 1], 8)[0, M:]).mean())
    loss, count = jax.jit(aimv2.loss, static_argnums=3)(params, found, KEYS, of)
    assert count == B and float(loss) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_that_fill_up_a_batch_do_not_count(name):
    found = batch()
    found["text"][-1] = found["alt"][-1] = 0
    other = found | {"images": found["images"].copy()}
    other["images"][-1] = 255 - other["images"][-1]
    loss, count = sums(name, found)
    assert sums(name, other) == pytest.approx((loss, count), rel=1e-6)
    assert count == (3 if name in ("clip", "aimv2") else (found["text"][:, 1:] != 0).sum())


def test_a_captions_feature_knows_every_word_and_no_padding():
    params, text = parameters(model("clip"))["text"], captions(1)
    feature = contrastive.encode_text(params, text, DEC)[1]
    np.testing.assert_allclose(contrastive.encode_text(params, text[1:2, :7], DEC)[1], feature[1:2], atol=1e-5)
    for parallel in range(1, 6):
        other = text.copy()
        other[1, parallel] = 3 + (other[1, parallel] - 2) % (V - 3)
        assert np.abs(contrastive.encode_text(params, other, DEC)[1][1] - feature[1]).max() > 1e-4


def test_cappa_sees_no_later_word_and_in_parallel_none():
    params, rng = parameters(model("cappa"))["decoder"], np.random.default_rng(0)
    memory = rng.standard_normal((1, 9, 32), np.float32)
    text, causal = captions(1)[:1], decoder.attention_mask(0, T, "causal")
    hidden = cappa.cross_features(params, memory, text, causal, DEC)
    for parallel in range(1, T):
        other = text.copy()
        other[0, parallel] = 3 + (other[0, parallel] - 2) % (V - 3)
        changed = np.abs(cappa.cross_features(params, memory, other, causal, DEC) - hidden).max(-1)[0] > 1e-5
        assert not changed[:parallel].any() and changed[parallel]
    assert (np.abs(cappa.cross_features(params, memory + 1, text, causal, DEC) - hidden).max(-1) > 1e-5).all()
    masks = np.full((1, T), V)
    at_once = cappa.cross_features(params, memory, masks, np.ones((T, T), bool), DEC)
    assert np.abs(at_once[0, 1:] - at_once[0, :-1]).max(-1).min() > 1e-4  # its places are told apart


def test_the_share_of_cappa_that_is_parallel_reads_no_word():
    """With all in parallel, the loss of a target does not depend on the other words: it is additive over the caption."""
    found = batch()
    found["text"][:, 1:-1], found["text"][:, -1] = 5, decoder.EOS
    one, two = found["text"].copy(), found["text"].copy()
    one[:, 3], two[:, 6] = 9, 11
    both = np.where(two == 11, 11, one)
    texts = found["text"], one, two, both
    loss = {n: [sums("cappa", found | {"text": t}, parallel=share)[0] for t in texts] for n, share in (("at once", 1.0), ("by word", 0.0))}
    assert loss["at once"][3] - loss["at once"][2] == pytest.approx(loss["at once"][1] - loss["at once"][0], abs=1e-3)
    assert abs(loss["by word"][3] - loss["by word"][2] - loss["by word"][1] + loss["by word"][0]) > 1e-2


def test_cappa_tells_by_each_pictures_draw_three_quarters_at_once():
    of, found, keys = model("cappa"), batch(), jax.random.split(jax.random.key(4), B)
    params = parameters(of)

    def by_picture(**how):
        one = lambda b, key: cappa.loss(params, jax.tree.map(lambda x: x[None], b), key[None], of, **how)[0]  # noqa: E731
        return jax.jit(jax.vmap(one))(found, keys)
    at_once = jax.vmap(jax.random.uniform)(keys) < 0.75
    assert 0 < at_once.sum() < B
    np.testing.assert_allclose(by_picture(), np.where(at_once, by_picture(parallel=1.0), by_picture(parallel=0.0)), rtol=1e-5)


@pytest.mark.parametrize("cls", [0, 1])
@pytest.mark.parametrize("prefix", [1, 5, 8])
def test_aimv2s_encoder_sees_the_prefix_and_what_is_before(prefix, cls):
    cfg = dataclasses.replace(ENC, cls_token=bool(cls))
    params, images = perturbed(vit.init(jax.random.key(0), cfg)), batch()["images"][:1]
    mask = aimv2.prefix_mask(jnp.array([prefix + cls]), 9 + cls)
    see = lambda pixels: vit.vit(params, pixels, cfg, mask=mask)["tokens"][0]  # noqa: E731
    plain = see(images)
    for patch in range(9):
        other, (y, x) = images.copy(), divmod(patch, 3)
        other[:, 8 * y:8 * y + 8, 8 * x:8 * x + 8] ^= 255
        changed = np.abs(see(other) - plain).max(-1) > 1e-5
        assert changed.tolist() == [patch < prefix or i >= patch for i in range(9)]


def test_what_is_told_is_what_the_model_would_say_next():
    """Greedy captions, read back: each word is the likeliest after those before it."""
    for name in filter(registry.can_caption, NAMES):
        of, found = model(name), batch()
        params = parameters(of)
        text = np.asarray(registry.rival(name).generate(params, found, of))
        assert text.shape == (B, T) and (text[:, 0] == decoder.BOS).all()
        if name == "cappa":
            hidden = cappa.cross_features(params["decoder"], cappa.encode_memory(params, found["images"], of), text,
                                              decoder.attention_mask(0, T, "causal"), DEC)
            scores = hidden @ params["decoder"]["head"]["kernel"]
        else:
            tokens = vit.vit(params["encoder"], found["images"], ENC)["tokens"]
            if name == "openvision":
                tokens = openvision.decoder_prefix(params, tokens, contrastive.encode_text(params["text"], found["alt"], DEC)[0])
            scores = decoder.logits(params["decoder"], tokens, text, (openvision.bidirectional if name == "openvision" else aimv2.causal)(DEC))
        going = np.cumsum(text == decoder.EOS, axis=-1)[:, :-1] == 0
        assert (np.asarray(scores.argmax(-1))[:, :-1] == text[:, 1:])[going].all() and (text[:, 1:][~going] == 0).all()


@pytest.mark.parametrize("name", ("openvision2", *NAMES))
def test_flops_are_those_of_the_program(name):
    of = registry.ModelSpec(ENC, DEC, 0.5, name, max_text_len=T)
    loss = train.OBJECTIVES[name]
    counted = matmul_flops(jax.vmap(lambda p, b, k: loss(p, b, k, of), (None, 0, 0), axis_name="devices"),
                           parameters(of), *jax.tree.map(lambda x: x[None], (batch(), KEYS)))
    scores = {"clip": 1, "openvision": 2}.get(name, 0) * 4 * B * DEC.width
    assert counted / B == pytest.approx(sum(registry.flops(of, SIDE, T).values()) + scores, rel=1e-6)


def test_the_method_starts_from_keys_of_the_initial_domain():
    cfg = config.RECIPES["toy"]
    of = registry.model_spec(cfg)
    assert of == registry.ModelSpec(*registry.model_spec(cfg, 192), 0.35, max_text_len=28)
    params, key = registry.init_params(cfg, of), jax.random.fold_in(jax.random.key(0), 1 << 31)
    wanted = {"encoder": vit.init(jax.random.fold_in(key, 0), of.encoder), "decoder": decoder.init(jax.random.fold_in(key, 1), of.decoder)}
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, wanted))


def test_floors():
    surprise, words = np.array([4.0, 12.0]), np.array([4, 8])
    at = lambda name, **how: registry.blind_loss(name, registry.BlindFacts([3, 1], surprise, words, lambda: np.array([3, 4])[:, None, None] + np.arange(36).reshape(9, 4)))  # noqa: E731
    pair = 3 * math.log(3) / 4  # the last, alone in its batch, cannot be mistaken
    assert at("clip") == pytest.approx(pair) and at("cappa") == at("openvision2") == pytest.approx(16 / 12)
    assert at("openvision") == pytest.approx(2 * 16 / 12 + pair) and at("aimv2") == pytest.approx(1.25 + 0.4 * 0.25)
    assert registry.blind_loss("aimv2", registry.BlindFacts([3, 1], None, None, lambda: np.zeros(1))) is None


def test_all_patches_are_used_by_all_but_the_method():
    assert [registry.num_decoder_tokens(registry.ModelSpec(ENC, DEC, 0.35, name), 100) for name in ("openvision2", *NAMES)] == [masking.num_kept_tokens(100, 0.35)] + [100] * 4


OTHER = {"clip": ("eight", 8, 1, False), "openvision": ("two", 2, 1, True)}  # those that contrast: other losses do not look across pictures
DEVICES = """
import sys, jax, numpy as np, optax, config, decoder, test_baselines as t, train
from devices import Place
out = {}
for name in t.OTHER:
    model, sgd = t.model(name), optax.sgd(0.05)
    start = t.parameters(model)
    batch = {k: np.concatenate([v, v[::-1]]) if k != "images" else np.concatenate([v, 255 - v]) for k, v in t.batch().items()} | {"sample_index": np.arange(8)}
    for what, count, accum, shard in (("one", 1, 1, False), t.OTHER[name]):  # one each, for each program is compiled for seconds
        place = Place(count)
        step = train.make_step(model, sgd, 0, accum, place.local, shard)
        params, _, metrics = step(place.copies(start), place.copies(sgd.init(start)), place.put(batch))
        out[f"{name} {what} loss"] = place.get(metrics["loss"])
        for i, (x, y) in enumerate(zip(jax.tree.leaves(params), jax.tree.leaves(start))):
            out[f"{name} {what} {i}"] = (np.asarray(y) - np.asarray(x)[0]) / 0.05  # with plain SGD the change is the gradient
np.savez(sys.argv[1], **out)
"""


def test_devices_and_slices_change_no_number(tmp_path, cache):
    env = cache | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    done = subprocess.run([sys.executable, "-c", DEVICES, str(tmp_path / "out.npz")], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    out = np.load(tmp_path / "out.npz")
    for name in OTHER:
        ones = [k.split()[-1] for k in out.files if k.startswith(f"{name} one ")]
        assert len(ones) > 25
        for key in ones:
            a, b = out[f"{name} {OTHER[name][0]} {key}"], out[f"{name} one {key}"]
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-5, (name, key)


TINY = ["--stages", "resolution=16 steps=2 batch=8 lr=1e-3 warmup=1", "--val-samples", "12", "--log-every", "1"]
ALT = {"openvision": ["--alt-field", "web"]}


@pytest.mark.parametrize("name", ["clip", "openvision"])  # without captions of its own, and with; each is compiled for 20 s
def test_a_run_from_start_to_use(name, tmp_path, capsys):
    folder = tmp_path / name
    assert train.main([*TINY, *ALT.get(name, []), "--objective", name, "--workdir", str(folder)]) == 0
    summary = json.load(open(folder / "summary.json"))
    assert np.isfinite(summary["val_loss"]) and summary["val_loss_blind"] > 0
    assert ("object_accuracy" in summary) == registry.can_caption(name)
    assert (folder / "samples.png").exists() and (folder / "curve.png").exists()
    capsys.readouterr()
    assert train.main([*TINY, *ALT.get(name, []), "--objective", name, "--workdir", str(folder)]) == 0 and "is finished" in capsys.readouterr().out
    assert load_encoder(str(folder))([np.zeros((16, 16, 3), np.uint8)]).tokens.shape == (1, 4, 96)
    assert caption.main([str(folder), "x.png"]) == 1 and f"--objective {name}" in capsys.readouterr().err
    assert train.main([*TINY, "--objective", "openvision2", "--workdir", str(folder)]) == 1 and f"was '{name}'" in capsys.readouterr().err


@pytest.mark.parametrize("argv, said", [
    (["--objective", "clip", "--grad-accum", "2"], "--grad-accum 2 would part: leave it at 1"),
    (["--objective", "openvision", "--alt-field", "web", "--grad-accum", "2"], "--grad-accum 2 would part: leave it at 1"),
    (["--objective", "openvision"], "name its field with --alt-field"),
    (["--objective", "clip", "--alt-field", "web"], "--alt-field web is read by --objective openvision alone"),
    (["--objective", "aimv2", "--stages", "resolution=8 steps=2 batch=8 lr=1e-3"], "needs a resolution of 16 or more")])
def test_what_cannot_be_is_refused(argv, said, capsys):
    assert train.main([*argv, "--dry-run"]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_is_told_by_part(name, capsys):
    assert train.main(["l14", "--objective", name, *(["--alt-field", "org_caption"] if name in ALT else []), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "encoder 302.9 M" in told and ("text 110.3 M" in told) == (name in ("clip", "openvision")) and "256 kept" in told
