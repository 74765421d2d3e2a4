"""Does it see? Held-out loss, the loss without the picture, and captions graded against what is there.

A captioner lowers its loss a good way without looking, by knowing how captions go. So each figure stands beside a
floor, the loss that can be had without the picture: for `scenes` the exact entropy of the captions (scenes.surprise),
for other data the lowest loss that the run has reached on pictures that were shuffled among the captions. "It sees"
means a held-out loss clearly below the floor.

Letters: B images, K kept patches, T text positions.

    python evaluate.py RUN        measures the last checkpoint of a run again, on its held-out pictures
"""
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import baselines
import data
import sources
from config import Config
from decoder import caption_loss, generate, target_count
from devices import Place, remember_programs
from masking import keep
from vit import vit


def keys(batch: dict) -> jax.Array:
    """Of all draws, one a picture (B,)."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(0), row))(batch["row"])


def look(params: dict, batch: dict, model: Any) -> tuple[jax.Array, jax.Array]:
    """Kept image tokens (B,K,D) of held-out pictures and which they are (B,K): the draw depends on the picture's
    place in the held-out set alone, so that every evaluation of every run sees the same patches."""
    tokens = vit(params["encoder"], batch["images"], model.encoder)["tokens"]
    return keep(keys(batch), tokens, model.keep_ratio, model.shuffle)


def make_loss(model: Any, devices: list | None = None) -> Any:
    """pmapped (params, batch) -> (summed loss, predicted words), over the batches of all devices. A baseline has its own two sums;
    where it contrasts, then within the evaluated batch."""
    def loss(params, batch):
        if model.objective != "openvision2":
            return jax.lax.psum(baselines.HELD_OUT[model.objective](params, batch, keys(batch), model), "devices")
        kept, _ = look(params, batch, model)
        sums = caption_loss(params["decoder"], kept, batch["text"], model.decoder).sum(), target_count(batch["text"]).sum()
        return jax.lax.psum(sums, "devices")
    return jax.pmap(loss, axis_name="devices", devices=devices)


def make_captions(model: Any, length: int, devices: list | None = None) -> Any:
    """pmapped (params, batch) -> greedy captions (B,T), empty where the objective makes none, and kept patches (B,K) of the whole
    batch, on every device."""
    def captions(params, batch):
        if model.objective == "openvision2":
            kept, chosen = look(params, batch, model)
            found = generate(params["decoder"], kept, model.decoder, length), chosen
        else:
            B, N = len(batch["text"]), (batch["images"].shape[1] // model.encoder.patch) ** 2
            tell = baselines.TELL.get(model.objective)
            found = tell(params, batch, model) if tell else jnp.zeros_like(batch["text"]), jnp.broadcast_to(jnp.arange(N), (B, N))
        return jax.tree.map(functools.partial(jax.lax.all_gather, axis_name="devices", tiled=True), found)
    return jax.pmap(captions, axis_name="devices", devices=devices)


def held_out(reader: data.Reader, count: int, resolution: int, batch: int, share: range) -> Iterator[tuple[dict, int]]:
    """(this process's share of a batch, pictures in the whole batch) over the held-out pictures. The last batch is
    filled up with pictures whose text is empty, which add nothing to a loss."""
    for start in range(0, count, batch):
        real = min(batch, count - start)
        rows = range(start + share.start, start + share.stop)
        found = reader.batch(rows, resolution)
        for name in found.keys() & {"text", "alt"}:
            found[name][max(0, count - rows.start):] = 0
        yield found, real


class HeldOut:
    """The held-out pictures of a run at one resolution, and what can be asked of a model about them."""

    def __init__(self, cfg: Config, reader: data.Reader, resolution: int, batch: int, model: Any, place: Place,
                 check: Callable[[], None] = lambda: None):
        """check() is called between batches, and may raise to end what is long."""
        self.check, self.reader, self.count = check, reader, min(cfg.val_count, len(reader.source))
        self.model, self.length, self.place = model, cfg.text_length, place
        batch = min(batch, math.ceil(self.count / place.total) * place.total)
        self.batches = list(held_out(reader, self.count, resolution, batch, place.share(batch)))
        def everyones(name: str) -> np.ndarray:  # of all processes' rows, in order
            mine = np.stack([b[name] for b, _ in self.batches])
            return np.concatenate(place.everyones(mine), axis=1).reshape(-1, *mine.shape[2:])
        self.index, self.texts = everyones("index"), {name: everyones(name) for name in reader.fields}
        self.tells = model.objective == "openvision2" or model.objective in baselines.TELL
        self.rows = place.share(batch), batch
        self.loss, self.captions = make_loss(model, place.pmap), make_captions(model, cfg.text_length, place.pmap)

    def losses(self, params: Any) -> dict[str, float]:
        """val_loss, and shuffled_loss: with the captions moved on by half of the set."""
        moved = np.arange(len(self.index))
        real = np.flatnonzero(self.texts["text"].any(-1))
        moved[real] = np.roll(real, len(real) // 2)
        out, (share, size) = {}, self.rows
        for name, texts in (("val_loss", self.texts), ("shuffled_loss", {k: v[moved] for k, v in self.texts.items()})):
            sums = np.zeros(2)
            for n, (batch, _) in enumerate(self.batches):
                self.check()
                mine = {k: v[n * size + share.start:n * size + share.stop] for k, v in texts.items()}
                sums += [float(self.place.get(x)) for x in self.loss(params, self.place.put(batch | mine))]
            out[name] = float(sums[0] / sums[1])
        return out

    def blind(self) -> float | None:
        """The least loss that can be had without looking, where it is known: for `scenes`, and for CLIP, whose loss is among the
        pictures of an evaluated batch."""
        surprise = words = None
        if isinstance(self.reader.source, sources.Scenes):
            texts = [self.reader.tokenizer.encode(self.reader.source.caption(i), self.length) for i in range(self.count)]
            if not any(t[-1] for t in texts):  # else a caption may be cut: what is left of its entropy is not known
                surprise = np.array([self.reader.source.surprise(i) for i in range(self.count)])
                words = np.array([(t[1:] != 0).sum() for t in texts])
        pictures = np.concatenate([batch["images"][:real] for batch, real in self.batches])
        return baselines.floor(self.model.objective, [real for _, real in self.batches], surprise, words,
                               lambda: baselines.pixel_targets(pictures, self.model.encoder.patch))

    def write(self, params: Any, count: int | None = None) -> Iterator[tuple[int, str, np.ndarray]]:
        """(sample, greedy caption, kept patches (K,)) of held-out pictures, `count` or all."""
        done = 0
        for batch, real in self.batches:
            self.check()
            words, chosen = (self.place.get(x) for x in self.captions(params, self.place.put(batch)))
            for n in range(real):
                if count is None or done < count:
                    yield int(self.index[done]), self.reader.tokenizer.decode(words[n]), chosen[n]
                done += 1
            if count is not None and done >= count:
                return


def grades(held: HeldOut, params: Any) -> dict[str, float]:
    """For `scenes`: the share of right captions, words, objects and attributes among greedy captions."""
    right: dict[str, list[int]] = {}
    for i, text, _ in held.write(params):
        for name, pair in held.reader.source.grade(text, i).items():
            right.setdefault(name, []).append(pair)
    shares = {name: float(np.sum([r for r, _ in pairs]) / np.sum([n for _, n in pairs])) for name, pairs in right.items()}
    names = {"exact": "exact_match"}
    return {names.get(name, f"{name}_accuracy"): share for name, share in shares.items()}


if __name__ == "__main__":
    import sys

    import checkpoint
    from config import ConfigError, check
    from run import Run, init
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python evaluate.py RUN, a folder that train.py made")
    remember_programs()
    try:
        with open(os.path.join(sys.argv[1], "config.json"), encoding="utf-8") as f:
            cfg = Config(**(json.load(f) | {"out": sys.argv[1]}))
        run = Run(cfg, Place(), write=False)
        check(cfg, run.place.total)
        if run.arrays is None:
            raise checkpoint.CheckpointError(f"{sys.argv[1]} has no checkpoint yet")
        stage = next(s for s in run.plan if run.step <= s.end)
        held = HeldOut(cfg, run.val_reader, stage.resolution, stage.batch, run.model, run.place)
        params = run.place.copies(checkpoint.restore(run.arrays, jax.eval_shape(lambda: init(cfg, run.model)), under="params"))
        floor = {"floor_loss": run.state["best_shuffled"] if held.blind() is None else held.blind()}
        print(json.dumps(held.losses(params) | floor | (grades(held, params) if isinstance(run.val_source, sources.Scenes) else {}), indent=1))
    except (OSError, TypeError, json.JSONDecodeError) as problem:
        sys.exit(f"error: {sys.argv[1]} is not the folder of a run ({problem})")
    except (ConfigError, sources.DataError, checkpoint.CheckpointError) as problem:
        sys.exit(f"error: {problem}")
