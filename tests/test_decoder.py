"""The decoder by its properties: attention mask, positions, loss, generation and costs.
tests/parity compares it with PyTorch."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoder
import masking
import vit
from inputs import tokenizer
from tests.helpers.models import matmul_flops, noisy_params

CFG = decoder.DecoderConfig(depth=2, width=32, num_heads=2, mlp_dim=64, vocab_size=50,
                            image_width=32)
caption_logits = jax.jit(decoder.caption_logits, static_argnums=3)
caption_loss = jax.jit(decoder.caption_loss, static_argnums=3)


def example(prefix: str = "causal", K: int = 4, T: int = 9, **changes) -> tuple:
    """A config, its parameters, image tokens (3,K,32) and text (3,T)."""
    cfg = dataclasses.replace(CFG, prefix_attention=prefix, **changes)
    params = noisy_params(decoder.param_specs(cfg))
    rng = np.random.default_rng(0)
    image = rng.standard_normal((3, K, 32), np.float32)
    text = rng.integers(3, 50, (3, T)).astype(np.int32)
    text[:, 0] = decoder.BOS
    return cfg, params, image, text


def test_special_tokens_are_those_of_the_tokenizer():
    expected = (tokenizer.PAD, tokenizer.BOS, tokenizer.EOS)
    assert expected == (decoder.PAD, decoder.BOS, decoder.EOS)


def test_the_gradient_of_a_common_token_adds_up_in_fp32():
    """bfloat16 cannot add 1 to 256."""
    cfg, params, _, _ = example(dtype="bfloat16")
    text = np.full((4, 250), 7, np.int32)

    def total(params):
        return decoder.embed_tokens(params, text, cfg).astype(jnp.float32).sum()
    grads = jax.jit(jax.grad(total))(params)["embed"]["embedding"]
    assert grads.dtype == jnp.float32 and (grads[7] == 1000).all() and not grads[8].any()


@pytest.mark.parametrize("prefix", ["causal", "bidirectional"])
def test_text_depends_on_every_image_token_and_on_no_future_token(prefix):
    cfg, params, image, text = example(prefix)
    base = np.asarray(caption_logits(params, image, text, cfg))

    def largest_change(image, text):
        """(T,) over images and vocabulary."""
        return np.abs(caption_logits(params, image, text, cfg) - base).max((0, 2))
    for t in range(1, 9):
        changed_text = text.copy()
        changed_text[:, t] = (changed_text[:, t] + 1) % 40 + 3
        change = largest_change(image, changed_text)
        assert (change[:t] == 0).all() and (change[t:] > 0).all()
    for k in range(4):
        changed_image = image + (np.arange(4) == k)[:, None]
        assert (largest_change(changed_image.astype(np.float32), text) > 0).all()


def test_prefix_attention_changes_the_mask_of_image_tokens_only():
    causal = np.asarray(decoder.attention_mask(3, 7, "causal"))
    bidirectional = np.asarray(decoder.attention_mask(3, 7, "bidirectional"))
    assert (causal == np.tril(np.ones((7, 7), bool))).all()
    assert bidirectional[:3, :3].all() and not bidirectional[:3, 3:].any()
    assert (bidirectional[3:] == causal[3:]).all()


def test_unknown_prefix_attention_and_size_are_refused():
    with pytest.raises(ValueError, match="prefix"):
        decoder.decoder_config("Ti", 10, 10, prefix_attention="sideways")
    with pytest.raises(ValueError, match="unknown decoder"):
        decoder.decoder_config("XL", 10, 10)


def test_text_position_embedding_follows_the_sincos_formula():
    cfg, params, _, text = example(text_pos_embed=True)
    vectors = decoder.embed_tokens(params, text, cfg)
    added = vectors - params["embed"]["embedding"][text]
    position, D = np.arange(9)[:, None], cfg.width
    angle = position / 10000.0 ** (2 * np.arange(D // 2) / D)
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    np.testing.assert_allclose(added, np.broadcast_to(table, added.shape), atol=1e-5)
    from_fourth = decoder.embed_tokens(params, text[:, 4:5], cfg, first_position=4)
    np.testing.assert_allclose(from_fourth, vectors[:, 4:5], atol=1e-6)


def test_eos_is_a_target_and_pads_are_not():
    cfg, params, image, text = example()
    text[:, 5], text[:, 6:] = decoder.EOS, decoder.PAD
    assert decoder.count_targets(text).tolist() == [5, 5, 5]
    losses = caption_loss(params, image, text, cfg)
    padded = np.pad(text, ((0, 0), (0, 6)))
    np.testing.assert_allclose(losses, caption_loss(params, image, padded, cfg), rtol=1e-5)
    logits = np.asarray(caption_logits(params, image, text[:, :-1], cfg), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    by_hand = [-sum(log_probs[b, t, text[b, t + 1]] for t in range(5)) for b in range(3)]
    np.testing.assert_allclose(losses, by_hand, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 4, 8, 100])
def test_loss_in_chunks_equals_the_loss_at_once(chunk):
    cfg, params, image, text = example()

    def loss(params, cfg):
        return decoder.caption_loss(params, image, text, cfg).sum()
    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    at_once, grads = value_and_grad(params, cfg)
    chunked, chunked_grads = value_and_grad(params, dataclasses.replace(cfg, loss_chunk=chunk))
    np.testing.assert_allclose(at_once, chunked, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5),
                 grads, chunked_grads)


def test_chunked_loss_never_holds_the_logits_of_a_batch():
    B, T, V = 8, 64, 20_000

    def compiled_bytes(chunk: int) -> int:
        cfg = dataclasses.replace(CFG, vocab_size=V, loss_chunk=chunk)
        params = jax.eval_shape(lambda: decoder.init(jax.random.key(0), cfg))
        image = jax.ShapeDtypeStruct((B, 4, 32), jnp.float32)
        text = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
        grad = jax.jit(jax.grad(lambda p, x, t: decoder.caption_loss(p, x, t, cfg).sum()))
        compiled = grad.lower(params, image, text).compile()
        return compiled.memory_analysis().temp_size_in_bytes
    logits_bytes = B * T * V * 4
    assert compiled_bytes(4) < logits_bytes / 2
    assert compiled_bytes(0) > logits_bytes


@pytest.mark.parametrize("prefix,text_pos_embed", [
    ("causal", False), ("bidirectional", False), ("causal", True)])
def test_cached_generation_equals_the_forward_pass(prefix, text_pos_embed):
    cfg, params, image, _ = example(prefix, text_pos_embed=text_pos_embed)
    generated = np.asarray(jax.jit(lambda x: decoder.generate(params, x, cfg, 12))(image))
    text = np.full((3, 12), decoder.PAD, np.int32)
    text[:, 0] = decoder.BOS
    for t in range(1, 12):  # tokens that are still missing do not matter to those before them
        logits = np.asarray(caption_logits(params, image, text, cfg))
        done = (text == decoder.EOS).any(1)
        text[:, t] = np.where(done, decoder.PAD, logits[:, t - 1].argmax(-1))
    np.testing.assert_array_equal(generated, text)
    assert len(np.unique(generated[:, 1:])) > 2


def test_generation_ends_at_eos():
    cfg, params, image, _ = example()
    params["norm"]["scale"] = params["norm"]["scale"] * 0  # the head then reads the bias alone
    eos_column = params["norm"]["bias"] * 1e4
    params["head"]["kernel"] = params["head"]["kernel"].at[:, decoder.EOS].set(eos_column)
    generated = np.asarray(jax.jit(decoder.generate, static_argnums=(2, 3))(params, image, cfg, 6))
    assert (generated == [decoder.BOS, decoder.EOS, 0, 0, 0, 0]).all()


def test_top_p_samples_in_proportion_within_the_nucleus():
    scores = np.log(np.array([[0.5, 0.05, 0.3, 0.15]], np.float32))
    keys = jax.random.split(jax.random.key(0), 4000)

    @jax.jit
    def sample(keys, top_p):
        return jax.vmap(lambda key: decoder.sample_top_p(key, scores, top_p, 1.0))(keys)
    tokens = np.asarray(sample(keys, 0.75))
    assert set(tokens.ravel().tolist()) == {0, 2}  # 0.5 + 0.3 reach 0.75
    assert abs((tokens == 0).mean() - 0.5 / 0.8) < 0.03
    assert (np.asarray(sample(keys, 1e-6)) == 0).all()


def test_flops_formula_equals_the_count_of_traced_matmuls():
    params, text = noisy_params(decoder.param_specs(CFG)), np.ones((1, 13), np.int32)
    image = np.ones((1, 5, 32), np.float32)

    def all_logits(params, image, text):
        x = decoder.hidden_states(params, image, text[:, :-1], CFG)
        return decoder.linear(x[:, 5:], params["head"])
    assert matmul_flops(all_logits, params, image, text) == decoder.flops(CFG, 5, 12)
    # The loss reads the text alone: with an unrolled scan, the last block leaves the image out.
    cfg = dataclasses.replace(CFG, scan_unroll=CFG.depth)
    loss_flops = matmul_flops(lambda *args: decoder.caption_loss(*args, cfg), params, image, text)
    D, M, S = CFG.width, CFG.mlp_dim, 5 + 12
    left_out = 5 * (2 * D * D + 4 * D * M + 4 * S * D)
    assert loss_flops == decoder.flops(CFG, 5, 12) - left_out


@pytest.mark.parametrize("prefix", ["causal", "bidirectional"])
def test_a_last_block_of_the_text_alone_gives_the_same_features(prefix):
    cfg, params, image, text = example(prefix, scan_unroll=2)

    @jax.jit
    def both(params, image, text):
        everything = decoder.hidden_states(params, image, text, cfg)
        expected = decoder.layer_norm(everything[:, 4:], params["norm"])
        return decoder.text_features(params, image, text, cfg), expected
    np.testing.assert_allclose(*both(params, image, text), rtol=1e-5, atol=1e-5)


def test_l14_has_the_flops_of_the_paper():
    cfg = decoder.decoder_config("L", vocab_size=32000, image_width=1024)
    encoder_flops = vit.flops(vit.vit_config("L/14"), 224)
    decoder_flops = decoder.flops(cfg, masking.num_kept_tokens(256, 0.35), 127)
    assert (encoder_flops + decoder_flops) / 1e9 == pytest.approx(208.9, rel=0.02)  # Table 3


def test_the_loss_of_half_precision_features_is_float32():
    V = 4096
    cfg = decoder.DecoderConfig(1, 8, 1, 8, vocab_size=V, image_width=8)
    head = {"kernel": jnp.zeros((8, V), jnp.bfloat16)}
    features = jnp.ones((1, 1, 8), jnp.bfloat16)
    loss = decoder.token_cross_entropy({"head": head}, features, jnp.array([[5]]), cfg)
    assert loss.dtype == jnp.float32
    assert float(loss[0]) == pytest.approx(np.log(V), rel=1e-4)


def test_a_temperature_of_two_takes_the_root_of_the_probabilities():
    scores = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
    keys = jax.random.split(jax.random.key(0), 3000)

    @jax.jit
    def sample(keys):
        return jax.vmap(lambda key: decoder.sample_top_p(key, scores, 1.0, 2.0))(keys)
    expected = np.sqrt([0.6, 0.3, 0.1])
    expected /= expected.sum()
    found = np.bincount(np.ravel(sample(keys)), minlength=3) / 3000
    assert np.abs(found - expected).max() < 0.03


def test_each_token_is_drawn_with_a_key_of_its_own_and_within_the_nucleus():
    cfg, params, image, _ = example(K=1)
    head = params["head"] | {"kernel": params["head"]["kernel"] * 0}  # all are equally likely
    params = params | {"head": head}

    @jax.jit
    def generate(top_p):
        return decoder.generate(params, image, cfg, 12, jax.random.key(0), top_p=top_p)
    tokens = np.asarray(generate(1.0))
    assert len(set(tokens[0, 1:6].tolist())) > 2
    narrow = np.asarray(generate(1e-6))
    assert len(np.unique(narrow[:, 1:])) <= 2
