"""Encoder, mask and decoder by their properties. Parity with PyTorch is in tests/parity."""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoder
import layers
import masking
import vit
from tests.helpers.models import matmul_flops, shaken

ENC = vit.ViTConfig(depth=2, width=32, num_heads=2, mlp_dim=64, patch_size=8)
DEC = decoder.DecoderConfig(depth=2, width=32, num_heads=2, mlp_dim=64, vocab_size=50, image_width=32)


def images(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


@pytest.mark.parametrize("name,millions", [("Ti/16", 5.5), ("S/16", 21.6), ("B/16", 85.6), ("L/14", 303), ("So400m/14", 412), ("H/14", 631), ("g/14", 1011)])
def test_family_has_the_papers_sizes(name, millions):
    assert layers.count_params(vit.param_specs(vit.vit_config(name))) / 1e6 == pytest.approx(millions, rel=0.003)


@pytest.mark.parametrize("name", ["X/16", "L", "L/", "L/0", "L/-1", "L/a", "/14", ""])
def test_unknown_encoder_is_refused(name):
    with pytest.raises(ValueError, match="SIZE/PATCH"):
        vit.vit_config(name)


def test_any_patch_size_goes():
    assert vit.vit_config("S/8").patch_size == 8 and vit.vit_config("S/8").width == 384


def test_declared_weights_are_what_init_makes():
    for cls in (False, True):
        cfg = dataclasses.replace(ENC, cls_token=cls)
        params = vit.init(jax.random.key(0), cfg)
        declared = vit.param_specs(cfg)
        assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda w: w.shape, declared, is_leaf=layers.is_spec)
        assert sum(x.size for x in jax.tree.leaves(params)) == layers.count_params(declared)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


def test_a_new_weight_disturbs_no_other():
    plain, with_cls = (vit.init(jax.random.key(3), dataclasses.replace(ENC, cls_token=c)) for c in (False, True))
    del with_cls["cls"]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), plain, with_cls))


@pytest.mark.parametrize("cls", [False, True])
def test_named_outputs_and_their_shapes(cls):
    cfg = dataclasses.replace(ENC, cls_token=cls)
    params = shaken(vit.init(jax.random.key(0), cfg))
    out = vit.vit(params, images(3, 32), cfg, attention=True)
    S = 16 + cls
    assert {k: v.shape for k, v in out.items()} == {"tokens": (3, 16, 32), "pooled": (3, 32), "attention": (2, 3, 2, S, S)} | ({"cls": (3, 32)} if cls else {})
    np.testing.assert_allclose(out["attention"].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(out["pooled"], layers.layer_norm(out["tokens"].mean(1), params["norm"]), rtol=1e-5)
    assert "attention" not in vit.vit(params, images(1, 32), cfg)


def test_bytes_and_normalised_floats_are_the_same_picture():
    params, pictures = vit.init(jax.random.key(0), ENC), images(2, 16)
    by_hand = (pictures / 255.0 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    a, b = (vit.vit(params, x, ENC)["tokens"] for x in (pictures, by_hand.astype(np.float32)))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_position_table_by_the_formula_at_any_grid():
    for grid, width in ((2, 8), (6, 96), (16, 1024)):
        table = vit.sincos_position_embedding(grid, width)
        for n in range(0, grid * grid, 5):
            y, x, quarter = n // grid, n % grid, width // 4
            for i in range(0, quarter, 3):
                w = 10000 ** (-i / (quarter - 1))
                expect = math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)
                np.testing.assert_allclose([table[n, i + k * quarter] for k in range(4)], expect, atol=1e-6)
        assert len(np.unique(table.round(5), axis=0)) == grid * grid  # no two patches share a place


def test_resolution_changes_without_surgery_and_bad_ones_are_refused():
    params = vit.init(jax.random.key(0), ENC)
    for side in (8, 24, 64):
        assert vit.vit(params, images(1, side), ENC)["tokens"].shape == (1, (side // 8) ** 2, 32)
    with pytest.raises(ValueError, match="below the patch size"):
        vit.vit(params, images(1, 4), ENC)
    odd = images(1, 20)  # as a convolution does, the last 4 px fill no patch
    np.testing.assert_array_equal(vit.vit(params, odd, ENC)["tokens"], vit.vit(params, odd[:, :16, :16], ENC)["tokens"])


@pytest.mark.parametrize("change", [{"remat": "dots"}, {"remat": "block"}, {"scan_unroll": 2}])
def test_choices_of_memory_and_speed_change_no_number(change):
    params, pictures = shaken(vit.init(jax.random.key(0), ENC)), images(2, 32)
    def loss(params, cfg):
        return jnp.square(vit.vit(params, pictures, cfg)["tokens"]).mean()
    (a, da), (b, db) = (jax.value_and_grad(loss)(params, cfg) for cfg in (ENC, dataclasses.replace(ENC, **change)))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), da, db)


def plain_attend(q, k, v, mask):
    scores = jnp.einsum("bqhd,bshd->bhqs", q, k) / math.sqrt(q.shape[-1])
    looks = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqs,bshd->bqhd", looks, v), looks


def plain_norm_affine(x, scale, shift, kernel, bias):
    unit = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + layers.LAYER_NORM_EPS)
    return (unit * scale + shift) @ kernel + bias


