"""The losses of the other objectives, by closed formulas, and what each prediction can see."""
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import decoder
import layers
import vit
from objectives import aimv2, cappa, contrastive, genlip, lit, registry, siglip
from tests.helpers import numpy_model
from tests.helpers.models import noisy_params
from tests.objectives.small import (
    DEC,
    ENC,
    KEYS,
    B,
    N,
    T,
    V,
    captions,
    loss_and_count,
    make_batch,
    make_model,
    make_params,
)

encode = jax.jit(vit.vit, static_argnums=2)
encode_text = jax.jit(contrastive.encode_text, static_argnums=2)
cross_entropy = jax.jit(optax.softmax_cross_entropy_with_integer_labels)


def over_devices(loss: Callable, in_axes: int | tuple = 0) -> Callable:
    return jax.jit(jax.vmap(loss, in_axes, axis_name="devices"))


def symmetric_cross_entropy(logits: np.ndarray) -> float:
    """CLIP's loss, by optax."""
    matching = np.arange(len(logits))
    both = cross_entropy(logits, matching).mean() + cross_entropy(logits.T, matching).mean()
    return float(both / 2)


def with_other_token(text: np.ndarray, row: int, position: int) -> np.ndarray:
    """The captions with another token there."""
    other = text.copy()
    other[row, position] = 3 + (other[row, position] - 2) % (V - 3)
    return other


# ------------------------------------------------------------------------- CLIP, OpenVision
def test_contrastive_loss_is_clips_on_any_number_of_devices():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2, 8, 5)).astype(np.float32)
    image, text = features / np.linalg.norm(features, axis=-1, keepdims=True)
    real = np.array([True] * 3 + [False] + [True] * 3 + [False])
    expected = symmetric_cross_entropy(7.0 * (image @ text.T)[real][:, real])

    def loss(image, text, real):
        return contrastive.contrastive_loss(image, text, real, 7.0)
    for devices in (1, 2, 8):
        parts = [x.reshape(devices, -1, *x.shape[1:]) for x in (image, text, real)]
        losses = np.ravel(over_devices(loss)(*parts))
        assert float(losses.sum()) / 6 == pytest.approx(expected, rel=1e-5)
        assert (losses[~real] == 0).all()


# ----------------------------------------------------------------------------------- SigLIP
def test_sigmoid_loss_is_a_binary_cross_entropy_per_pair_on_any_number_of_devices():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2, 8, 5))
    image, text = features / np.linalg.norm(features, axis=-1, keepdims=True)
    real = np.array([True] * 3 + [False] + [True] * 3 + [False])
    expected = 0.0  # in float64, pair by pair
    for i in np.flatnonzero(real):
        for j in np.flatnonzero(real):
            probability = 1 / (1 + np.exp(-(6.0 * image[i] @ text[j] - 2.0)))
            expected -= np.log(probability if i == j else 1 - probability)

    def loss(image, text, real):
        return siglip.sigmoid_loss(image, text, real, 6.0, -2.0)
    for devices in (1, 2, 8):
        parts = [x.reshape(devices, -1, *x.shape[1:]) for x in numpy_model.to_single(
            (image, text, real))]
        losses = np.ravel(over_devices(loss)(*parts))
        assert float(losses.sum()) == pytest.approx(expected, rel=1e-5)
        assert (losses[~real] == 0).all()


def test_siglip_starts_at_its_scale_and_bias():
    model, batch = make_model("siglip"), make_batch()
    params = make_params(model)
    zeros = jax.tree.map(jnp.zeros_like, params["pair"])
    params["pair"] |= {"temperature": zeros["temperature"], "bias": zeros["bias"]}
    params["pair"]["image"] = zeros["image"]  # all cosines are 0
    loss = over_devices(lambda params, batch: siglip.loss(params, batch, KEYS, model), (None, 0))
    total, count = loss(params, jax.tree.map(lambda x: x[None], batch))
    pair_losses = B * np.log1p(np.exp(10)) + B * (B - 1) * np.log1p(np.exp(-10))
    assert float(total[0]) == pytest.approx(pair_losses, rel=1e-5) and count[0] == B


def test_logit_scale_starts_at_clips_and_can_leave_its_bound():
    def logit_scale(log):
        return contrastive.logit_scale({"pair": {"temperature": {"log": log}}})
    assert float(logit_scale(0.0)) == pytest.approx(1 / 0.07)
    assert float(logit_scale(5.0)) == pytest.approx(100)
    assert float(jax.grad(logit_scale)(5.0)) == pytest.approx(100)  # with a plain bound it were 0


