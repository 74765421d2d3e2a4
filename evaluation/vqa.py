"""Visual question answering on a frozen encoder, as in LLaVA (arXiv:2304.08485).

The patch tokens go through a connector, a 2-layer MLP, and stand before a question about the scene
(questions.py). A small causal language model then generates the answer. Connector and model are
trained from scratch on the cross-entropy of the answers. The encoder does not change.

The same is measured on raw pixels, on an encoder with random parameters, and without the image.

Letters: B images, N patch tokens, E their width, Q questions per image, T tokens of question and
answer, S = N + Q*T, D decoder width, V vocabulary size.

    python evaluate.py ENCODER vqa [--steps 1500]        prints the table, in minutes
"""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import decoder
import vit
from evaluation.questions import (
    KINDS,
    Question,
    blind_accuracy,
    make_questions,
    question_scenes,
    with_mean,
)
from inputs import images, scenes, tokenizer
from interop.encoder import Encoder, random_encoder, raw_pixel_encoder
from layers import dense_specs, init_params, layer_norm, linear

NUM_TRAIN, NUM_VAL = 8000, 1000  # images
# How much more often training draws a question of a kind. "word" has the most answers, and half of
# the images have none.
DRAW_WEIGHT = {"word": 3}


@functools.lru_cache(4)
def question_images(seed: int, split: str, count: int, resolution: int) -> np.ndarray:
    """(count,R,R,3) uint8, rendered once for all encoders of that resolution R."""
    rendered = map(scenes.render, question_scenes(seed, split, count))
    return np.stack([images.decode_and_augment(image, resolution) for image in rendered])


# ------------------------------------------------------------------------------ the reader
def reader_specs(cfg: decoder.DecoderConfig, E: int) -> dict:
    """The connector's first layer reads a token and its position embedding. Its second layer is the
    language model's projection."""
    return {"connector": dense_specs(E + cfg.width, cfg.image_width),
            "model": decoder.param_specs(cfg)}


def vqa_mask(N: int, Q: int, T: int) -> np.ndarray:
    """(S,S) bool: a question attends to the image and to its own tokens before, not to another
    question. Only this mask orders the tokens, so each question is read as if it were alone."""
    group = np.repeat(np.arange(Q + 1), [N] + [T] * Q)  # 0 is the image
    same_group = group[:, None] == group
    return np.tri(len(group), dtype=bool) & (same_group | (group == 0))


def reader_logits(params: dict, image: jax.Array, text: jax.Array,
                  cfg: decoder.DecoderConfig) -> jax.Array:
    """image (B,N,E) and text (B,Q,T) int32 to the logits (B,Q,T,V) of each next token."""
    (B, N, _), (_, Q, T) = image.shape, text.shape
    positions = vit.sincos_position_embedding(round(N ** 0.5), cfg.width)
    positions = jnp.broadcast_to(positions, (B, N, cfg.width))
    hidden = linear(jnp.concatenate([image, positions], axis=-1), params["connector"])
    model = params["model"]
    x = decoder.embed_sequence(model, jax.nn.gelu(hidden), text.reshape(B, Q * T), cfg)
    x, _ = vit.transformer_stack(x, model["blocks"], cfg, mask=vqa_mask(N, Q, T),
                                 exact_gelu=False)
    logits = linear(layer_norm(x[:, N:], model["norm"]), model["head"])
    return logits.reshape(B, Q, T, -1)


def answer_loss(params: dict, image: jax.Array, text: jax.Array, is_answer: jax.Array,
                cfg: decoder.DecoderConfig) -> jax.Array:
    """Mean cross-entropy of the answers' tokens and ends, where is_answer (B,Q,T) bool is True."""
    logits = reader_logits(params, image, text[..., :-1], cfg)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, text[..., 1:])
    return (losses * is_answer[..., 1:]).sum() / is_answer.sum()


def is_correct(params: dict, image: jax.Array, text: jax.Array, is_answer: jax.Array,
               cfg: decoder.DecoderConfig) -> jax.Array:
    """(B,Q) bool: whether the greedy answer is the true one. That is so if each of its tokens and
    its end are the likeliest after the true ones before, so nothing needs to be generated."""
    likeliest = reader_logits(params, image, text[..., :-1], cfg).argmax(-1)
    return ((likeliest == text[..., 1:]) | ~is_answer[..., 1:]).all(-1)


