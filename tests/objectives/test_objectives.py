"""The objectives as train.py uses them: captions, costs, start, devices, settings, and a run."""
import dataclasses
import json
import math
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import caption
import config
import decoder
import masking
import train
import vit
from interop.encoder import load_encoder
from objectives import aimv2, cappa, contrastive, genlip, lit, openvision, registry
from runtime import devices
from tests.helpers.compiling import several_devices
from tests.helpers.models import matmul_flops
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL_RUN
from tests.objectives.small import (
    DEC,
    ENC,
    KEYS,
    RESOLUTION,
    B,
    N,
    T,
    make_batch,
    make_model,
    make_params,
)

ALL = registry.OBJECTIVES
CAPTIONING = tuple(name for name in registry.OTHER_OBJECTIVES if registry.can_caption(name))
ALT_FIELD = {"openvision": ["--alt-field", "web"]}
TINY = [*SMALL_RUN, "--stages", "resolution=16 steps=2 batch=8 lr=1e-3 warmup=1",
        "--log-every", "1"]


# --------------------------------------------------------------------------------- captions
def next_token_logits(objective: str, params: dict, batch: dict, text: np.ndarray) -> jax.Array:
    """(B,T,V) of the token after each one of text (B,T)."""
    if objective == "cappa":
        memory = cappa.encode_memory(params, batch["images"], make_model(objective))
        causal = decoder.attention_mask(0, T, "causal")
        hidden = cappa.cross_features(params["decoder"], memory, text, causal, DEC)
        return hidden @ params["decoder"]["head"]["kernel"]
    if objective == "genlip":
        features = genlip.text_features(params, batch["images"], text, make_model(objective))
        return features @ params["text"]["head"]["kernel"]
    tokens = vit.vit(params["encoder"], batch["images"], ENC)["tokens"]
    if objective == "aimv2":
        return decoder.caption_logits(params["decoder"], tokens, text, aimv2.causal(DEC))
    web, _ = contrastive.encode_text(params["text"], batch["alt"], DEC)
    prefix = openvision.decoder_prefix(params, tokens, web)
    return decoder.caption_logits(params["decoder"], prefix, text, openvision.bidirectional(DEC))


@pytest.mark.parametrize("objective", CAPTIONING)
def test_generated_captions_are_greedy(objective):
    """Each token is the likeliest after those before it."""
    model, batch = make_model(objective), make_batch()
    params = make_params(model)
    text = np.asarray(registry.objective_module(objective).generate(params, batch, model))
    assert text.shape == (B, T) and (text[:, 0] == decoder.BOS).all()
    logits = jax.jit(next_token_logits, static_argnums=0)(objective, params, batch, text)
    likeliest = np.asarray(logits).argmax(-1)
    unfinished = np.cumsum(text == decoder.EOS, axis=-1)[:, :-1] == 0
    assert (likeliest[:, :-1] == text[:, 1:])[unfinished].all()
    assert (text[:, 1:][~unfinished] == decoder.PAD).all()


def test_the_objectives_with_a_decoder_can_caption():
    assert CAPTIONING == ("openvision", "cappa", "aimv2", "genlip")
    assert registry.can_caption(registry.METHOD)


# ------------------------------------------------------------------------------ costs, start
@pytest.mark.parametrize("objective, gated, image_pool", [
    *((name, name == "genlip", "attention") for name in ALL), ("lit", False, "grid")])
def test_flops_are_those_of_the_traced_program(objective, gated, image_pool):
    model, loss = make_model(objective), train.objective_loss(objective)
    model = model._replace(keep_ratio=0.5, image_pool=image_pool, num_patches=N)
    model = model._replace(encoder=dataclasses.replace(model.encoder, gated_attention=gated))
    mapped = jax.vmap(lambda params, batch, keys: loss(params, batch, keys, model),
                      (None, 0, 0), axis_name="devices")
    arguments = jax.tree.map(lambda x: x[None], (make_batch(), KEYS))
    counted = matmul_flops(mapped, make_params(model), *arguments)
    # The scores of a contrastive batch are left out of the formula.
    width = lit.NUM_DIRECTIONS if image_pool == "grid" else DEC.width
    scores = {"clip": 4, "siglip": 2, "lit": 4, "openvision": 8}.get(objective, 0) * B * width
    formula = sum(registry.flops(model, RESOLUTION, T).values())
    assert counted / B == pytest.approx(formula + scores, rel=1e-6)


