"""Does it see? Held-out loss, the loss without the picture, and captions graded against what is there.

A captioner lowers its loss a good way without looking, by knowing how captions go. So each figure stands beside a
floor, the loss that can be had without the picture: for `scenes` the exact entropy of the captions (scenes.surprise),
for other data the lowest loss that the run has reached on pictures that were shuffled among the captions. "It sees"
means a held-out loss clearly below the floor.

Letters: B images, K kept patches, T text positions.

    python evaluate.py RUN                                        measures the last checkpoint of a run again, on its held-out pictures
    python evaluate.py ENCODER probe knn vqa zeroshot pictures    what can be read from its features (probe.py, vqa.py), said (zeroshot.py) and seen (look.py)
"""
import argparse
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import baselines
import caption
import checkpoint
import convert
import data
import features
import labels
import probe
import run
import sources
import tokenizer
import vqa
import zeroshot
from config import Config, ConfigError, check, model, stages
from decoder import caption_loss, generate, target_count
from devices import Place, hasten, remember_programs
from look import draw
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

        def targets() -> np.ndarray:  # of all validation images at once: for the one loss that is on pixels
            images = np.concatenate([batch["images"][:real] for batch, real in self.batches])
            return np.asarray(baselines.pixel_targets(images, self.model.encoder.patch))
        return baselines.floor(self.model.objective, [real for _, real in self.batches], surprise, words, targets)

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


# ------------------------------------------------------------------------------------------------------- the command line
def asked_of(cfg: Config, changes: dict[str, Any], count: int) -> Config:
    """The run's settings with changes, and `count` held-out pictures (0: as many as the run has). But what the run has held out of its
    training data stays that, whatever the count: another number would be another draw, nearly all of which the run was trained on."""
    new = dataclasses.replace(cfg, **changes)
    return new if not count or (not new.val and new.data == cfg.data != "scenes") else dataclasses.replace(new, val_count=count)


def captions(path: str, changes: dict[str, Any], count: int = 0) -> dict[str, float]:
    """Losses and grades of a run's last checkpoint, or of the one that is named, on its held-out pictures, or `count` of them; or, by changes
    of its settings, on others. Where no floor is known and they are not the run's very pictures, it is their own shuffled loss."""
    own, arrays, meta = features.newest(path)
    cfg = asked_of(own, changes, count)
    check(cfg)
    stage = next(s for s in stages(cfg) if meta["step"] <= s.end)
    # The batch stays the run's, because a contrastive loss depends on it: where it cannot be divided by all devices, fewer are used.
    place, networks = Place(math.gcd(stage.batch, jax.local_device_count())), model(cfg)
    params = place.copies(checkpoint.restore(arrays, jax.eval_shape(lambda: run.init(cfg, networks)), path, under="params"))
    source = run.open_held_out(cfg)
    if not changes and cfg == own and source.fingerprint() != meta["data"]["held-out data"]:
        raise ConfigError(f"the held-out data is now {source.fingerprint()}, and was {meta['data']['held-out data']}: "
                          "name what to measure on with --data and --val")
    reader = data.Reader(source, tokenizer.restore(meta["vocabulary"]), cfg.text_length, cfg.seed, None, cfg.workers, cfg.alt)
    held = HeldOut(dataclasses.replace(cfg, val_count=count or cfg.val_count), reader, stage.resolution, stage.batch, networks, place)
    losses, blind = held.losses(params), held.blind()
    floor = blind if blind is not None else losses["shuffled_loss"] if changes or count else meta["best_shuffled"]
    return losses | {"floor_loss": floor} | (grades(held, params) if isinstance(source, sources.Scenes) and held.tells else {})