def test_a_captions_feature_depends_on_every_token_but_no_padding():
    params, text = make_params(make_model("clip"))["text"], captions(1)
    feature = encode_text(params, text, DEC)[1]
    shorter = encode_text(params, text[1:2, :7], DEC)[1]
    np.testing.assert_allclose(shorter, feature[1:2], atol=1e-5)
    for position in range(1, 6):
        other = encode_text(params, with_other_token(text, 1, position), DEC)[1]
        assert np.abs(other[1] - feature[1]).max() > 1e-4


def test_openvision_is_the_sum_of_its_terms():
    batch, model = make_batch(), make_model("openvision")
    params = make_params(model)
    encoded = encode(params["encoder"], batch["images"], ENC)
    image = contrastive.l2_normalize(encoded["pooled"] @ params["pair"]["image"]["kernel"])
    scale = contrastive.logit_scale(params)
    pairs = 0.0
    for text in (batch["alt"], batch["text"]):
        _, feature = encode_text(params["text"], text, DEC)
        pairs += symmetric_cross_entropy(scale * image @ contrastive.l2_normalize(feature).T)
    web, _ = encode_text(params["text"], batch["alt"], DEC)
    prefix = jnp.concatenate([encoded["tokens"], web @ params["web"]["kernel"]], axis=1)
    bidirectional = dataclasses.replace(DEC, prefix_attention="bidirectional")
    caption_logits = jax.jit(decoder.caption_logits, static_argnums=3)
    logits = caption_logits(params["decoder"], prefix, batch["text"][:, :-1], bidirectional)
    targets = batch["text"][:, 1:]
    caption_loss = np.asarray(cross_entropy(logits, targets))[targets != 0].mean()
    loss, count = loss_and_count("openvision", batch)
    assert count == (targets != 0).sum()
    assert loss / count == pytest.approx(2 * caption_loss + pairs / 2, rel=1e-5)
    assert loss_and_count("openvision", batch, devices=2)[0] == pytest.approx(loss, rel=1e-5)


# ------------------------------------------------------------------------------------- LiT
@pytest.mark.parametrize("image_pool", ["attention", "map", "mean", "grid"])
def test_lit_matches_captions_to_a_pool_of_frozen_tokens(image_pool):
    """The image's vector, by NumPy in float64; CLIP's loss on it; no gradient for the encoder; and
    the same loss from tokens that were computed before."""
    model, batch = make_model("lit")._replace(image_pool=image_pool, num_patches=N), make_batch()
    params = make_params(model)
    w = numpy_model.to_double(params)
    tokens = numpy_model.encode(w["encoder"], batch["images"], ENC)
    if image_pool == "grid":
        fisher = w["discriminant"]
        image = (tokens.reshape(B, N * 32) - fisher["mean"]) @ fisher["matrix"]
    elif image_pool == "mean":
        pooled = numpy_model.layer_norm(tokens.mean(1), w["encoder"]["norm"])
    else:
        queries = {"attention": 8, "map": 1}[image_pool]
        memory = numpy_model.linear(numpy_model.layer_norm(tokens, w["pool"]["norm"]),
                                    **w["pool"]["memory"]).reshape(B, N, 2, 2, 16)  # k or v, head
        query = w["pool"]["query"]["embedding"].reshape(1, queries, 2, 16).repeat(B, 0)
        read, _ = numpy_model.attention(query, memory[:, :, 0], memory[:, :, 1], True)
        pooled = numpy_model.linear(read.reshape(B, 32 * queries), **w["pool"]["out"])
        if image_pool == "map":
            normed = numpy_model.layer_norm(pooled, w["pool"]["norm2"])
            hidden = numpy_model.gelu(numpy_model.linear(normed, **w["pool"]["fc1"]), True)[0]
            pooled = pooled + numpy_model.linear(hidden, **w["pool"]["fc2"])
    if image_pool != "grid":
        image = pooled @ w["pair"]["image"]["kernel"]
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    computed = jax.jit(lit.embed_images, static_argnums=2)(params, batch["images"], model)
    numpy_model.assert_close(computed, image)
    text = jax.jit(lit.embed_texts, static_argnums=2)(params, batch["text"], model)
    expected = symmetric_cross_entropy(contrastive.logit_scale(params) * computed @ text.T)

    def loss(params, images):
        one_device = jax.tree.map(lambda x: x[None], (batch | {"images": images}, KEYS))
        total, count = jax.vmap(lambda batch, keys: lit.loss(params, batch, keys, model),
                                axis_name="devices")(*one_device)
        return total[0] / count[0]
    value, grads = jax.jit(jax.value_and_grad(loss))(params, batch["images"])
    assert float(value) == pytest.approx(expected, rel=1e-5)
    frozen = [grads.pop("encoder"), grads.pop("discriminant", {})]
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(frozen))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(grads))
    computed = encode(params["encoder"], batch["images"], ENC)["tokens"]
    assert float(jax.jit(loss)(params, computed)) == pytest.approx(expected, rel=1e-5)


