"""Evaluation during training: validation losses, captions and their grades, and the final summary.

    val_loss             of the validation images with their captions
    val_loss_shuffled    of the same images with the captions of others
    val_loss_blind       the best possible loss without the image, where it is known
                         (objectives.registry.blind_loss); otherwise the lowest val_loss_shuffled

A model whose val_loss is not below val_loss_blind does not use the image.

Letters: B images, N patches, K kept patches, R pixels per side, T text positions, D width.
"""
import dataclasses
import functools
import importlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import data
from config import Config
from decoder import generate
from inputs import images, sources
from masking import keep_random_tokens
from objectives import registry
from runtime import checkpoint, plots
from runtime.curriculum import Stage
from runtime.devices import DataParallel
from runtime.errors import TrainingError
from runtime.monitoring import peak_memory_gib
from vit import vit

NUM_SAMPLES = 12  # validation images in samples.png


def validation_keys(batch: dict) -> jax.Array:
    """(B,), one key per image. It depends only on the image's position in the validation set, so
    every evaluation of every run keeps the same patches."""
    return jax.vmap(lambda p: jax.random.fold_in(jax.random.key(0), p))(batch["position"])


def make_loss(model: Any, method_loss: Callable, parallel: DataParallel) -> Callable:
    """pmapped (params, batch) -> (summed loss, count) over the batches of all devices. method_loss
    is train.openvision2_loss; another objective has its own. A contrastive loss is that within the
    evaluated batch."""
    module = registry.objective_module(model.objective)
    loss = method_loss if module is None else getattr(module, "validation_loss", module.loss)

    def summed_loss(params, batch):
        return jax.lax.psum(loss(params, batch, validation_keys(batch), model), "devices")
    return parallel.pmap(summed_loss)


