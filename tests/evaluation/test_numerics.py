"""Jitted readers of frozen features against NumPy in float64, as tests/test_numerics.py does it
for the model."""
import math

import numpy as np
import pytest

import decoder
import vit
from evaluation import attention_probe, vqa, zeroshot
from tests.helpers import numpy_model
from tests.helpers.compiling import optimized
from tests.helpers.models import noisy_params
from tests.helpers.numpy_model import assert_close, normal, random_text, to_double, to_single

ROWS = 40_000


def decoder_config(depth, width, num_heads, mlp_dim, vocab_size):
    return decoder.DecoderConfig(depth, width, num_heads, mlp_dim, vocab_size, image_width=width)


# -------------------------------------------------------------------------------- decoders
@pytest.mark.parametrize(("B", "cfg"), [(3000, decoder_config(1, 8, 2, 8, 7)),
                                        (4, decoder_config(2, 96, 3, 192, 200))])
def test_question_reader(B, cfg):
    N, Q, T, E, V = 4, 2, 5, cfg.image_width, cfg.vocab_size
    specs = vqa.reader_specs(cfg, E)
    params = to_double(noisy_params(specs))
    model, rng = params["model"], np.random.default_rng(1)
    image = normal(0, B, N, E)
    text = rng.integers(1, V, (B, Q, T)).astype(np.int32)
    answer = rng.random((B, Q, T)) < 0.4

    positions = np.broadcast_to(vit.sincos_position_embedding(2, cfg.width), (B, N, cfg.width))
    connected = numpy_model.linear(np.concatenate([image, positions], -1), **params["connector"])
    prefix = numpy_model.gelu(connected, False)[0] @ model["project"]["kernel"]
    tokens = model["embed"]["embedding"][text[..., :-1].reshape(B, -1)]
    x = np.concatenate([prefix, tokens], axis=1)
    x = numpy_model.stack(x, model["blocks"], cfg, vqa.vqa_mask(N, Q, T - 1), False)
    scores = numpy_model.layer_norm(x[:, N:], model["norm"]) @ model["head"]["kernel"]
    p = numpy_model.softmax(scores).reshape(B, Q, T - 1, V)
    losses = -np.log(np.take_along_axis(p, text[..., 1:, None], -1)[..., 0])
    expected = np.array((losses * answer[..., 1:]).sum() / answer.sum())

    def loss(params, image):
        return vqa.answer_loss(params, image, text, answer, cfg)
    assert_close(optimized(loss, to_single(params), to_single(image)), expected)


@pytest.mark.parametrize(("B", "S", "cfg"), [(8, 6000, decoder_config(1, 8, 4, 8, 7)),
                                             (3, 40, decoder_config(2, 96, 3, 192, 200))])
def test_likelihood_of_sentences(B, S, cfg):
    params = to_double(noisy_params(decoder.param_specs(cfg)))
    tokens, text = normal(0, B, 4, cfg.image_width), random_text(1, S, 7, cfg.vocab_size)
    expected = []
    for image in tokens:
        same_image = np.broadcast_to(image, (S, *image.shape))
        expected.append(-numpy_model.caption_loss(params, same_image, text, cfg))

    def score(params, tokens):
        return zeroshot.score(params, tokens, text, cfg)
    assert_close(optimized(score, to_single(params), to_single(tokens)), np.stack(expected))


# ---------------------------------------------------------------------------------- probes
def random_labels(sizes: tuple[int, ...], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets of tasks with so many classes each, and the task of each class."""
    rng = np.random.default_rng(0)
    y = np.stack([rng.integers(0, size, n) for size in sizes], 1)
    return attention_probe.one_hot(y, sizes), attention_probe.class_to_task(sizes)


@pytest.mark.parametrize("sizes", [(2,), (3,), (2, 3), (7,), (3, 5), (40, 10)])
def test_probe_cross_entropy(sizes):
    targets, class_to_task = random_labels(sizes, ROWS)
    scores, expected = normal(0, ROWS, sum(sizes)), []
    for a, b in attention_probe.class_columns(sizes):
        log_p = np.log(numpy_model.softmax(scores[:, a:b]))
        expected.append(-(targets[:, a:b] * log_p).sum())
    computed = optimized(attention_probe.cross_entropy, to_single(scores), targets, class_to_task)
    assert_close(computed, np.array(expected))


@pytest.mark.parametrize(("n", "N", "D", "sizes"), [
    (ROWS, 2, 2, (2,)), (ROWS // 4, 7, 3, (3, 2)), (ROWS // 4, 8, 8, (5,)),
    (512, 64, 96, (10, 4))])
def test_attended_probe(n, N, D, sizes):
    x, class_to_task = normal(0, n, N, D), attention_probe.class_to_task(sizes)
    params = {"query": normal(1, D, len(sizes)), "kernel": normal(2, D, sum(sizes)),
              "bias": normal(3, sum(sizes))}
    weights = numpy_model.softmax(x @ params["query"] / math.sqrt(D), axis=1)
    by_token = x @ params["kernel"]
    expected = (weights @ class_to_task.T * by_token).sum(1) + params["bias"]
    args = to_single(params), to_single(x), class_to_task
    assert_close(optimized(attention_probe.attention_logits, *args), expected)
    assert_close(attention_probe.batched_logits(*args), expected)