def test_only_the_method_drops_patch_tokens():
    for objective in ALL:
        model = registry.ModelSpec(ENC, DEC, 0.35, objective)
        kept = masking.num_kept_tokens(100, 0.35) if objective == registry.METHOD else 100
        assert registry.num_decoder_tokens(model, 100) == kept


@pytest.mark.parametrize("objective", registry.OTHER_OBJECTIVES)
def test_dry_run_prints_the_cost_of_each_part(objective, capsys):
    needs = {"openvision": ["--alt-field", "org_caption"], "lit": ["--init-encoder", "runs/l14"]}
    flags = ["--objective", objective, *needs.get(objective, []), "--dry-run"]
    assert train.main(["l14", *flags]) == 0
    text = capsys.readouterr().out
    assert "encoder 302.9 M" in text and "256 kept" in text
    assert ("text 110.3 M" in text) == (objective in registry.CONTRASTIVE)
    assert ("pool 10.5 M" in text) == (objective == "lit")


def test_the_method_draws_its_parameters_from_the_keys_of_their_domain():
    cfg = config.RECIPES["toy"]
    model = registry.model_spec(cfg)
    assert (model.keep_ratio, model.objective, model.max_text_len) == (0.35, registry.METHOD, 28)
    params = registry.init_params(cfg, model)
    key = jax.random.fold_in(jax.random.key(0), 1 << 31)
    expected = {"encoder": vit.init(jax.random.fold_in(key, 0), model.encoder),
                "decoder": decoder.init(jax.random.fold_in(key, 1), model.decoder)}
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, expected))


def test_blind_losses():
    nats, tokens = np.array([4.0, 12.0]), np.array([4, 8])
    images = np.array([3, 4])[:, None, None] + np.arange(36).reshape(9, 4)
    facts = registry.BlindFacts([3, 1], nats, tokens, lambda: images)
    matching = 3 * math.log(3) / 4  # the fourth image is alone in its batch: no other caption
    assert registry.blind_loss("clip", facts) == pytest.approx(matching)
    assert registry.blind_loss("cappa", facts) == pytest.approx(16 / 12)
    assert registry.blind_loss("genlip", facts) == pytest.approx(16 / 12)
    # SigLIP: 9 pairs of which 3 match, then one that is known to match
    of_nine = -3 * math.log(1 / 3) - 6 * math.log(2 / 3)
    assert registry.blind_loss("siglip", facts) == pytest.approx(of_nine / 4)
    assert registry.blind_loss(registry.METHOD, facts) == pytest.approx(16 / 12)
    assert registry.blind_loss("openvision", facts) == pytest.approx(2 * 16 / 12 + matching)
    assert registry.blind_loss("aimv2", facts) == pytest.approx(1.25 + 0.4 * 0.25)
    unknown = registry.BlindFacts([3, 1], None, None, lambda: np.zeros(1))
    assert registry.blind_loss("aimv2", unknown) is None


# ---------------------------------------------------------------------------------- devices
def save_gradients(path: str) -> None:
    """Loss and gradients of the contrastive objectives (in the others no image depends on another)
    on one device, and on eight or two (--zero1). With plain SGD the update is the gradient."""
    learning_rate, arrays = 0.05, {}
    batch = {name: np.concatenate([x, x[::-1]]) for name, x in make_batch().items()}
    batch["images"][B:] = 255 - batch["images"][:B]
    batch["position"] = np.arange(2 * B)
    cases = {"clip": (8, False), "siglip": (8, False), "lit": (8, False), "openvision": (2, True)}
    for objective, (num_devices, zero1) in cases.items():
        model, sgd = make_model(objective), optax.sgd(learning_rate)
        start = make_params(model)
        for name, n, shard in (("one", 1, False), ("several", num_devices, zero1)):
            parallel = devices.DataParallel(n)
            step = train.make_step(model, sgd, 0, 1, parallel.pmap_devices, shard)
            state = [parallel.replicate(tree) for tree in (start, sgd.init(start))]
            params, _, metrics = step(*state, parallel.shard_batch(batch))
            arrays[f"{objective} loss {name}"] = parallel.unreplicate(metrics["loss"])
            pairs = zip(jax.tree.leaves(start), jax.tree.leaves(parallel.unreplicate(params)))
            for i, (before, after) in enumerate(pairs):
                arrays[f"{objective} {i} {name}"] = (np.asarray(before) - after) / learning_rate
    np.savez(path, **arrays)


