"""The numbers of docs/fidelity.md: what the paper's recipes have in common with the release."""
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bench
import caption
import decoder
import layers
import masking
import train
import vit
from config import RECIPES, Config
from inputs import images, tokenizer
from objectives import registry
from runtime import checkpoint, curriculum
from tests.helpers.runs import SMALL_RUN, STAGE

PAPER = ("ti16", "s16", "b16", "l14", "so400m14", "h14", "g14")
EPOCH = 1_281_167


@pytest.mark.parametrize("name", PAPER)
def test_stages_are_the_released_ones(name):
    """Steps and warm-up are images // batch."""
    low, high = curriculum.parse_stages(RECIPES[name].stages)
    assert (low.batch, low.steps, low.warmup) == (32_768, 390_981, 1_563)
    assert (high.batch, high.steps, high.warmup) == (16_384, 62_556, 1_563)
    assert (low.resolution, high.resolution) == (160 if name in ("ti16", "s16", "b16") else 84, 224)


def test_images_that_do_not_fill_a_batch_are_left_out():
    text = "resolution=32 images=799 batch=100 lr=1e-3 warmup=199"
    [stage] = curriculum.parse_stages(text)
    assert (stage.steps, stage.warmup) == (7, 1)
    [short] = curriculum.parse_stages("resolution=32 images=99 batch=100 lr=1e-3")
    assert (short.steps, short.warmup) == (1, 0)


@pytest.mark.parametrize("number,peak,images,warmup,batch", [
    (0, 8e-6 * 64 * 2, 10_000 * EPOCH, 40 * EPOCH, 32_768),
    (1, 4e-7 * 64, 800 * EPOCH, 20 * EPOCH, 16_384),
])
def test_learning_rate_at_ten_points(number, peak, images, warmup, batch):
    """Against the closed formula: a line to the peak, then half a cosine to 0."""
    stage = curriculum.parse_stages(RECIPES["l14"].stages)[number]
    steps, warm = images // batch, warmup // batch
    rate = curriculum.lr_schedule(stage)
    points = [0, 1, warm // 2, warm - 1, warm, warm + 1, steps // 4, steps // 2, steps - 1, steps]
    for step in points:
        progress = min(max((step - warm) / (steps - warm), 0), 1)
        expected = peak * min(step / warm, 1) * (1 + math.cos(math.pi * progress)) / 2
        assert float(rate(step)) == pytest.approx(expected, rel=2e-5, abs=1e-7 * peak), step
        logged = curriculum.learning_rate(stage, step)
        assert logged == pytest.approx(expected, rel=2e-5, abs=1e-7 * peak), step


def small(**changes) -> Config:
    """The l14 recipe with networks that a test can hold."""
    settings = {"encoder": "Ti/16", "decoder": "Ti", "vocab_size": 1000, "cls_token": True}
    return dataclasses.replace(RECIPES["l14"], **settings, **changes)


@pytest.fixture(scope="module")
def released() -> dict[str, np.ndarray]:
    cfg = small()
    flat = checkpoint.flatten(registry.init_params(cfg, registry.model_spec(cfg)))
    return {name: np.asarray(array) for name, array in flat.items()}


def test_dtypes_and_decays_of_adams_moments():
    """For a gradient g: first moment 0.1 g in bfloat16, second 0.05 g squared in float32."""
    cfg = RECIPES["l14"]
    params = {"kernel": jnp.ones((2, 2))}
    optimizer = train.make_optimizer(cfg, curriculum.parse_stages(cfg.stages)[0])
    _, state = optimizer.update({"kernel": jnp.full((2, 2), 8.0)}, optimizer.init(params), params)
    mu, nu = optax.tree.get(state, "mu")["kernel"], optax.tree.get(state, "nu")["kernel"]
    assert mu.dtype == jnp.bfloat16 and nu.dtype == jnp.float32 and cfg.grad_clip == 0
    np.testing.assert_allclose(mu.astype(np.float32), 0.8, rtol=1e-2)
    np.testing.assert_allclose(nu, 0.05 * 64, rtol=1e-6)


def test_only_kernels_decay():
    """A step subtracts lr x 0.2 of each kernel, and nothing of biases, norms, token table, CLS."""
    cfg = small()
    stage = curriculum.parse_stages(cfg.stages)[0]
    at_peak = dataclasses.replace(stage, warmup=0)
    shapes = jax.eval_shape(lambda: registry.init_params(cfg, registry.model_spec(cfg)))
    optimizer = train.make_optimizer(cfg, at_peak)

    @jax.jit
    def update(params):
        no_gradient = jax.tree.map(jnp.zeros_like, params)
        return optimizer.update(no_gradient, optimizer.init(params), params)[0]
    updates = update(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes))
    decayed = {name for name, u in checkpoint.flatten(updates).items() if np.asarray(u).any()}
    expected = {"encoder/patch/kernel", "decoder/project/kernel", "decoder/head/kernel"}
    for layer in ("qkv", "out", "fc1", "fc2"):
        expected |= {f"encoder/blocks/{layer}/kernel", f"decoder/blocks/{layer}/kernel"}
    assert decayed == expected
    for name in decayed:
        np.testing.assert_allclose(checkpoint.flatten(updates)[name], -stage.lr * 0.2, rtol=1e-5)


