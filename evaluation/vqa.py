"""Visual question answering on a frozen encoder, the way of LLaVA (arXiv:2304.08485): what can a language model read from the features?

The encoder's patch tokens go through a connector, a 2-layer MLP, in front of a question about the scene (evaluation/questions.py); a small causal
language model then says the answer. Connector and model are trained from scratch on the answers' cross-entropy; the encoder never changes.
Beside each figure stand those of raw pixels and of an encoder that has learned nothing, read in the same way, and the share that is had right
without the picture.

Letters: B pictures, N patch tokens, E their width, Q questions a picture, T words of question and answer, S = N + Q*T, D width, V words.

    python -m evaluation.vqa ENCODER        the table, in minutes; ENCODER is a run's folder or an encoder's .npz
"""
import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import decoder
import layers
import vit
from evaluation.questions import KINDS, blind_accuracy, make_questions, question_scenes, summary
from inputs import images, scenes, tokenizer
from interop.encoder import Encoder, load_encoder, random_encoder, raw_pixel_encoder
from layers import layer_norm, linear
from runtime import checkpoint
from runtime.checkpoint import model_size
from runtime.cpu_tuning import enable_compilation_cache, tune_cpu
from runtime.errors import CheckpointError

TRAIN, HELD = 8000, 1000    # pictures
WEIGHT = {"word": 3}        # in training, of drawing a question of that kind: it has the most answers, and half of the pictures have none


@functools.lru_cache(4)
def pictures(seed: int, split: str, count: int, resolution: int) -> np.ndarray:
    """(count,R,R,3) uint8: drawn once for all encoders of that resolution."""
    return np.stack([images.decode_and_augment(scenes.render(scene), resolution) for scene in question_scenes(seed, split, count)])


def tokens(encoder: Encoder, images: np.ndarray, batch: int = 256) -> np.ndarray:
    """(B,N,E) fp32 of images (B,R,R,3)."""
    return np.concatenate([np.asarray(encoder.run(encoder.params, images[i:i + batch]).tokens, np.float32) for i in range(0, len(images), batch)])


def reader_specs(cfg: decoder.DecoderConfig, E: int) -> dict:
    """The connector's first layer reads a token and its place in the grid; its second one is the language model's projection."""
    return {"connector": layers.dense_specs(E + cfg.width, cfg.image_width), "model": decoder.param_specs(cfg)}


def vqa_mask(N: int, Q: int, T: int) -> np.ndarray:
    """(S,S) bool: each question sees the picture and its own words before it, and no other question. As nothing but this mask orders the
    words, each is read as if it stood alone behind the picture."""
    group = np.repeat(np.arange(Q + 1), [N] + [T] * Q)
    return np.tri(len(group), dtype=bool) & ((group[:, None] == group) | (group == 0))


def read(params: dict, image: jax.Array, text: jax.Array, cfg: decoder.DecoderConfig) -> jax.Array:
    """image (B,N,E), text (B,Q,T) int32 to the scores (B,Q,T,V) of the word that comes after each."""
    (B, N, _), (_, Q, T) = image.shape, text.shape
    place = jnp.broadcast_to(vit.sincos_position_embedding(round(N ** 0.5), cfg.width), (B, N, cfg.width))
    hidden = jax.nn.gelu(linear(jnp.concatenate([image, place], axis=-1), params["connector"]))
    x = decoder.embed_sequence(params["model"], hidden, text.reshape(B, Q * T), cfg)
    x, _ = vit.transformer_stack(x, params["model"]["blocks"], cfg, mask=vqa_mask(N, Q, T), exact_gelu=False)
    return linear(layer_norm(x[:, N:], params["model"]["norm"]), params["model"]["head"]).reshape(B, Q, T, -1)


def loss(params: dict, image: jax.Array, text: jax.Array, answer: jax.Array, cfg: decoder.DecoderConfig) -> jax.Array:
    """Mean cross-entropy of the answers' words and ends. answer (B,Q,T) bool: which of the words are answer."""
    scores = read(params, image, text[..., :-1], cfg)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, text[..., 1:])
    return (losses * answer[..., 1:]).sum() / answer.sum()


def is_correct(params: dict, image: jax.Array, text: jax.Array, answer: jax.Array, cfg: decoder.DecoderConfig) -> jax.Array:
    """(B,Q) bool: is the greedy answer the true one, word for word? It is just where each of its words, and its end, is the likeliest after
    the true ones before it: so nothing need be generated."""
    said = read(params, image, text[..., :-1], cfg).argmax(-1)
    return ((said == text[..., 1:]) | ~answer[..., 1:]).all(-1)


