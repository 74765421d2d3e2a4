"""A training step in PyTorch with the weights, batch, mask and update of the JAX step.

It is written as one would in PyTorch: a parameter per layer; fused kernels for layer norm, GELU,
attention and AdamW.
"""
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

import masking
from benchmarks import torch_reference
from config import Config
from objectives import registry
from runtime.curriculum import parse_stages


class TorchStep:
    """One training step per call."""
    reference = torch_reference
    compile_seconds = float("nan")  # torch.compile compiles during the first calls

    def __init__(self, cfg: Config, batch: dict[str, np.ndarray], params: dict, compiled: bool):
        """batch: as of step_time.make_batch; params: the JAX parameters; compiled: by
        torch.compile."""
        model = registry.model_spec(cfg)
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        if self.device == "cuda":  # as in JAX, where fp32 matmuls of a GPU take TF32 inputs
            torch.set_float32_matmul_precision("high")
        tree = torch_reference.from_jax(params, self.device)
        for part in tree.values():
            part["blocks"] = [jax.tree.map(lambda w: w.detach().clone().requires_grad_(), layer)
                              for layer in torch_reference.unstack_layers(part["blocks"])]
        kernels, others = [], []
        for path, parameter in jax.tree_util.tree_leaves_with_path(tree):
            (kernels if path[-1].key == "kernel" else others).append(parameter)
        self.parameters, self.grad_clip = kernels + others, cfg.grad_clip
        self.optimizer = torch.optim.AdamW(
            [{"params": kernels, "weight_decay": cfg.weight_decay},
             {"params": others, "weight_decay": 0.0}], betas=(0.9, cfg.adam_b2), fused=True)
        self.peak_lr, self.steps_done = parse_stages(cfg.stages)[0].lr, 0
        self.inputs = self.make_inputs(cfg, model, batch)
        loss = torch_reference.mean_loss
        if compiled:
            loss = torch.compile(loss)
        self.loss = lambda: loss(tree["encoder"], tree["decoder"], *self.inputs, model.encoder,
                                 model.decoder)

    def make_inputs(self, cfg: Config, model: registry.ModelSpec, batch: dict) -> list:
        """Images, kept patches and text as tensors. The mask is the one of the JAX step."""
        num_patches = (batch["images"].shape[1] // model.encoder.patch_size) ** 2
        num_kept = masking.num_kept_tokens(num_patches, cfg.keep_ratio)
        root = jax.random.key(cfg.seed)
        keys = jax.vmap(lambda index: jax.random.fold_in(root, index))(batch["position"])
        keep_indices = masking.sample_keep_indices(keys, num_patches, num_kept, cfg.shuffle_kept)
        arrays = (batch["images"], keep_indices, batch["text"])
        return [torch_reference.tensor(array, self.device) for array in arrays]

    def __call__(self) -> float:
        """Runs one step to its end and returns its mean loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.update()
        return float(loss.detach())

    def update(self) -> None:
        """Updates the parameters with the gradients that they hold."""
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        for group in self.optimizer.param_groups:  # a warm-up of one step, as in JAX
            group["lr"] = self.peak_lr if self.steps_done else 0.0
        self.optimizer.step()
        self.steps_done += 1
        self.synchronize()

    def forward_backward(self, part: Any, dtype: str) -> Callable:
        """A call that computes the outputs of a step_parts.Part and, from random gradients of
        these, those of its weights and inputs."""
        w = torch_reference.from_jax(part.weights, self.device)
        options = {"dtype": getattr(torch, dtype), "device": self.device, "requires_grad": True}
        inputs = [torch.randn(shape, **options) for shape in part.inputs]

        def outputs() -> list[torch.Tensor]:
            out = part.torch(w, inputs, self.inputs)
            return [out] if isinstance(out, torch.Tensor) else list(out)
        grads = [torch.randn_like(out) for out in outputs()]

        def run() -> None:
            torch.autograd.grad(outputs(), [*jax.tree.leaves(w), *inputs], grads)
            self.synchronize()
        return run

    def synchronize(self) -> None:
        """Waits until a GPU has done its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> float:
        """NaN on a CPU, where PyTorch does not count."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else float("nan")
