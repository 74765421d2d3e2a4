"""TODO."""
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import data
from config import Config
from decoder import caption_loss, count_targets, generate
from inputs import sources
from masking import keep_random_tokens
from objectives import registry
from runtime.devices import DataParallel
from vit import vit


def draw_keys(batch: dict) -> jax.Array:
    """Of all draws, one a picture (B,)."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(0), row))(batch["sample_index"])


def kept_validation_tokens(params: dict, batch: dict, model: Any) -> tuple[jax.Array, jax.Array]:
    """Kept image tokens (B,K,D) of held-out pictures and which they are (B,K): the draw depends on the picture's
    place in the held-out set alone, so that every evaluation of every run sees the same patches."""
    tokens = vit(params["encoder"], batch["images"], model.encoder)["tokens"]
    return keep_random_tokens(draw_keys(batch), tokens, model.keep_ratio, model.shuffle_kept)


def validation_loss(objective: str) -> Any:
    module = registry.rival(objective)
    return getattr(module, "validation_loss", module.loss)


def make_loss(model: Any, devices: list | None = None) -> Any:
    """pmapped (params, batch) -> (summed loss, predicted words), over the batches of all devices. A baseline has its own two sums;
    where it contrasts, then within the evaluated batch."""
    def loss(params, batch):
        if model.objective != "openvision2":
            return jax.lax.psum(validation_loss(model.objective)(params, batch, draw_keys(batch), model), "devices")
        kept, _ = kept_validation_tokens(params, batch, model)
        sums = caption_loss(params["decoder"], kept, batch["text"], model.decoder).sum(), count_targets(batch["text"]).sum()
        return jax.lax.psum(sums, "devices")
    return jax.pmap(loss, axis_name="devices", devices=devices)


def make_captions(model: Any, length: int, devices: list | None = None) -> Any:
    """pmapped (params, batch) -> greedy captions (B,T), empty where the objective makes none, and kept patches (B,K) of the whole
    batch, on every device."""
    def captions(params, batch):
        if model.objective == "openvision2":
            kept, chosen = kept_validation_tokens(params, batch, model)
            found = generate(params["decoder"], kept, model.decoder, length), chosen
        else:
            B, N = len(batch["text"]), (batch["images"].shape[1] // model.encoder.patch_size) ** 2
            tell = registry.rival(model.objective).generate if registry.can_caption(model.objective) else None
            found = tell(params, batch, model) if tell else jnp.zeros_like(batch["text"]), jnp.broadcast_to(jnp.arange(N), (B, N))
        return jax.tree.map(functools.partial(jax.lax.all_gather, axis_name="devices", tiled=True), found)
    return jax.pmap(captions, axis_name="devices", devices=devices)


def validation_batches(reader: data.Loader, count: int, resolution: int, batch: int, share: range) -> Iterator[tuple[dict, int]]:
    """(this process's share of a batch, pictures in the whole batch) over the held-out pictures. The last batch is
    filled up with pictures whose text is empty, which add nothing to a loss."""
    for start in range(0, count, batch):
        real = min(batch, count - start)
        rows = range(start + share.start, start + share.stop)
        found = reader.batch(rows, resolution)
        for name in found.keys() & {"text", "alt"}:
            found[name][max(0, count - rows.start):] = 0
        yield found, real


class ValidationSet:
    """The held-out pictures of a run at one resolution, and what can be asked of a model about them."""

    def __init__(self, cfg: Config, reader: data.Loader, resolution: int, batch: int, model: Any, parallel: DataParallel,
                 check: Callable[[], None] = lambda: None):
        """check() is called between batches, and may raise to end what is long."""
        self.check, self.reader, self.count = check, reader, min(cfg.val_samples, len(reader.source))
        self.model, self.length, self.parallel = model, cfg.max_text_len, parallel
        batch = min(batch, math.ceil(self.count / parallel.num_devices) * parallel.num_devices)
        self.batches = list(validation_batches(reader, self.count, resolution, batch, parallel.local_rows(batch)))
        def everyones(name: str) -> np.ndarray:  # of all processes' rows, in order
            mine = np.stack([b[name] for b, _ in self.batches])
            return np.concatenate(parallel.all_gather(mine), axis=1).reshape(-1, *mine.shape[2:])
        self.index, self.texts = everyones("source_index"), {name: everyones(name) for name in reader.fields}
        self.can_caption = registry.can_caption(model.objective)
        self.rows = parallel.local_rows(batch), batch
        self.loss, self.captions = make_loss(model, parallel.pmap_devices), make_captions(model, cfg.max_text_len, parallel.pmap_devices)

    def losses(self, params: Any) -> dict[str, float]:
        """val_loss, and val_loss_shuffled: with the captions moved on by half of the set."""
        moved = np.arange(len(self.index))
        real = np.flatnonzero(self.texts["text"].any(-1))
        moved[real] = np.roll(real, len(real) // 2)
        out, (share, size) = {}, self.rows
        for name, texts in (("val_loss", self.texts), ("val_loss_shuffled", {k: v[moved] for k, v in self.texts.items()})):
            sums = np.zeros(2)
            for n, (batch, _) in enumerate(self.batches):
                self.check()
                mine = {k: v[n * size + share.start:n * size + share.stop] for k, v in texts.items()}
                sums += [float(self.parallel.unreplicate(x)) for x in self.loss(params, self.parallel.shard_batch(batch | mine))]
            out[name] = float(sums[0] / sums[1])
        return out

    def blind_loss(self) -> float | None:
        """The least loss that can be had without looking, where it is known: for `scenes`, and for CLIP, whose loss is among the
        pictures of an evaluated batch."""
        surprise = words = None
        if isinstance(self.reader.source, sources.SceneSource):
            texts = [self.reader.tokenizer.encode(self.reader.source.caption(i), self.length) for i in range(self.count)]
            if not any(t[-1] for t in texts):  # else a caption may be cut: what is left of its entropy is not known
                surprise = np.array([self.reader.source.caption_nats(i) for i in range(self.count)])
                words = np.array([(t[1:] != 0).sum() for t in texts])

        def targets() -> np.ndarray:  # of all validation images at once: for the one loss that is on pixels
            images = np.concatenate([batch["images"][:real] for batch, real in self.batches])
            return np.asarray(registry.rival("aimv2").pixel_targets(images, self.model.encoder.patch_size))
        return registry.blind_loss(self.model.objective, registry.BlindFacts([real for _, real in self.batches], surprise, words, targets))

    def generate_captions(self, params: Any, count: int | None = None) -> Iterator[tuple[int, str, np.ndarray]]:
        """(sample, greedy caption, kept patches (K,)) of held-out pictures, `count` or all."""
        done = 0
        for batch, real in self.batches:
            self.check()
            words, chosen = (self.parallel.unreplicate(x) for x in self.captions(params, self.parallel.shard_batch(batch)))
            for n in range(real):
                if count is None or done < count:
                    yield int(self.index[done]), self.reader.tokenizer.decode(words[n]), chosen[n]
                done += 1
            if count is not None and done >= count:
                return


def caption_metrics(held: ValidationSet, params: Any) -> dict[str, float]:
    """For `scenes`: the share of right captions, words, objects and attributes among greedy captions."""
    right: dict[str, list[int]] = {}
    for i, text, _ in held.generate_captions(params):
        for name, pair in held.reader.source.grade(text, i).items():
            right.setdefault(name, []).append(pair)
    shares = {name: float(np.sum([r for r, _ in pairs]) / np.sum([n for _, n in pairs])) for name, pairs in right.items()}
    names = {"exact": "exact_match"}
    return {names.get(name, f"{name}_accuracy"): share for name, share in shares.items()}