def test_the_number_of_devices_changes_no_loss_and_no_gradient(tmp_path, cache):
    code = f"from {__name__} import save_gradients; import sys; save_gradients(sys.argv[1])"
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out.npz")], cwd=ROOT,
                             env=several_devices(8, cache), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    arrays = np.load(tmp_path / "out.npz")
    names = [name.removesuffix(" one") for name in arrays.files if name.endswith(" one")]
    for objective in registry.CONTRASTIVE:
        assert sum(name.startswith(f"{objective} ") for name in names) > 25
    for name in names:
        one, several = arrays[f"{name} one"], arrays[f"{name} several"]
        assert np.linalg.norm(several - one) <= 1e-5 * np.linalg.norm(one) + 1e-5, name


# --------------------------------------------------------------------------- settings, a run
GRID = ("--objective", "lit", "--init-encoder", "random", "--image-pool", "grid")
ONE_STAGE = ("--stages", "resolution=32 steps=2 batch=8 lr=1e-3")


@pytest.mark.parametrize("argv, message", [
    (["--objective", "clip", "--grad-accum", "2"], "--grad-accum 2 would part: leave it at 1"),
    (["--objective", "openvision", "--alt-field", "web", "--grad-accum", "2"],
     "--grad-accum 2 would part: leave it at 1"),
    (["--objective", "openvision"], "name its field with --alt-field"),
    (["--objective", "clip", "--alt-field", "web"],
     "--alt-field web is read by --objective openvision alone"),
    (["--objective", "lit"], "name its run with --init-encoder"),
    ([*GRID, "--feature-copies", "2"], "need one resolution, not 24 and 32"),
    ([*GRID, "--min-crop-area", "0.5", *ONE_STAGE], "set --feature-copies 16"),
    ([*GRID, "--feature-copies", "2", *ONE_STAGE], "and --min-crop-area below 1 or --jitter"),
    ([*GRID, "--feature-copies", "2", "--jitter", "0.1", "--encoder", "Ti/4", *ONE_STAGE],
     "has 12,288 numbers in its patch tokens, and at most 8,192 are allowed"),
    (["--objective", "aimv2", "--encoder", "micro/8",
      "--stages", "resolution=8 steps=2 batch=8 lr=1e-3"], "needs a resolution of 16 or more")])
def test_impossible_settings_are_refused(argv, message, capsys):
    assert train.main([*argv, "--dry-run"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["clip", "openvision", "genlip"])  # the last two caption
def test_a_run_from_training_to_the_use_of_its_encoder(objective, tmp_path, capsys):
    folder = tmp_path / objective
    argv = [*TINY, "--workdir", str(folder)]
    own = [*ALT_FIELD.get(objective, []), "--objective", objective]
    assert train.main([*argv, *own]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert np.isfinite(summary["val_loss"]) and summary["val_loss_blind"] > 0
    assert ("object_accuracy" in summary) == registry.can_caption(objective)
    assert (folder / "samples.png").exists() and (folder / "curve.png").exists()
    capsys.readouterr()
    assert train.main([*argv, *own]) == 0 and "is finished" in capsys.readouterr().out
    outputs = load_encoder(str(folder))([np.zeros((16, 16, 3), np.uint8)])
    assert outputs.tokens.shape == (1, 4, 96)
    assert caption.main([str(folder), "x.png"]) == 1
    assert f"--objective {objective}" in capsys.readouterr().err
    assert train.main([*argv, "--objective", registry.METHOD]) == 1
    assert f"was '{objective}'" in capsys.readouterr().err