@pytest.mark.parametrize("pixels,patch,patches,kept", [
    (84, 14, 36, 12), (224, 14, 256, 89), (384, 14, 729, 255),
    (160, 16, 100, 35), (224, 16, 196, 68), (384, 16, 576, 201),
])
def test_numbers_of_kept_tokens(pixels, patch, patches, kept):
    assert (pixels // patch) ** 2 == patches
    kept_here = masking.num_kept_tokens(patches, RECIPES["l14"].keep_ratio)
    assert kept_here == kept == int(patches * 0.35)


@pytest.mark.parametrize("name", [*PAPER, "toy", "images"])
def test_order_of_the_kept_tokens(name):
    """The paper's recipes keep the order of the draw; the small ones sort."""
    model = registry.model_spec(RECIPES[name])
    tokens = jnp.broadcast_to(jnp.arange(36.0)[None, :, None], (64, 36, 1))
    keys = jax.random.split(jax.random.key(0), 64)
    kept, _ = masking.keep_random_tokens(keys, tokens, model.keep_ratio, model.shuffle_kept)
    in_order = np.mean(np.diff(np.asarray(kept)[..., 0], axis=1) > 0)
    assert 0.4 < in_order < 0.6 if name in PAPER else in_order == 1


def released_stds(width: int = 192) -> dict[str, tuple[str, float]]:
    """(law, standard deviation) of the weights of Ti/16 with decoder Ti: both are 192 wide."""
    deep = width**-0.5 * (2 * 12) ** -0.5
    return {
        "encoder/patch/kernel": ("uniform", math.sqrt(2 / (16 * 16 * 3))),
        "encoder/cls/embedding": ("normal", 1e-6),
        "encoder/blocks/qkv/kernel": ("normal", 0.02),
        "encoder/blocks/out/kernel": ("normal", 0.02),
        "encoder/blocks/fc1/kernel": ("normal", 0.02),
        "encoder/blocks/fc2/kernel": ("truncated", 0.04),
        "decoder/embed/embedding": ("normal", 0.02),
        "decoder/project/kernel": ("normal", width**-0.5),
        "decoder/blocks/qkv/kernel": ("normal", width**-0.5),
        "decoder/blocks/out/kernel": ("normal", deep),
        "decoder/blocks/fc1/kernel": ("normal", (2 * width) ** -0.5),
        "decoder/blocks/fc2/kernel": ("normal", deep),
        "decoder/head/kernel": ("normal", width**-0.5),
    }


def test_initial_weights_have_the_released_distributions(released):
    expected = released_stds()
    bounds = {"uniform": 3**0.5, "truncated": 2 / 0.87962566}  # in standard deviations
    for name, array in released.items():
        if name not in expected:
            assert (array == (1 if name.endswith("scale") else 0)).all(), name
            continue
        law, std = expected[name]
        is_small = name == "encoder/cls/embedding"  # 192 numbers
        assert array.dtype == np.float32
        assert array.std() == pytest.approx(std, rel=0.2 if is_small else 0.01), name
        largest = np.abs(array).max() / std
        if law != "normal":
            assert 0.99 * bounds[law] < largest <= bounds[law] + 1e-5, name
        elif not is_small:
            assert largest > 3.5, name
    assert set(expected) <= set(released)


def test_fc2_of_the_encoder_follows_its_width():
    """0.04 at width 192, 0.0173 at 1024."""
    specs = layers.with_init_scales(vit.param_specs(vit.vit_config("L/14")), vit.RELEASED_INIT)
    assert specs["blocks"]["fc2"]["kernel"].std == pytest.approx(math.sqrt(0.3072 / 1024))


def test_scales_of_a_deep_decoder_use_depth_12():
    specs = decoder.param_specs(decoder.decoder_config("H", 100, 1280))
    specs = layers.with_init_scales(specs, decoder.RELEASED_INIT)
    assert specs["blocks"]["out"]["kernel"].std == pytest.approx((24 * 1024) ** -0.5)
    assert specs["blocks"]["fc2"]["kernel"].std == pytest.approx((24 * 1024) ** -0.5)
    assert specs["project"]["kernel"].std == pytest.approx(1280**-0.5)


@pytest.mark.parametrize("name", [*PAPER, "toy", "images"])
def test_init_scale_of_each_recipe(name):
    assert RECIPES[name].init_scale == ("released" if name in PAPER else "xavier")


def test_xavier_scales():
    cfg = small(init_scale="xavier")
    params = checkpoint.flatten(registry.init_params(cfg, registry.model_spec(cfg)))
    assert float(params["encoder/blocks/qkv/kernel"].std()) == pytest.approx(192**-0.5, rel=0.01)
    assert float(params["decoder/embed/embedding"].std()) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("objective", ["clip", "openvision", "cappa", "aimv2"])
def test_other_objectives_start_with_the_released_scales_too(objective):
    cfg = small(objective=objective, alt_field="web" if objective == "openvision" else "")
    params = checkpoint.flatten(registry.init_params(cfg, registry.model_spec(cfg)))
    assert float(params["encoder/blocks/qkv/kernel"].std()) == pytest.approx(0.02, rel=0.01)
    out = params[f"{'text' if objective == 'clip' else 'decoder'}/blocks/out/kernel"]
    assert float(out.std()) == pytest.approx((24 * 192) ** -0.5, rel=0.01)


def test_a_checkpoint_without_init_scale_has_xavier(tmp_path, capsys):
    """It is older than that setting. Such a run cannot continue with another one."""
    folder = str(tmp_path / "run")
    argv = [*SMALL_RUN, "--stages", STAGE, "--workdir", folder]
    assert train.main(argv) == 0
    [(_, path)] = checkpoint.steps(folder)
    arrays, meta = checkpoint.load(path)
    del meta["config"]["init_scale"]
    checkpoint.save(path, arrays, meta)
    assert caption.load_run_checkpoint(folder)[0].init_scale == "xavier"
    assert train.main(argv) == 0
    assert train.main([*argv, "--init-scale", "released"]) == 1
    assert "--init-scale is 'released', was 'xavier'" in capsys.readouterr().err


@pytest.mark.parametrize("name,size", [
    ("ti16", (12, 192, 3, 768)), ("s16", (12, 384, 6, 1536)), ("b16", (12, 512, 8, 2048)),
    ("l14", (12, 768, 12, 3072)), ("so400m14", (27, 1152, 16, 4304)),
    ("h14", (24, 1024, 16, 4096)), ("g14", (24, 1024, 16, 4096)),
])
def test_decoders(name, size):
    cfg = registry.model_spec(RECIPES[name]).decoder
    assert (cfg.depth, cfg.width, cfg.num_heads, cfg.mlp_dim) == size
    assert cfg.vocab_size == 32_000 and cfg.prefix_attention == "causal" and not cfg.text_pos_embed


@pytest.mark.parametrize("argv,paper,within", [
    (["so400m14", "--resolution", "384"], 1017.7, 0.01),
    (["--encoder", "So400m/14", "--resolution", "384"], 1017.7, 0.01),
    (["l14", "--resolution", "224"], 208.9, 0.015),
])
def test_flops_are_the_papers(argv, paper, within, tmp_path):
    """Table 3: per image, forward."""
    assert bench.main(["flops", *argv, "--json", str(tmp_path / "flops.json")]) == 0
    [row] = json.loads((tmp_path / "flops.json").read_text())["rows"]
    assert row["total GFLOPs"] == pytest.approx(paper, rel=within)


def test_the_flops_table_has_the_papers_figures(tmp_path):
    assert bench.main(["flops", "--json", str(tmp_path / "flops.json")]) == 0
    rows = json.loads((tmp_path / "flops.json").read_text())["rows"]
    shown = [(row["encoder"], row["decoder"], row["px"], row["paper GFLOPs"])
             for row in rows if row["paper GFLOPs"]]
    assert shown == [("L/14", "L", 224, 208.9), ("So400m/14", "So400m", 384, 1017.7)]


def test_layer_norm_adds_1e_6_to_the_variance():
    x = jnp.array([[1e-3, -1e-3]])
    normalized = layers.layer_norm(x, {"scale": jnp.ones(2), "bias": jnp.zeros(2)})
    np.testing.assert_allclose(normalized, [[0.5**0.5, -(0.5**0.5)]], rtol=1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_gelu_is_erf_in_the_encoder_and_tanh_in_the_decoder(exact):
    x = np.linspace(-3, 3, 61)
    erf = [v * (1 + math.erf(v / 2**0.5)) / 2 for v in x]
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    tanh = x * (1 + np.tanh(inner)) / 2
    assert np.abs(np.subtract(erf, tanh)).max() > 3e-4
    identity = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
    y = layers.gelu_linear(jnp.asarray(x, jnp.float32)[:, None], identity, exact)
    np.testing.assert_allclose(y[:, 0], erf if exact else tanh, atol=2e-5)


def test_crops_have_the_released_areas_and_aspects():
    """Area 0.4 to 1 of the image and aspect 3/4 to 4/3, up to both ends."""
    rng, min_area = np.random.default_rng(0), RECIPES["l14"].min_crop_area
    boxes = np.array([images.random_crop_box(1000, 1000, min_area, rng) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = width * height / 1e6, width / height
    assert 0.4 - 1e-9 <= area.min() < 0.405 and 0.98 < area.max() <= 1 + 1e-9
    assert 3 / 4 - 1e-9 <= aspect.min() < 0.755 and 1.325 < aspect.max() <= 4 / 3 + 1e-9
    assert boxes.min() >= 0 and boxes.max() <= 1000 + 1e-9


def test_a_long_caption_keeps_126_tokens_and_its_end():
    """One more than as released, where nothing reads the last of the 128 positions."""
    length = RECIPES["l14"].max_text_len
    tok = tokenizer.WordPiece(["[PAD]", "[bos]", "[eos]", "[UNK]", "a"])
    text = tok.encode("a " * 300, length)
    assert length == 128 and (text[0], text[-1]) == (1, 2)
    assert len(text[1:-1]) == 126 and (text[1:-1] == 4).all()
    assert int(decoder.count_targets(jnp.asarray(text)[None])[0]) == 127


def test_pixels_are_normalized_with_imagenets_statistics():
    pixels = np.asarray(vit.normalize(jnp.array([[0, 0, 0], [255, 255, 255]], jnp.uint8)))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(pixels, [(0 - mean) / std, (1 - mean) / std], rtol=1e-5)


@pytest.mark.parametrize("name", PAPER)
def test_other_settings(name):
    cfg = RECIPES[name]
    assert (cfg.keep_ratio, cfg.adam_b2, cfg.weight_decay, cfg.grad_clip) == (0.35, 0.95, 0.2, 0)
    assert (cfg.min_crop_area, cfg.hflip, cfg.grayscale_prob) == (0.4, False, 0.2)
    assert (cfg.jitter, cfg.hue, images.JITTER_PROB) == (0.32, 0.08, 0.8)
    assert (cfg.max_text_len, cfg.vocab_size, cfg.mu_dtype) == (128, 32_000, "bfloat16")