def test_pixel_encoders_tokens_are_the_means_of_pixels_in_squares():
    """32 columns hold 2 x 2 squares of 4 x 4 pixels; positions are added."""
    images = make_batch()["images"]
    params = lit.pixel_encoder(noisy_params(vit.param_specs(ENC)), ENC)
    tokens = encode(params, images, ENC)["tokens"] - vit.sincos_position_embedding(3, 32)
    pixels = (images / 255 - vit.IMAGENET_MEAN) / vit.IMAGENET_STD
    second_patch = pixels[:, :8, 8:16].reshape(B, 2, 4, 2, 4, 3).mean((2, 4)).reshape(B, 12)
    np.testing.assert_allclose(tokens[:, 1, :12], second_patch, atol=1e-5)
    assert np.abs(tokens[:, 1, 12:]).max() < 1e-6


# ------------------------------------------------------------------------------------ AIMv2
def test_pixel_targets_are_those_of_mae():
    batch = make_batch()
    targets = np.asarray(aimv2.pixel_targets(batch["images"], 8))
    pixels = (batch["images"] / 255 - vit.IMAGENET_MEAN) / vit.IMAGENET_STD
    patch = pixels[1, 8:16, 16:24].reshape(-1)  # second row, third column
    expected = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
    np.testing.assert_allclose(targets[1, 5], expected, atol=1e-5)
    uniform = aimv2.pixel_targets(np.full((1, 8, 8, 3), 90, np.uint8), 8)
    assert np.isfinite(uniform).all()


@pytest.mark.parametrize("cls_token", [False, True])
def test_aimv2_is_the_mean_over_images_of_both_terms(cls_token):
    batch, model = make_batch(), make_model("aimv2", cls_token)
    params = make_params(model)
    all_targets, total = np.asarray(aimv2.pixel_targets(batch["images"], 8)), 0.0

    @jax.jit
    def predict(params, image, text, mask):
        """The losses of the tokens and the predicted patches, of one image."""
        tokens = vit.vit(params["encoder"], image, model.encoder, mask=mask)["tokens"]
        logits = decoder.caption_logits(params["decoder"], tokens, text[:, :-1], DEC)
        hidden = decoder.hidden_states(params["decoder"], tokens, text[:, :1], DEC)
        hidden = layers.layer_norm(hidden, params["decoder"]["norm"])[0, :N]
        head = params["decoder"]["pixels"]
        return cross_entropy(logits, text[:, 1:])[0], hidden @ head["kernel"] + head["bias"]
    for b, key in enumerate(KEYS):
        prefix_len = int(jax.random.randint(key, (), 1, N))
        mask = np.tril(np.ones((N + cls_token, N + cls_token), bool))
        mask[:, :prefix_len + cls_token] = True
        image, text = batch["images"][b:b + 1], batch["text"][b:b + 1]
        text_losses, predicted = jax.device_get(predict(params, image, text, mask))
        length = (text != 0).sum() - 1
        error = predicted[prefix_len - 1:N - 1] - all_targets[b, prefix_len:]
        total += text_losses[:length].mean() + 0.4 * np.square(error).mean()
    loss, count = jax.jit(aimv2.loss, static_argnums=3)(params, batch, KEYS, model)
    assert count == B and float(loss) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("cls_token", [0, 1])
@pytest.mark.parametrize("prefix_len", [1, 5, 8])
def test_aimv2s_encoder_attends_to_the_prefix_and_to_earlier_patches(prefix_len, cls_token):
    cfg = dataclasses.replace(ENC, cls_token=bool(cls_token))
    params, images = noisy_params(vit.param_specs(cfg)), make_batch()["images"][:1]
    mask = aimv2.prefix_mask(jnp.array([prefix_len + cls_token]), N + cls_token)
    tokens = np.asarray(encode(params, images, cfg, mask=mask)["tokens"])[0]
    for patch in range(N):
        y, x = divmod(patch, 3)
        other = images.copy()
        other[:, 8 * y:8 * y + 8, 8 * x:8 * x + 8] ^= 255
        other_tokens = np.asarray(encode(params, other, cfg, mask=mask)["tokens"])[0]
        changed = np.abs(other_tokens - tokens).max(-1) > 1e-5
        assert changed.tolist() == [patch < prefix_len or i >= patch for i in range(N)]


