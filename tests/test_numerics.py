"""Layers, losses and probes, jitted, against NumPy in float64: at the sizes of a model, and with more than 32,768 rows of 2 to 8 numbers.

jaxlib 0.10.2 computes wrong values on a CPU where a product is summed over so short an axis in so many rows, in some programs
(jax-ml/jax#39103). None of these is one of them, and this keeps it so."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf
from test_model import shaken

import baselines
import decoder
import layers
import masking
import probe
import vit
import vqa
import zeroshot

ROWS = 40_000
NARROW = range(2, 9)                                  # last axes
REAL = (4, 196, 192)                                  # images, tokens, width of Ti/16 at 224 px
SHAPES = [(200, 200, width) for width in NARROW] + [REAL]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def single(tree):
    return jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, tree)


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64) if np.asarray(x).dtype == np.float32 else np.asarray(x), tree)


def close(got, want, tolerance: float = 5e-5) -> None:
    """Each array within tolerance times its largest number (at least 1, for gradients that cancel to nothing)."""
    got, want = jax.tree.leaves(double(jax.device_get(got))), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max())


def value_and_vjp(f, args: tuple, g):
    """f(*args) and the gradients of <f, g>, in one jitted program."""
    def both(args, g):
        out, back = jax.vjp(f, *args)
        return out, back(g)
    return jax.jit(both)(single(args), single(g))


# ------------------------------------------------------------------------------------------------- references, float64
def np_linear(x, kernel, bias):
    return x @ kernel + bias


def np_linear_vjp(x, kernel, g):
    rows, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return g @ kernel.T, rows.T @ g_rows, g_rows.sum(0)


def np_unit(x):
    centred = x - x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + layers.EPS)
    return centred * inverse, inverse


def np_norm(x, w):
    return np_unit(x)[0] * w["scale"] + w["bias"]


def np_gelu(x, exact):
    """gelu and its derivative."""
    if exact:
        below = 0.5 * (1 + erf(x / math.sqrt(2)))
        return x * below, below + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    t = np.tanh(inner)
    return x * (1 + t) / 2, (1 + t) / 2 + x / 2 * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


def np_softmax(x, axis=-1):
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def np_attend(q, k, v, mask):
    scores = np.einsum("bqhd,bshd->bhqs", q, k) / math.sqrt(q.shape[-1])
    looks = np_softmax(np.where(mask, scores, -1e30))
    return np.einsum("bhqs,bshd->bqhd", looks, v), looks


def np_block(x, w, heads, mask, exact):
    B, S, D = x.shape
    qkv = np_linear(np_norm(x, w["norm1"]), **w["qkv"])
    mixed, _ = np_attend(*(a.reshape(B, S, heads, D // heads) for a in np.split(qkv, 3, -1)), mask)
    x = x + np_linear(mixed.reshape(B, S, D), **w["out"])
    hidden = np_gelu(np_linear(np_norm(x, w["norm2"]), **w["fc1"]), exact)[0]
    return x + np_linear(hidden, **w["fc2"])


def np_blocks(x, blocks, cfg, mask, exact):
    for layer in range(cfg.layers):
        x = np_block(x, jax.tree.map(lambda a, layer=layer: a[layer], blocks), cfg.heads, mask, exact)
    return x


def np_vit(params, images, cfg):
    pixels = (images / 255 - np.array(vit.MEAN)) / np.array(vit.STD)
    G = images.shape[1] // cfg.patch
    tiles = pixels.reshape(len(images), G, cfg.patch, G, cfg.patch, 3).swapaxes(2, 3).reshape(len(images), G * G, -1)
    x = tiles @ params["patch"]["kernel"] + vit.positions(G, cfg.width).astype(np.float64)
    return np_blocks(x, params["blocks"], cfg, True, True)


def np_word_loss(head, hidden, targets):
    scores = hidden @ head
    top = scores.max(-1)
    log_sum = top + np.log(np.exp(scores - top[..., None]).sum(-1))
    losses = log_sum - np.take_along_axis(scores, targets[..., None], -1)[..., 0]
    return np.where(targets != decoder.PAD, losses, 0).sum(-1)


def np_caption_loss(params, tokens, text, cfg):
    K, T = tokens.shape[1], text.shape[1] - 1
    x = np.concatenate([tokens @ params["project"]["kernel"], params["embed"]["embedding"][text[:, :-1]]], 1)
    x = np_blocks(x, params["blocks"], cfg, np.tril(np.ones((K + T, K + T), bool)), False)
    return np_word_loss(params["head"]["kernel"], np_norm(x[:, K:], params["norm"]), text[:, 1:])


# ---------------------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape):
    D = shape[-1]
    x, w, b, g = normal(0, *shape), normal(1, D, D), normal(2, D), normal(3, *shape)
    close(value_and_vjp(layers.affine, (x, w, b), g), (np_linear(x, w, b), np_linear_vjp(x, w, g)))


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_alone_and_with_its_linear(shape):
    D = shape[-1]
    x, scale, shift, g = np_unit(normal(0, *shape))[0] * 2 + 1, normal(1, D), normal(2, D), normal(5, *shape)
    kernel, bias = normal(3, D, D), normal(4, D)
    unit, inverse = np_unit(x)

    def d_input(d_unit):
        return inverse * (d_unit - d_unit.mean(-1, keepdims=True) - unit * (d_unit * unit).mean(-1, keepdims=True))

    def d_weights(d_normed):
        return (d_normed * unit).sum((0, 1)), d_normed.sum((0, 1))
    out, grads = value_and_vjp(lambda x, s, b: layers.layer_norm(x, {"scale": s, "bias": b}), (x, scale, shift), g)
    close((out, grads), (unit * scale + shift, (d_input(g * scale), *d_weights(g))))

    normed = unit * scale + shift
    d_normed, d_kernel, d_bias = np_linear_vjp(normed, kernel, g)
    close(value_and_vjp(layers.norm_affine, (x, scale, shift, kernel, bias), g),
          (np_linear(normed, kernel, bias), (d_input(d_normed * scale), *d_weights(d_normed), d_kernel, d_bias)))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_linear(shape, exact):
    D = shape[-1]
    x, kernel, bias, g = normal(0, *shape), normal(1, D, D), normal(2, D), normal(3, *shape)
    hidden, slope = np_gelu(x, exact)
    d_hidden, d_kernel, d_bias = np_linear_vjp(hidden, kernel, g)
    close(value_and_vjp(lambda x, w, b: layers.gelu_affine(x, w, b, exact), (x, kernel, bias), g),
          (np_linear(hidden, kernel, bias), (d_hidden * slope, d_kernel, d_bias)))


@pytest.mark.parametrize(("B", "S", "H", "Dh"), [(ROWS // (2 * n) + 1, n, 2, n) for n in NARROW] + [(2, 197, 3, 64)])
def test_attention(B, S, H, Dh):
    q, k, v, g = (normal(seed, B, S, H, Dh) for seed in range(4))
    g_looks, mask = normal(4, B, H, S, S), np.tril(np.ones((S, S), bool))
    mixed, looks = np_attend(q, k, v, mask)
    d_looks = np.einsum("bqhd,bshd->bhqs", g, v) + g_looks
    d_scores = looks * (d_looks - (d_looks * looks).sum(-1, keepdims=True)) / math.sqrt(Dh)
    want = (mixed, looks), (np.einsum("bhqs,bshd->bqhd", d_scores, k), np.einsum("bhqs,bqhd->bshd", d_scores, q), np.einsum("bhqs,bqhd->bshd", looks, g))
    close(value_and_vjp(lambda q, k, v: layers.attend(q, k, v, jnp.asarray(mask)), (q, k, v), (g, g_looks)), want)


# ---------------------------------------------------------------------------------------------------------------- losses
def some_text(seed: int, B: int, T: int, vocab: int) -> np.ndarray:
    """bos, words, eos, then pad."""
    rng = np.random.default_rng(seed)
    text = rng.integers(min(3, vocab - 1), vocab, (B, T)).astype(np.int32)
    ends = rng.integers(1, T, B)
    text[:, 0] = decoder.BOS
    text[np.arange(B), ends] = min(decoder.EOS, vocab - 1)
    text[np.arange(T) > ends[:, None]] = decoder.PAD
    return text


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize(("B", "T", "D", "V"), [(5000, 8, n, n) for n in NARROW] + [(16, 127, 192, 1000)])
def test_word_loss(B, T, D, V, chunk):
    cfg = decoder.DecoderConfig(1, D, 1, D, vocab=V, image_width=D, loss_chunk=chunk)
    hidden, head, g = normal(0, B, T, D), normal(1, D, V), normal(2, B)
    targets = np.random.default_rng(3).integers(0, V, (B, T)).astype(np.int32)
    p = np_softmax(hidden @ head)
    d_scores = np.where((targets != decoder.PAD)[..., None], p - np.eye(V)[targets], 0) * g[:, None, None]
    want = np_word_loss(head, hidden, targets), (d_scores @ head.T, np.einsum("btd,btv->dv", hidden, d_scores))
    close(value_and_vjp(lambda h, w: decoder.word_loss({"head": {"kernel": w}}, h, jnp.asarray(targets), cfg), (hidden, head), g), want)


@pytest.mark.parametrize(("B", "side", "T", "V", "enc", "dec"), [
    (8400, 4, 6, 7, vit.ViTConfig(2, 8, 2, 8, patch=2), decoder.DecoderConfig(2, 8, 4, 6, vocab=7, image_width=8)),
    (8, 32, 32, 500, vit.ViTConfig(2, 96, 3, 192, patch=8), decoder.DecoderConfig(2, 96, 3, 192, vocab=500, image_width=96, loss_chunk=16))])
def test_the_whole_loss_and_the_gradient_of_every_weight(B, side, T, V, enc, dec):
    """The gradient by central differences of the float64 loss: for each array, along the gradient itself and a random direction at once."""
    params = double(shaken({"encoder": vit.init(jax.random.key(0), enc), "decoder": decoder.init(jax.random.key(1), dec)}))
    images = np.random.default_rng(0).integers(0, 256, (B, side, side, 3)).astype(np.uint8)
    text = some_text(1, B, T, V)

    def loss(params):
        return decoder.caption_loss(params["decoder"], vit.vit(params["encoder"], jnp.asarray(images), enc)["tokens"], jnp.asarray(text), dec)

    def np_loss(params):
        return np_caption_loss(params["decoder"], np_vit(params["encoder"], images, enc), text, dec)
    losses, (grads,) = value_and_vjp(loss, (params,), np.ones(B))
    close(losses, np_loss(params))
    used = {"encoder": params["encoder"] | {"norm": None}, "decoder": params["decoder"]}   # the encoder's final norm is not read
    for at, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(used)):
        grad = double(jax.device_get(dict(jax.tree_util.tree_leaves_with_path(grads))[path]))
        noise = normal(at, *leaf.shape)
        direction = grad / np.linalg.norm(grad) + noise / np.linalg.norm(noise)

        def moved(by, path=path, direction=direction):
            return np_loss(jax.tree_util.tree_map_with_path(lambda p, x: x + by * direction if p == path else x, params)).sum()
        slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
        assert abs((grad * direction).sum() - slope) <= 1e-3 * np.linalg.norm(grad), path


@pytest.mark.parametrize(("B", "D"), [(33_000, 2), (33_000, 7), (33_000, 8), (256, 192)])
def test_features_of_length_one(B, D):
    x = normal(0, B, D)
    close(jax.jit(baselines.unit)(single(x)), x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-12))


@pytest.mark.parametrize(("B", "D"), [(500, 3), (256, 192)])
def test_contrastive_loss(B, D):
    image, text = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (normal(0, B, D), normal(1, B, D)))
    scores = 10 * image @ text.T
    among = [np.log(np.exp(s).sum(-1)) - np.diag(scores) for s in (scores, scores.T)]
    run = jax.pmap(lambda a, b: baselines.contrast(a, b, jnp.ones(B, bool), jnp.float32(10)), "devices", devices=jax.devices()[:1])
    close(run(single(image)[None], single(text)[None])[0], (among[0] + among[1]) / 2)


@pytest.mark.parametrize(("B", "side", "patch"), [(40, 32, 1), (8, 224, 16)])
def test_pixel_targets(B, side, patch):
    images = np.random.default_rng(0).integers(0, 256, (B, side, side, 3)).astype(np.uint8)
    pixels = (images / 255 - np.array(vit.MEAN)) / np.array(vit.STD)
    G = side // patch
    x = pixels.reshape(B, G, patch, G, patch, 3).swapaxes(2, 3).reshape(B, G * G, -1)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True, ddof=1) + 1e-6)
    close(jax.jit(baselines.pixel_targets, static_argnums=1)(images, patch), want, 1e-3)   # gray pixels are divided by little


@pytest.mark.parametrize("n", NARROW)
def test_kept_tokens_are_the_drawn_ones(n):
    """Distinct places of each row, each as often as any other, and the tokens that stand there."""
    B, k = ROWS, max(1, n // 2)
    tokens = single(normal(0, B, n, 3))
    kept, chosen = jax.device_get(jax.jit(lambda keys, x: masking.keep(keys, x, k / n + 1e-6))(jax.random.split(jax.random.key(0), B), tokens))
    assert chosen.shape == (B, k) and (np.diff(chosen, axis=1) > 0).all() and chosen.min() == 0 and chosen.max() == n - 1
    assert np.array_equal(kept, np.take_along_axis(tokens, chosen[:, :, None], 1))
    share = np.bincount(chosen[-8000:].ravel(), minlength=n) / 8000
    assert np.abs(share - k / n).max() < 0.03


@pytest.mark.parametrize(("B", "V", "cfg"), [(3000, 7, decoder.DecoderConfig(1, 8, 2, 8, vocab=7, image_width=8)),
                                             (4, 200, decoder.DecoderConfig(2, 96, 3, 192, vocab=200, image_width=96))])
def test_question_reader(B, V, cfg):
    N, Q, T, E = 4, 2, 5, cfg.image_width
    params = double(shaken(vit.initialise(jax.random.key(0), vqa.weights(cfg, E))))
    image, rng = normal(0, B, N, E), np.random.default_rng(1)
    text, answer = rng.integers(1, V, (B, Q, T)).astype(np.int32), rng.random((B, Q, T)) < 0.4
    model, place = params["model"], np.broadcast_to(vit.positions(2, cfg.width), (B, N, cfg.width))
    hidden = np_gelu(np_linear(np.concatenate([image, place], -1), **params["connector"]), False)[0] @ model["project"]["kernel"]
    x = np.concatenate([hidden, model["embed"]["embedding"][text[..., :-1].reshape(B, -1)]], 1)
    x = np_norm(np_blocks(x, model["blocks"], cfg, vqa.sees(N, Q, T - 1), False)[:, N:], model["norm"])
    losses = -np.log(np.take_along_axis(np_softmax(x @ model["head"]["kernel"]).reshape(B, Q, T - 1, V), text[..., 1:, None], -1)[..., 0])
    got = jax.jit(vqa.loss, static_argnums=4)(single(params), single(image), text, answer, cfg)
    close(got, np.array((losses * answer[..., 1:]).sum() / answer.sum()))


@pytest.mark.parametrize(("P", "S", "V", "cfg"), [(8, 6000, 7, decoder.DecoderConfig(1, 8, 4, 8, vocab=7, image_width=8)),
                                                  (3, 40, 200, decoder.DecoderConfig(2, 96, 3, 192, vocab=200, image_width=96))])
def test_likelihood_of_sentences(P, S, V, cfg):
    params = double(shaken(decoder.init(jax.random.key(0), cfg)))
    tokens, text = normal(0, P, 4, cfg.image_width), some_text(1, S, 7, V)
    want = -np.stack([np_caption_loss(params, np.broadcast_to(one, (S, *one.shape)), text, cfg) for one in tokens])
    close(zeroshot.score(single(params), single(tokens), text, cfg), want)


# ---------------------------------------------------------------------------------------------------------------- probes
def np_cross_entropy(scores, target, sizes):
    """The summed loss of each task."""
    return np.array([-(target[:, a:b] * np.log(np_softmax(scores[:, a:b]))).sum() for a, b in probe.parts(sizes)])


def labelled(sizes: tuple[int, ...], n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.stack([rng.integers(0, size, n) for size in sizes], 1)
    return probe.targets(y, sizes), probe.owners(sizes)


@pytest.mark.parametrize("sizes", [(2,), (3,), (2, 3), (7,), (3, 5), (40, 10)])
def test_probe_cross_entropy(sizes):
    target, mine = labelled(sizes, ROWS)
    scores = normal(0, ROWS, sum(sizes))
    close(probe.cross_entropy(single(scores), target, mine), np_cross_entropy(scores, target, sizes))


@pytest.mark.parametrize(("n", "D", "sizes"), [(ROWS, 2, (2,)), (ROWS, 5, (3, 2)), (ROWS, 8, (7,)), (2000, 96, (10, 4))])
def test_probe_regression_reaches_the_least_loss(n, D, sizes):
    """At the least, the float64 gradient of loss + l2/2 |weights|^2 is nothing."""
    target, mine = labelled(sizes, n)
    x, _ = np.linalg.qr(normal(1, n, D + 1) + np.pad(np.ones((n, 1)), ((0, 0), (D, 0))))
    x = x * math.sqrt(n)
    x[:, -1] = 1
    l2 = np.full(len(sizes), 0.1)
    w = double(jax.device_get(probe.fit(single(x), target, single(l2), mine)))
    scores = x @ w
    p = np.concatenate([np_softmax(scores[:, a:b]) for a, b in probe.parts(sizes)], 1)
    slope = x.T @ (p - target) / n + 0.1 * w * (np.arange(D + 1) < D)[:, None]
    assert np.abs(slope).max() < 1e-3


@pytest.mark.parametrize(("n", "N", "D", "sizes"), [(ROWS, 2, 2, (2,)), (ROWS // 4, 7, 3, (3, 2)), (ROWS // 4, 8, 8, (5,)), (512, 64, 96, (10, 4))])
def test_attended_probe_reads_tokens(n, N, D, sizes):
    x, mine = normal(0, n, N, D), probe.owners(sizes)
    params = {"query": normal(1, D, len(sizes)), "kernel": normal(2, D, sum(sizes)), "bias": normal(3, sum(sizes))}
    looks = np_softmax(x @ params["query"] / math.sqrt(D), axis=1)
    want = (looks @ mine.T * (x @ params["kernel"])).sum(1) + params["bias"]
    close(jax.jit(probe.read)(single(params), single(x), mine), want)
    close(probe.scores_of(single(params), single(x), mine), want)