CASES = {  # ours, the same in plain JAX, shapes of what is differentiated
    "affine": (layers.affine, lambda x, w, b: x @ w + b, [(2, 3, 4), (4, 5), (5,)]),
    "norm_affine": (layers.norm_affine, plain_norm_affine, [(2, 3, 8), (8,), (8,), (8, 5), (5,)]),
    "exact gelu": (lambda x, w, b: layers.gelu_affine(x, w, b, True), lambda x, w, b: jax.nn.gelu(x, approximate=False) @ w + b, [(2, 3, 8), (8, 5), (5,)]),
    "tanh gelu": (lambda x, w, b: layers.gelu_affine(x, w, b, False), lambda x, w, b: jax.nn.gelu(x, approximate=True) @ w + b, [(2, 3, 8), (8, 5), (5,)]),
    "attend": (lambda q, k, v: layers.dot_product_attention(q, k, v, None), lambda q, k, v: plain_attend(q, k, v, None), [(2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4)]),
    "masked": (lambda *qkv: layers.dot_product_attention(*qkv, jnp.tri(4, dtype=bool)), lambda *qkv: plain_attend(*qkv, jnp.tri(4, dtype=bool)), [(2, 4, 2, 8)] * 3),
}


@pytest.mark.parametrize("case", CASES)
def test_handwritten_gradients_are_autodiffs(case):
    """Values and gradients, of every output: ours in fp32 against plain JAX in double precision."""
    ours, plain, shapes = CASES[case]
    inputs = [np.asarray(jax.random.normal(jax.random.key(i), s)) for i, s in enumerate(shapes)]

    def found(f, inputs):
        def loss(*args):
            out = jax.tree.leaves(f(*args))
            return sum(jnp.sin(o + i).sum() for i, o in enumerate(out)), out
        grads, out = jax.grad(loss, tuple(range(len(shapes))), has_aux=True)(*inputs)
        return [np.asarray(x) for x in (*out, *grads)]
    single = found(ours, inputs)
    with jax.enable_x64(True):
        double = found(plain, [x.astype(np.float64) for x in inputs])
    for x, y in zip(single, double, strict=True):
        assert np.linalg.norm(x - y) < 1e-6 * np.linalg.norm(y)


@pytest.mark.parametrize("case", CASES)
def test_gradients_take_the_bytes_of_what_they_are_of(case):
    """A gradient in fp32 of a weight in bf16 would take twice the memory of a whole stack of layers."""
    ours, _, shapes = CASES[case]
    inputs = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
    inputs[1:3] = [jax.ShapeDtypeStruct(s, jnp.float32 if case == "norm_affine" else jnp.bfloat16) for s in shapes[1:3]]  # a norm's own weights
    grads = jax.eval_shape(jax.grad(lambda *args: jax.tree.leaves(ours(*args))[0].sum(), tuple(range(len(shapes)))), *inputs)
    assert [g.dtype for g in grads] == [i.dtype for i in inputs]


def test_bfloat16_compute_keeps_fp32_parameters_and_comes_near():
    params, pictures = vit.init(jax.random.key(0), ENC), images(4, 32)
    exact, rough = (vit.vit(params, pictures, dataclasses.replace(ENC, dtype=d))["tokens"] for d in ("float32", "bfloat16"))
    assert rough.dtype == jnp.bfloat16
    assert 0 < float(jnp.linalg.norm(exact - rough.astype(jnp.float32)) / jnp.linalg.norm(exact)) < 0.03


def test_flops_formula_against_a_count_of_the_traced_matmuls():
    for cls in (False, True):
        cfg = dataclasses.replace(ENC, cls_token=cls)
        counted = matmul_flops(lambda p, x: vit.vit(p, x, cfg)["tokens"], vit.init(jax.random.key(0), cfg), images(1, 48))
        assert counted == vit.flops(cfg, 48)
    params, text = decoder.init(jax.random.key(0), DEC), np.ones((1, 13), np.int32)
    assert matmul_flops(lambda p, x, t: decoder.caption_loss(p, x, t, DEC), params, np.ones((1, 5, 32), np.float32), text) == decoder.flops(DEC, 5, 12)