# ------------------------------------------------------------------------------------ CapPa
def test_cappa_reads_earlier_tokens_only_and_in_parallel_none():
    params, rng = make_params(make_model("cappa"))["decoder"], np.random.default_rng(0)
    memory = rng.standard_normal((1, N, 32), np.float32)
    text, causal = captions(1)[:1], np.tri(T, dtype=bool)

    @jax.jit
    def features(memory, text, mask):
        return cappa.cross_features(params, memory, text, mask, DEC)[0]
    hidden = features(memory, text, causal)
    for position in range(1, T):
        other = features(memory, with_other_token(text, 0, position), causal)
        changed = np.abs(other - hidden).max(-1) > 1e-5
        assert not changed[:position].any() and changed[position]
    assert (np.abs(features(memory + 1, text, causal) - hidden).max(-1) > 1e-5).all()
    in_parallel = features(memory, np.full((1, T), V, np.int32), np.ones((T, T), bool))
    assert np.abs(in_parallel[1:] - in_parallel[:-1]).max(-1).min() > 1e-4  # positions differ


def test_cappas_parallel_predictions_do_not_depend_on_other_tokens():
    """In parallel the loss is a sum over the targets, so that two changes of the caption add up."""
    batch = make_batch()
    batch["text"][:, 1:-1], batch["text"][:, -1] = 5, decoder.EOS
    first, second = batch["text"].copy(), batch["text"].copy()
    first[:, 3], second[:, 6] = 9, 11
    both = np.where(second == 11, 11, first)

    def interaction(parallel_prob):
        """What both changes do to the loss beyond the sum of what each does."""
        neither, only_first, only_second, with_both = (
            loss_and_count("cappa", batch | {"text": text}, parallel_prob=parallel_prob)[0]
            for text in (batch["text"], first, second, both))
        return (with_both - only_second) - (only_first - neither)
    assert interaction(1.0) == pytest.approx(0, abs=1e-3)
    assert abs(interaction(0.0)) > 1e-2


def test_cappa_predicts_by_each_images_draw_in_parallel_three_times_of_four():
    model, batch, keys = make_model("cappa"), make_batch(), jax.random.split(jax.random.key(4), B)
    params = make_params(model)

    def losses(**options):
        """Of each image alone."""
        def loss(sample, key):
            batch_of_one = jax.tree.map(lambda x: x[None], sample)
            return cappa.loss(params, batch_of_one, key[None], model, **options)[0]
        return jax.jit(jax.vmap(loss))(batch, keys)
    parallel = jax.vmap(jax.random.uniform)(keys) < 0.75
    assert 0 < parallel.sum() < B
    expected = np.where(parallel, losses(parallel_prob=1.0), losses(parallel_prob=0.0))
    np.testing.assert_allclose(losses(), expected, rtol=1e-5)


# ----------------------------------------------------------------------------------- GenLIP
@pytest.mark.parametrize("gated", [False, True])
def test_genlip_is_one_transformer_over_patches_and_tokens(gated):
    """The loss and the features, by NumPy in float64."""
    model = make_model("genlip")
    model = model._replace(encoder=dataclasses.replace(ENC, gated_attention=gated))
    params, batch = make_params(model), make_batch()
    w, text = numpy_model.to_double(params), batch["text"]
    assert ("gate" in w["encoder"]["blocks"]) == gated
    table = vit.sincos_position_embedding(3, ENC.width).astype(np.float64)
    patches = numpy_model.patchify(batch["images"], 8) @ w["encoder"]["patch"]["kernel"] + table
    tokens = w["text"]["embed"]["embedding"][text[:, :-1]]
    mask = np.tril(np.ones((N + T - 1, N + T - 1), bool))
    mask[:N, :N] = True
    x = np.concatenate([patches, tokens], axis=1)
    x = numpy_model.stack(x, w["encoder"]["blocks"], ENC, mask, True)
    x = numpy_model.layer_norm(x, w["encoder"]["norm"])
    losses = numpy_model.token_cross_entropy(w["text"]["head"]["kernel"], x[:, N:], text[:, 1:])
    loss, count = jax.jit(genlip.loss, static_argnums=3)(params, batch, KEYS, model)
    assert float(loss) == pytest.approx(losses.sum(), rel=1e-5)
    assert count == (text[:, 1:] != 0).sum()
    # Alone, the encoder gives the same patches: they never see the caption.
    cfg = dataclasses.replace(model.encoder, norm_tokens=True)
    alone = encode(params["encoder"], batch["images"], cfg)["tokens"]
    numpy_model.assert_close(alone, x[:, :N])


# --------------------------------------------------------------------------------------- all
@pytest.mark.parametrize("objective", registry.OTHER_OBJECTIVES)
def test_images_that_only_fill_up_a_batch_do_not_count(objective):
    batch = make_batch()
    batch["text"][-1] = batch["alt"][-1] = 0
    other = batch | {"images": batch["images"].copy()}
    other["images"][-1] = 255 - other["images"][-1]
    loss, count = loss_and_count(objective, batch)
    assert loss_and_count(objective, other) == pytest.approx((loss, count), rel=1e-6)
    num_targets = (batch["text"][:, 1:] != 0).sum()
    assert count == (3 if objective in ("clip", "siglip", "lit", "aimv2") else num_targets)