def open_encoder(path: str, resolution: int) -> tuple[features.Encoder, dict[str, Any]]:
    """The encoder of a run, a checkpoint, an .npz, or of what convert.py exported; and the settings of the run that it is from, if that is known."""
    if path.endswith((".safetensors", ".bin")) or (os.path.isdir(path) and any(n.endswith((".safetensors", ".bin")) for n in os.listdir(path))):
        params, cfg, found, _ = convert.recognise(convert.load_arrays(path), 0)
        return features.Encoder(params, cfg, resolution or found), {}
    params, cfg, meta = features.read(path)
    return features.Encoder(params, dataclasses.replace(cfg, dtype="float32", remat="none"), resolution or meta["resolution"]), meta.get("config", {})


class Asked:
    """What a command line asks: encoder, decoder and pictures, each opened when it is first wanted, and once."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.changes = {name: getattr(given, name) for name in ("data", "val", "caption") if getattr(given, name) is not None}
        if "data" in self.changes:
            self.changes.setdefault("val", "")

    @functools.cached_property
    def opened(self) -> tuple[features.Encoder, dict]:
        return open_encoder(self.given.encoder, self.given.resolution)

    @property
    def encoder(self) -> features.Encoder:
        return self.opened[0]

    @functools.cached_property
    def own(self) -> Config:
        """The settings of the encoder's run, as far as they are known."""
        known = {f.name for f in dataclasses.fields(Config)}
        return Config(**{k: v for k, v in self.opened[1].items() if k in known})

    @functools.cached_property
    def captioner(self) -> Any:
        return caption.load(self.given.encoder)

    @functools.cached_property
    def pictures(self) -> tuple[labels.Pictures | None, labels.Pictures]:
        """Training pictures, if a probe is asked for, and held-out ones."""
        given, settings = self.given, asked_of(self.own, self.changes, 0)
        if not (settings.data or settings.val):
            raise ConfigError(f"--data is missing: {given.encoder} does not say what it was trained on")
        trains, drawn = bool({"probe", "knn"} & set(given.measures)), (settings.val or settings.data) == "scenes"
        many = (1000 if settings.data == "scenes" else 2000) if trains else 200 if "zeroshot" in given.measures else 12
        count = 1 << 30 if given.names == "all" and not drawn else given.count or many  # of what is drawn there is no end
        asked = given.label or (() if trains or drawn else (settings.caption,))
        return labels.open_pictures(asked_of(self.own, self.changes, count), asked, count, trains)


def probes(readers: tuple[str, ...]) -> Callable[[Asked], dict]:
    return lambda asked: probe.measure(asked.encoder, *asked.pictures, readers, seed=asked.given.seed)


def zero_shot(asked: Asked) -> dict[str, Any]:
    captioner, (_, held) = asked.captioner, asked.pictures
    rows = np.sort(sources.some(len(held), asked.given.count or 200))
    sentences, truth = zeroshot.classes(held, rows, asked.given.names, asked.given.template)
    known = truth >= 0
    return zeroshot.measure(captioner, held.features(asked.encoder).tokens[rows[known]], sentences, truth[known], seed=asked.given.seed)


def pictures(asked: Asked) -> dict[str, str]:
    path, (_, held) = asked.given.encoder, asked.pictures
    folder = asked.given.out or (path if os.path.isdir(path) else os.path.dirname(path) or ".")
    try:
        captioner = asked.captioner
    except checkpoint.CheckpointError as problem:
        print(f"words.png is left out: {problem}")
        captioner = None
    return {os.path.basename(p): p for p in draw(asked.encoder, held.pixels(asked.encoder.resolution)[:12], folder, captioner)}


MEASURES: dict[str, tuple[Callable[[Asked], dict], str]] = {
    "caption": (lambda asked: captions(asked.given.encoder, asked.changes, asked.given.count),
                "held-out loss, floor and graded captions of a run (if nothing is named)"),
    "probe": (probes(("pooled", "grid", "attended")), "linear and attention-pooled probes of the features, beside a random encoder and raw pixels"),
    "knn": (probes(("neighbours", "whitened")), "nearest neighbours by features, likewise"),
    "zeroshot": (zero_shot, "classes told by the likelihood of their sentences; needs a run"),
    "vqa": (lambda asked: vqa.table(asked.encoder, asked.given.seed), "questions about scenes, answered by a small language model that reads the features"),
    "pictures": (pictures, "pca.png, attention.png and, of a run, words.png"),
}