# -------------------------------------------------------------------- training and testing
def encode_questions(tok: tokenizer.WordPiece, questions: list[list[Question]],
                     T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """text (B,Q,T) int32, is_answer (B,Q,T) bool and kinds (B,Q) int, -1 where an image has fewer
    than Q questions."""
    Q = max(map(len, questions))
    text = np.zeros((len(questions), Q, T), np.int32)
    is_answer = np.zeros(text.shape, bool)
    kinds = np.full((len(questions), Q), -1)
    for b, of_image in enumerate(questions):
        for q, (kind, question, answer) in enumerate(of_image):
            before = tok.encode_pieces(question)
            tokens = [*before, *tok.encode_pieces(answer), decoder.EOS]
            text[b, q, :len(tokens)] = tokens
            is_answer[b, q, len(before):len(tokens)] = True
            kinds[b, q] = KINDS.index(kind)
    return text, is_answer, kinds


def join_texts(questions: list[list[Question]]) -> list[str]:
    return [f"{question} {answer}" for _, question, answer in itertools.chain(*questions)]


def train_reader(tokens: tuple[np.ndarray, np.ndarray],
                 questions: tuple[list[list[Question]], list[list[Question]]], seed: int = 0,
                 steps: int = 1500, batch: int = 32, per_image: int = 4, lr: float = 2e-3,
                 size: str = "micro", name: str = "") -> dict[str, float]:
    """Trains a reader, and returns the share of right validation answers by kind and their mean as
    "all". tokens and questions: (training, validation), the tokens (B,N,E). A step draws
    `per_image` questions about each of `batch` images. Everything follows from the seed."""
    tok = tokenizer.train_vocab(join_texts(questions[0]), 1000)
    texts = join_texts(questions[0]) + join_texts(questions[1])
    T = 1 + max(len(tok.encode_pieces(text)) for text in texts)
    text, is_answer, kinds = encode_questions(tok, questions[0], T)
    mean, deviation = tokens[0].mean((0, 1)), tokens[0].std((0, 1)) + 1e-6
    image, val_image = (tokens[0] - mean) / deviation, (tokens[1] - mean) / deviation
    cfg = decoder.decoder_config(size, len(tok), 4 * decoder.DECODER_SIZES[size][1])
    params = init_params(jax.random.key(seed), reader_specs(cfg, image.shape[-1]))
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, min(100, steps // 5), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0),
                            optax.adamw(schedule, b2=0.95, weight_decay=0.05))
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, image, text, is_answer):
        loss, grads = jax.value_and_grad(answer_loss)(params, image, text, is_answer, cfg)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    weights = np.array([*[DRAW_WEIGHT.get(kind, 1) for kind in KINDS], 0])  # the last is of kind -1
    rng = np.random.default_rng((seed, 2))
    num_train = len(questions[0])
    epochs = [rng.permutation(num_train) for _ in range(-(-steps * batch // num_train))]
    order = np.concatenate(epochs)
    bar = tqdm(range(steps), desc=name or "reader", unit=" steps", mininterval=0.5,
               dynamic_ncols=True)
    for step in bar:
        rows = order[step * batch:(step + 1) * batch]
        # u ** 0 = 1 ranks last: an absent question is drawn only if there are too few others
        ranks = rng.random(kinds[rows].shape) ** weights[kinds[rows]]
        drawn = ranks.argsort(1)[:, :per_image, None]
        params, opt_state, loss = train_step(params, opt_state, image[rows],
                                             np.take_along_axis(text[rows], drawn, 1),
                                             np.take_along_axis(is_answer[rows], drawn, 1))
        if step % 50 == 49:
            bar.set_postfix(loss=f"{float(loss):.3f}")
    return grade_answers(params, val_image, encode_questions(tok, questions[1], T), cfg)


def grade_answers(params: dict, image: np.ndarray, encoded: tuple[np.ndarray, ...],
                  cfg: decoder.DecoderConfig) -> dict[str, float]:
    """The share of right answers by kind, and their mean as "all"."""
    text, is_answer, kinds = encoded
    grade = jax.jit(functools.partial(is_correct, cfg=cfg))
    batches = []
    for start in range(0, len(image), 100):
        rows = slice(start, start + 100)
        batches.append(np.asarray(grade(params, image[rows], text[rows], is_answer[rows])))
    right = np.concatenate(batches)
    accuracies = {}
    for k, kind in enumerate(KINDS):
        if (kinds == k).any():
            accuracies[kind] = float(right[kinds == k].mean())
    return with_mean(accuracies)


def measure(encoder: Encoder, seed: int = 0, steps: int = 1500, name: str = "") -> dict[str, float]:
    """The share of questions about validation images that a reader of the encoder's tokens answers
    right, by kind, and their mean as "all"."""
    parts = ("train", NUM_TRAIN), ("val", NUM_VAL)
    tokens, questions = [], []
    for split, count in parts:
        pixels = question_images(seed, split, count, encoder.resolution)
        tokens.append(encoder(pixels, batch=256).tokens)
        questions.append(make_questions(seed, split, count))
    return train_reader(tuple(tokens), tuple(questions), seed, steps, name=name)


def measure_all(encoder: Encoder, seed: int = 0, steps: int = 1500) -> dict[str, dict[str, float]]:
    """`measure` of the encoder, of a random one, and of raw pixels; and the blind accuracy."""
    encoders = {"encoder": encoder, "random encoder": random_encoder(encoder, seed),
                "raw pixels": raw_pixel_encoder(encoder)}
    rows = {name: measure(each, seed, steps, name) for name, each in encoders.items()}
    train, val = make_questions(seed, "train", NUM_TRAIN), make_questions(seed, "val", NUM_VAL)
    return rows | {"without the image": blind_accuracy(train, val)}