def test_l14_costs_what_the_paper_says():
    both = vit.flops(vit.vit_config("L/14"), 224) + decoder.flops(decoder.decoder_config("L", 32000, 1024), masking.num_kept_tokens(256, 0.35), 127)
    assert both / 1e9 == pytest.approx(208.9, rel=0.02)  # Table 3


@pytest.mark.parametrize("n,ratio", [(1, 0.35), (2, 0.1), (16, 0.35), (256, 0.35), (100, 0.9), (36, 1.0)])
def test_exactly_k_distinct_patches_in_picture_order(n, ratio):
    k = masking.num_kept_tokens(n, ratio)
    assert k == max(1, int(n * ratio))
    chosen = np.asarray(jax.jit(masking.sample_keep_indices, static_argnums=(1, 2))(jax.random.split(jax.random.key(0), 200), n, k))
    assert chosen.shape == (200, k) and chosen.dtype == np.int32 and chosen.min() >= 0 and chosen.max() < n
    assert (np.diff(chosen, axis=1) > 0).all()


def test_kept_patches_are_uniform():
    """Chi-square over all 20 subsets of 3 out of 6, and over single patches; 99.99% bounds."""
    chosen = np.asarray(masking.sample_keep_indices(jax.random.split(jax.random.key(1), 20_000), 6, 3))
    _, counts = np.unique(chosen @ [36, 6, 1], return_counts=True)
    assert len(counts) == 20 and ((counts - 1000) ** 2 / 1000).sum() < 52.4  # 19 degrees of freedom
    singles = np.bincount(chosen.ravel(), minlength=6)
    assert ((singles - 10_000) ** 2 / 10_000).sum() < 25.7


def test_shuffled_patches_come_in_every_order_alike():
    """Chi-square over the 6 x 5 x 4 orders of 3 out of 6; 99.99% bound for 119 degrees of freedom."""
    chosen = np.asarray(masking.sample_keep_indices(jax.random.split(jax.random.key(1), 20_000), 6, 3, True))
    _, counts = np.unique(chosen @ [36, 6, 1], return_counts=True)
    assert len(counts) == 120 and ((counts - 20_000 / 120) ** 2 * 120 / 20_000).sum() < 183
    ordered = masking.sample_keep_indices(jax.random.split(jax.random.key(1), 20_000), 6, 3)
    assert (np.sort(chosen, axis=1) == ordered).all()  # the same patches: only their order differs


def test_kept_tokens_are_those_of_the_indices_whatever_the_batch():
    tokens, keys = jax.random.normal(jax.random.key(0), (5, 12, 3)), jax.random.split(jax.random.key(7), 5)
    kept, chosen = masking.keep_random_tokens(keys, tokens, 0.35)
    for b in range(5):
        np.testing.assert_array_equal(kept[b], tokens[b, chosen[b]])
        np.testing.assert_array_equal(masking.keep_random_tokens(keys[b:b + 1], tokens[b:b + 1], 0.35)[1][0], chosen[b])
    assert (masking.keep_random_tokens(keys, tokens, 1.0)[0] == tokens).all()


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_impossible_keep_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="keep_ratio"):
        masking.num_kept_tokens(16, ratio)


def decoder_case(prefix: str = "causal", K: int = 4, T: int = 9, **change):
    cfg = dataclasses.replace(DEC, prefix_attention=prefix, **change)
    params = shaken(decoder.init(jax.random.key(0), cfg))
    image = jax.random.normal(jax.random.key(1), (3, K, 32))
    text = np.random.default_rng(0).integers(3, 50, (3, T)).astype(np.int32)
    text[:, 0] = decoder.BOS
    return cfg, params, image, text


@pytest.mark.parametrize("prefix", ["causal", "bidirectional"])
def test_text_sees_the_whole_prefix_and_no_future(prefix):
    cfg, params, image, text = decoder_case(prefix)
    base = decoder.logits(params, image, text, cfg)
    for t in range(1, 9):
        changed = text.copy()
        changed[:, t] = (changed[:, t] + 1) % 40 + 3
        moved = np.abs(decoder.logits(params, image, changed, cfg) - base).max((0, 2))
        assert (moved[:t] == 0).all() and (moved[t:] > 0).all()
    for k in range(4):
        moved = np.abs(decoder.logits(params, image.at[:, k].add(1.0), text, cfg) - base).max((0, 2))
        assert (moved > 0).all()