def show(name: str, found: dict[str, Any]) -> str:
    """Rows as a table of percentages, or as json what has none."""
    if not all(isinstance(row, dict) for row in found.values()):
        return checkpoint.to_json(found if name == "caption" else {name: found}, indent=1)
    columns = list(dict.fromkeys(column for row in found.values() for column in row))
    rows = {f"{name}, % right": {c: c for c in columns}} | {row: {c: f"{100 * share:.1f}" for c, share in cells.items()} for row, cells in found.items()}
    return "\n".join(f"{row:20}" + "".join(f"{cells.get(c, '–'):>{max(len(c), 5) + 2}}" for c in columns) for row, cells in rows.items())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="evaluate.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description="Does it see?\n\nmeasures:\n" + "\n".join(f"  {name:10} {text}" for name, (_, text) in MEASURES.items()))
    parser.add_argument("encoder", metavar="ENCODER", help="a run's folder, a checkpoint, an encoder's .npz, or what convert.py exported")
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help="any of the above (default: caption)")
    parser.add_argument("--data", help="pictures to train probes on: scenes, a folder or tars (default: those of the run)")
    parser.add_argument("--val", help="held-out pictures (default: those of the run, or, if --data is given, a part of that)")
    parser.add_argument("--caption", help="where captions are: txt, or a field of KEY.json (default: as in the run)")
    parser.add_argument("--label", type=lambda text: tuple(text.split(",")), default=(), metavar="FIELD,...",
                        help="the classes: fields of KEY.json, such as caption,category, or txt (default: all that scenes have)")
    parser.add_argument("--names", metavar="FILE", help="for zeroshot: the classes, one a line; or all, for every label of the held-out pictures "
                                                        "(default: the labels of the pictures that are measured)")
    parser.add_argument("--template", default="{}", help="for zeroshot: the sentence of a class, with {} for its name (default: {})")
    parser.add_argument("--count", type=int, default=0, help="held-out pictures at most; probes train on four times as many (default: of probe and knn 1,000 "
                                                             "scenes or 2,000 others, of zeroshot 200, of pictures 12, of caption as in the run)")
    parser.add_argument("--resolution", type=int, default=0, help="pixels a side, for all but caption (default: what it was trained at last)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument("--out", metavar="FOLDER", help="where pictures go (default: the run's folder)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures there (null: no right answer could be known)")
    given = parser.parse_intermixed_args(argv)
    if unknown := [name for name in given.measures if name not in MEASURES]:
        parser.error(f"unknown measure {unknown[0]!r}: take any of {', '.join(MEASURES)}")
    if given.count < 0 or given.count == 1 or given.resolution < 0 or given.seed < 0:
        parser.error("--count takes two or more, --resolution and --seed no negative numbers")
    if "{}" not in given.template:
        parser.error("--template needs {} where the name goes")
    hasten(features.model_size(given.encoder))
    remember_programs()
    asked, found = Asked(given), {}
    try:
        for name in given.measures or ["caption"]:
            found[name] = MEASURES[name][0](asked)
            print(show(name, found[name]), flush=True)
        if given.json:
            checkpoint.write(given.json, lambda f: f.write(checkpoint.to_json(found, indent=1).encode()))
        return 0
    except (ConfigError, sources.DataError, sources.BadSample, checkpoint.CheckpointError, convert.ConvertError, convert.LayoutError) as problem:
        print(f"error: {problem}", file=sys.stderr)
    except ValueError as problem:
        print(f"error: {given.encoder}: {problem}", file=sys.stderr)
    except OSError as problem:
        print(f"error: {problem.filename or given.encoder}: {problem.strerror or problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sources.silence_pillow()
    sys.exit(main(sys.argv[1:]))