def encode(tok: tokenizer.WordPiece, asked: list, Q: int, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """text (B,Q,T) int32, which of it is answer (B,Q,T) bool, and kinds (B,Q) int (-1: no question), of B pictures' questions."""
    text, answer = np.zeros((len(asked), Q, T), np.int32), np.zeros((len(asked), Q, T), bool)
    kinds = np.full((len(asked), Q), -1)
    for b, several in enumerate(asked):
        for q, (kind, question, reply) in enumerate(several):
            before, after = tok.encode_pieces(question), [*tok.encode_pieces(reply), decoder.EOS]
            text[b, q, :len(before) + len(after)] = before + after
            answer[b, q, len(before):len(before) + len(after)] = True
            kinds[b, q] = KINDS.index(kind)
    return text, answer, kinds


def train_reader(seen: tuple[np.ndarray, np.ndarray], asked: tuple[list, list], seed: int = 0, steps: int = 1500, batch: int = 32, several: int = 4,
          lr: float = 2e-3, size: str = "micro", name: str = "") -> dict[str, float]:
    """Trains connector and model on training tokens (B,N,E) and their questions, and returns the share of held-out questions answered right,
    by kind, and their mean as "all". A step is `several` questions each about `batch` pictures. All follows from the seed."""
    train, held = asked
    tok = tokenizer.train_vocab((f"{q} {a}" for several_ in train for _, q, a in several_), 1000)
    T = 1 + max(len(tok.encode_pieces(f"{q} {a}")) for part in asked for several_ in part for _, q, a in several_)
    text, answer, kinds = encode(tok, train, max(map(len, train)), T)
    mean, deviation = seen[0].mean((0, 1)), seen[0].std((0, 1)) + 1e-6
    image, unseen = ((x - mean) / deviation for x in seen)
    E = image.shape[-1]
    cfg = decoder.decoder_config(size, len(tok), 4 * decoder.DECODER_SIZES[size][1])
    params = layers.init_params(jax.random.key(seed), reader_specs(cfg, E))
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, min(100, steps // 5), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.05))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, image, words, wanted):
        value, grads = jax.value_and_grad(loss)(params, image, words, wanted, cfg)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    weight = np.array([WEIGHT.get(kind, 1) for kind in KINDS] + [0])          # the last one is of no question: u**0 comes last
    state, rng = optimizer.init(params), np.random.default_rng((seed, 2))
    order = np.concatenate([rng.permutation(len(train)) for _ in range(-(-steps * batch // len(train)))])
    bar = tqdm(range(steps), desc=name or "reader", unit=" steps", mininterval=0.5, dynamic_ncols=True)
    for at in bar:
        rows = order[at * batch:(at + 1) * batch]
        drawn = (rng.random(kinds[rows].shape) ** weight[kinds[rows]]).argsort(1)[:, :several]     # (batch, several) questions of each
        params, state, value = step(params, state, image[rows], *(np.take_along_axis(a[rows], drawn[..., None], 1) for a in (text, answer)))
        if at % 50 == 49:
            bar.set_postfix(loss=f"{float(value):.3f}")

    text, answer, kinds = encode(tok, held, max(map(len, held)), T)
    grade = jax.jit(lambda params, *part: is_correct(params, *part, cfg))
    good = np.concatenate([np.asarray(grade(params, *(a[i:i + 100] for a in (unseen, text, answer)))) for i in range(0, len(held), 100)])
    return summary({kind: float(good[kinds == k].mean()) for k, kind in enumerate(KINDS) if (kinds == k).any()})


def measure(encoder: Encoder, seed: int = 0, steps: int = 1500, name: str = "") -> dict[str, float]:
    """What can be read from an encoder: the share of answers right by kind, and their mean "all", about held-out pictures. The encoder runs
    once on each picture."""
    parts = ("train", TRAIN), ("val", HELD)
    seen = tuple(tokens(encoder, pictures(seed, *part, encoder.resolution)) for part in parts)
    return train_reader(seen, tuple(make_questions(seed, *part) for part in parts), seed, steps, name=name)


def table(encoder: Encoder, seed: int = 0, steps: int = 1500, baselines: bool = True) -> dict[str, dict[str, float]]:
    """`measure` by what is read: the encoder, and what it must beat."""
    found = {"encoder": measure(encoder, seed, steps, name="encoder")}
    if baselines:
        found["random encoder"] = measure(random_encoder(encoder, seed), seed, steps, name="random encoder")
        found["raw pixels"] = measure(raw_pixel_encoder(encoder), seed, steps, name="raw pixels")
    return found | {"without the picture": blind_accuracy(make_questions(seed, "train", TRAIN), make_questions(seed, "val", HELD))}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="evaluation/vqa.py", allow_abbrev=False, description="What a small language model can read from a frozen encoder: the "
                                     "share of questions about held-out scenes that it answers right (python -m evaluation.questions asks some of each kind), "
                                     "beside what the encoder must beat, and what is had right without the picture.")
    parser.add_argument("encoder", help="a run's folder, a checkpoint, or an encoder's .npz")
    parser.add_argument("--seed", type=int, default=0, help="of questions, pictures, first weights and order (default: 0)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps; fewer are faster and read less (default: 1500)")
    parser.add_argument("--no-baselines", action="store_true", help="the encoder alone, without raw pixels and a random encoder beside it")
    parser.add_argument("--json", default="", help="also write the figures to this file (null: no such question was asked)")
    given = parser.parse_args(argv)
    if given.steps < 1 or given.seed < 0:
        parser.error("--steps must be 1 or more, --seed 0 or more")
    tune_cpu(model_size(given.encoder))
    try:
        found = table(load_encoder(given.encoder), given.seed, given.steps, not given.no_baselines)
        if given.json:
            checkpoint.atomic_write(given.json, lambda f: f.write(checkpoint.to_json(found, indent=1).encode()))
    except (CheckpointError, ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    print("| answers right (%) | " + " | ".join(found["encoder"]) + " |\n|---|" + "---|" * len(found["encoder"]))
    for name, shares in found.items():
        print(f"| {name} | " + " | ".join(f"{100 * share:.1f}" for share in shares.values()) + " |")
    return 0


if __name__ == "__main__":
    enable_compilation_cache()
    sys.exit(main(sys.argv[1:]))