def test_words_with_positions_differ_by_the_sin_cos_of_their_place():
    cfg, params, _, text = decoder_case(positions=True)
    added = decoder.embed_tokens(params, text, cfg) - params["embed"]["embedding"][text]
    place, D = np.arange(9)[:, None], cfg.width
    turn = place / 10000.0 ** (2 * np.arange(D // 2) / D)
    np.testing.assert_allclose(added, np.broadcast_to(np.concatenate([np.sin(turn), np.cos(turn)], 1), added.shape), atol=1e-5)
    np.testing.assert_allclose(decoder.embed_tokens(params, text[:, 4:5], cfg, 4), decoder.embed_tokens(params, text, cfg)[:, 4:5], atol=1e-6)


def test_prefix_option_is_about_image_tokens_alone():
    causal, both = (np.asarray(decoder.attention_mask(3, 7, p)) for p in ("causal", "bidirectional"))
    assert (causal == np.tril(np.ones((7, 7), bool))).all()
    assert both[:3, :3].all() and (both[3:] == causal[3:]).all() and not both[:3, 3:].any()
    with pytest.raises(ValueError, match="prefix"):
        decoder.decoder_config("Ti", 10, 10, prefix_attention="sideways")
    with pytest.raises(ValueError, match="unknown decoder"):
        decoder.decoder_config("XL", 10, 10)


def test_pads_are_no_targets_and_eos_is_one():
    cfg, params, image, text = decoder_case()
    text[:, 5], text[:, 6:] = decoder.EOS, decoder.PAD
    assert decoder.count_targets(text).tolist() == [5, 5, 5]
    longer = np.pad(text, ((0, 0), (0, 6)))
    a, b = (decoder.caption_loss(params, image, t, cfg) for t in (text, longer))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    p = jax.nn.log_softmax(decoder.logits(params, image, text[:, :-1], cfg))
    by_hand = [-sum(float(p[b, t, text[b, t + 1]]) for t in range(5)) for b in range(3)]
    np.testing.assert_allclose(a, by_hand, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 4, 8, 100])
def test_loss_in_pieces_is_the_loss(chunk):
    cfg, params, image, text = decoder_case()
    def loss(params, cfg):
        return decoder.caption_loss(params, image, text, cfg).sum()
    (a, da), (b, db) = (jax.value_and_grad(loss)(params, c) for c in (cfg, dataclasses.replace(cfg, loss_chunk=chunk)))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), da, db)


def test_whole_batch_of_logits_never_exists_in_pieces():
    def largest(chunk: int) -> int:
        cfg = dataclasses.replace(DEC, vocab=20_000, loss_chunk=chunk)
        params = jax.eval_shape(lambda: decoder.init(jax.random.key(0), cfg))
        shapes = (jax.ShapeDtypeStruct((8, 4, 32), jnp.float32), jax.ShapeDtypeStruct((8, 65), jnp.int32))
        grad = jax.jit(jax.grad(lambda p, x, t: decoder.caption_loss(p, x, t, cfg).sum()))
        return grad.lower(params, *shapes).compile().memory_analysis().temp_size_in_bytes
    batch = 8 * 64 * 20_000 * 4
    assert largest(4) < batch / 2 < batch < largest(0)


@pytest.mark.parametrize("prefix,positions", [("causal", False), ("bidirectional", False), ("causal", True)])
def test_cached_generation_is_the_uncached_forward(prefix, positions):
    cfg, params, image, _ = decoder_case(prefix, positions=positions)
    quick = np.asarray(jax.jit(lambda x: decoder.generate(params, x, cfg, 12))(image))
    slow = np.full((3, 1), decoder.BOS, np.int32)
    for _ in range(11):
        nxt = np.asarray(decoder.logits(params, image, slow, cfg)[:, -1].argmax(-1))
        done = (slow == decoder.EOS).any(1)
        slow = np.concatenate([slow, np.where(done, decoder.PAD, nxt)[:, None].astype(np.int32)], axis=1)
    np.testing.assert_array_equal(quick, slow)
    assert len(np.unique(quick[:, 1:])) > 2


def test_generation_ends_at_eos():
    cfg, params, image, _ = decoder_case()
    params["head"]["kernel"] = params["head"]["kernel"].at[:, decoder.EOS].set(params["norm"]["bias"] * 1e4)
    params["norm"]["scale"] = params["norm"]["scale"] * 0
    assert (np.asarray(decoder.generate(params, image, cfg, 6)) == [decoder.BOS, decoder.EOS, 0, 0, 0, 0]).all()


def test_top_p_draws_from_the_nucleus_in_proportion():
    scores = jnp.log(jnp.array([[0.5, 0.05, 0.3, 0.15]]))
    drawn = np.asarray(jax.vmap(lambda k: decoder.sample_top_p(k, scores, 0.75, 1.0))(jax.random.split(jax.random.key(0), 4000))).ravel()
    assert set(drawn.tolist()) == {0, 2}  # 0.5 + 0.3 hold 0.75; the rest is out
    assert abs((drawn == 0).mean() - 0.5 / 0.8) < 0.03
    assert (np.asarray(decoder.sample_top_p(jax.random.key(0), scores, 1e-6, 1.0)) == 0).all()