def make_generate(model: Any, max_text_len: int, parallel: DataParallel) -> Callable:
    """pmapped (params, batch) -> greedy captions (B,T) and kept patches (B,K) of the global batch,
    on every device. The captions are empty where the objective makes none."""
    module = registry.objective_module(model.objective)

    def captions_and_patches(params, batch):
        if module is None:
            tokens = vit(params["encoder"], batch["images"], model.encoder)["tokens"]
            kept, keep_indices = keep_random_tokens(validation_keys(batch), tokens,
                                                    model.keep_ratio, model.shuffle_kept)
            return generate(params["decoder"], kept, model.decoder, max_text_len), keep_indices
        B, N = len(batch["text"]), (batch["images"].shape[1] // model.encoder.patch_size) ** 2
        all_patches = jnp.broadcast_to(jnp.arange(N), (B, N))
        if not registry.can_caption(model.objective):
            return jnp.zeros_like(batch["text"]), all_patches
        return module.generate(params, batch, model), all_patches

    def gathered(params, batch):
        gather = functools.partial(jax.lax.all_gather, axis_name="devices", tiled=True)
        return jax.tree.map(gather, captions_and_patches(params, batch))
    return parallel.pmap(gathered)


def validation_batches(loader: data.Loader, count: int, resolution: int, batch_size: int,
                       rows: range) -> Iterator[tuple[dict, int]]:
    """(this process's rows of a batch, images in the global batch) over `count` samples. The last
    batch is filled up with images whose text is empty, which add nothing to a loss."""
    for start in range(0, count, batch_size):
        positions = range(start + rows.start, start + rows.stop)
        batch = loader.batch(positions, resolution)
        for name in loader.fields:
            batch[name][max(0, count - positions.start):] = 0
        yield batch, min(batch_size, count - start)


class ValidationSet:
    """The validation images of a run at one resolution, and what a model makes of them."""

    def __init__(self, cfg: Config, loader: data.Loader, resolution: int, batch_size: int,
                 model: registry.ModelSpec, parallel: DataParallel, method_loss: Callable,
                 check: Callable[[], None] = lambda: None):
        """method_loss: train.openvision2_loss. check() is called between batches, and may raise to
        end a long evaluation."""
        self.loader, self.model, self.parallel, self.check = loader, model, parallel, check
        self.count, self.max_text_len = min(cfg.val_samples, len(loader.source)), cfg.max_text_len
        self.can_caption = registry.can_caption(model.objective)
        # A small set is one smaller batch that all devices share.
        smallest = math.ceil(self.count / parallel.num_devices) * parallel.num_devices
        self.batch_size = min(batch_size, smallest)
        self.rows = parallel.local_rows(self.batch_size)
        known = set(loader.bad)
        self.batches = list(validation_batches(loader, self.count, resolution, self.batch_size,
                                               self.rows))
        for i in loader.bad.keys() - known:
            print(f"skipped in validation: {loader.source.name(i)}: {loader.bad[i]}")
        self.samples = self.gather("sample")
        self.texts = {name: self.gather(name) for name in loader.fields}
        self.loss = make_loss(model, method_loss, parallel)
        self.generate = make_generate(model, cfg.max_text_len, parallel)

    def gather(self, name: str) -> np.ndarray:
        """An entry of the batches over all processes, in the order of the set."""
        local = np.stack([batch[name] for batch, _ in self.batches])
        gathered = np.concatenate(self.parallel.all_gather(local), axis=1)
        return gathered.reshape(-1, *local.shape[2:])

    def losses(self, params: Any) -> dict[str, float]:
        """val_loss, and val_loss_shuffled: with the captions moved on by half of the set."""
        order = np.arange(len(self.samples))
        real = np.flatnonzero(self.texts["text"].any(-1))
        order[real] = np.roll(real, len(real) // 2)
        shuffled = {name: text[order] for name, text in self.texts.items()}
        return {"val_loss": self.mean_loss(params, self.texts),
                "val_loss_shuffled": self.mean_loss(params, shuffled)}

    def mean_loss(self, params: Any, texts: dict[str, np.ndarray]) -> float:
        """Over the images with these texts."""
        total = np.zeros(2)
        for n, (batch, _) in enumerate(self.batches):
            self.check()
            first = n * self.batch_size
            rows = slice(first + self.rows.start, first + self.rows.stop)
            local_texts = {name: text[rows] for name, text in texts.items()}
            sums = self.loss(params, self.parallel.shard_batch(batch | local_texts))
            total += [float(self.parallel.unreplicate(x)) for x in sums]
        return float(total[0] / total[1])

    def blind_loss(self) -> float | None:
        """The best possible loss without the image. It is known for `scenes`, whose captions have a
        known entropy, and for contrastive losses."""
        source = self.loader.source
        caption_nats = caption_tokens = None
        if isinstance(source, sources.SceneSource):
            texts = np.array([self.loader.tokenizer.encode(source.caption(i), self.max_text_len)
                              for i in range(self.count)])
            if not texts[:, -1].any():  # of a caption that may be cut, the entropy is not known
                caption_nats = np.array([source.caption_nats(i) for i in range(self.count)])
                caption_tokens = (texts[:, 1:] != 0).sum(-1)
        batch_sizes = [num_images for _, num_images in self.batches]
        facts = registry.BlindFacts(batch_sizes, caption_nats, caption_tokens, self.pixel_targets)
        return registry.blind_loss(self.model.objective, facts)

    def pixel_targets(self) -> np.ndarray:
        """(n,N,P*P*3) of all images: for the objective that predicts pixels."""
        pixels = np.concatenate([batch["images"][:num] for batch, num in self.batches])
        targets = registry.objective_module(self.model.objective).pixel_targets
        return np.asarray(targets(pixels, self.model.encoder.patch_size))

    def generate_captions(self, params: Any, count: int | None = None
                          ) -> Iterator[tuple[int, str, np.ndarray]]:
        """(sample, greedy caption, kept patches (K,)) of the first `count` images, or all."""
        remaining = self.count if count is None else count
        indices = iter(self.samples.tolist())
        for batch, num_images in self.batches:
            if remaining <= 0:
                return
            self.check()
            outputs = self.generate(params, self.parallel.shard_batch(batch))
            tokens, patches = (self.parallel.unreplicate(x) for x in outputs)
            for n in range(min(num_images, remaining)):
                yield next(indices), self.loader.tokenizer.decode(tokens[n]), patches[n]
            remaining -= num_images


def caption_metrics(validation_set: ValidationSet, params: Any) -> dict[str, float]:
    """For `scenes`: the share of right captions, words, objects and attributes among greedy
    captions."""
    counts: dict[str, list[tuple[int, int]]] = {}
    for i, text, _ in validation_set.generate_captions(params):
        for name, right_and_total in validation_set.loader.source.grade(text, i).items():
            counts.setdefault(name, []).append(right_and_total)
    metrics = {}
    for name, pairs in counts.items():
        right, total = np.sum(pairs, axis=0)
        metrics["exact_match" if name == "exact" else f"{name}_accuracy"] = float(right / total)
    return metrics


class Evaluator:
    """Evaluates a run (run_folder.Run), with its reports (monitoring.Monitor)."""

    def __init__(self, run: Any, monitor: Any, method_loss: Callable):
        self.run, self.monitor, self.method_loss = run, monitor, method_loss

    def start_stage(self, stage: Stage, check: Callable[[], None] = lambda: None) -> None:
        """Reads the validation images at the stage's resolution."""
        run = self.run
        # Unrolled layers would compile twice as long and save nothing in so few batches.
        model = registry.model_spec(dataclasses.replace(run.cfg, scan_unroll=1))
        self.validation_set = ValidationSet(run.cfg, run.val_loader, stage.resolution, stage.batch,
                                            model, run.parallel, self.method_loss, check)
        self.monitor.blind_loss = self.validation_set.blind_loss()

    def evaluate(self, params: Any) -> None:
        """Logs the validation losses of the run's step. TrainingError if one is not finite."""
        run, monitor, state = self.run, self.monitor, self.run.state
        start = time.monotonic()
        losses = self.validation_set.losses(params)
        shuffled = losses["val_loss_shuffled"]
        if not np.isfinite(losses["val_loss"] + shuffled):
            raise TrainingError(f"the validation loss is no longer finite at step {run.step}: "
                                "lower lr in --stages, or set --grad-clip 1")
        state["best_shuffled"] = min(shuffled, state["best_shuffled"] or float("inf"))
        state["evaluation_pending"] = False
        monitor.log(step=run.step, **losses, val_loss_blind=monitor.val_loss_blind)
        monitor.plot()
        monitor.add_image("curve.png")
        monitor.postfix["validation"] = f"{losses['val_loss']:.3f}"
        monitor.bar.set_postfix(monitor.postfix)
        monitor.window_start += time.monotonic() - start  # evaluation is not training time

    def finish(self, params: Any) -> None:
        """What a finished run leaves: encoder.npz, samples.png, summary.json and report.html."""
        run, last = self.run, self.run.stages[-1]
        params_on_host = run.parallel.unreplicate(params)
        if run.parallel.is_main:
            meta = {"encoder": dataclasses.asdict(run.model.encoder), "resolution": last.resolution,
                    "config": dataclasses.asdict(run.cfg)}
            checkpoint.save(run.path("encoder.npz"), params_on_host["encoder"], meta)
        metrics = self.validation_set.losses(params)
        samples = self.captioned_samples(params, last.resolution)
        caption_scores: dict[str, float] = {}
        if isinstance(run.val_source, sources.SceneSource) and self.validation_set.can_caption:
            caption_scores = caption_metrics(self.validation_set, params)
        if not run.parallel.is_main:
            return
        plots.draw_samples(run.path("samples.png"), samples)
        texts = [{"caption": sample.caption, "generated": sample.generated,
                  "correct": sample.correct} for sample in samples]
        checkpoint.write_text(run.path("samples.json"), checkpoint.to_json(texts, indent=1))
        self.monitor.add_image("samples.png")
        seconds = run.state["train_seconds"]  # 0 for a run that is too short to measure
        rate = round(run.state["train_images"] / seconds, 1) if seconds else None
        metrics |= {
            "val_loss_blind": self.monitor.val_loss_blind,
            "images_seen": last.first_image + last.steps * last.batch,
            "seconds": round(run.elapsed(), 1), "images_per_second": rate,
            "parameters": sum(x.size for x in jax.tree.leaves(params_on_host)),
            "peak_memory_gib": round(peak_memory_gib(), 2),
            "num_val_images": self.validation_set.count, "bad_samples": run.state["bad_samples"]}
        text = checkpoint.to_json(metrics | caption_scores, indent=1)
        checkpoint.write_text(run.path("summary.json"), text)
        # Imported when it is used: training does not depend on it.
        report = importlib.import_module("runtime.report")
        report.write_report([run.cfg.workdir], run.path("report.html"))
        run.lock.sync()
        print(text)
        is_known = self.monitor.blind_loss is not None
        comparison = "without the image" if is_known else "at best with shuffled captions"
        print(f"validation loss {metrics['val_loss']:.3f}; {comparison} "
              f"{metrics['val_loss_blind']:.3f}")
        print(f"the encoder: {run.path('encoder.npz')}; images: {run.path('samples.png')} and "
              f"{run.path('curve.png')}; everything about the run: {run.path('report.html')}")

    def captioned_samples(self, params: Any, resolution: int) -> list[plots.CaptionedImage]:
        """The first validation images, with what the model says about them."""
        run, source = self.run, self.run.val_source
        samples = []
        for i, generated, patches in self.validation_set.generate_captions(params, NUM_SAMPLES):
            caption = run.tokenizer.decode(run.tokenizer.encode(source.caption(i),
                                                                run.cfg.max_text_len))
            grades = source.grade(generated, i) if isinstance(source, sources.SceneSource) else {}
            correct = grades["exact"][0] == 1 if grades else caption == generated
            pixels = images.decode_and_augment(source.image(i), resolution)
            samples.append(plots.CaptionedImage(
                pixels, patches, run.model.encoder.patch_size, caption,
                generated if self.validation_set.can_caption else None, correct))
        return samples
