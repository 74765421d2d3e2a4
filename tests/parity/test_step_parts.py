"""The parts of a step that bench.py times compute the same in both libraries."""
import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch

from benchmarks import step_time, torch_reference
from benchmarks.step_parts import step_parts
from benchmarks.torch_step import TorchStep
from config import Config
from objectives import registry

SMALL = Config(encoder="micro/8", decoder="micro", vocab_size=61, max_text_len=9, keep_ratio=0.5,
               stages="resolution=32 steps=9 batch=2 lr=1e-3", cls_token=True)


def test_both_libraries_keep_the_same_moments_in_a_comparison():
    cfg = dataclasses.replace(SMALL, mu_dtype="bfloat16", stages=f"{SMALL.stages} warmup=1")
    steps, _ = step_time.make_steps(cfg, 32, 2, "torch")
    moments = jax.tree.leaves(optax.tree.get(steps["jax"].state[1], "mu"))
    moments += [state["exp_avg"] for state in steps["torch"].optimizer.state.values()]
    assert {str(x.dtype).removeprefix("torch.") for x in moments} == {"float32"}


@pytest.mark.parametrize("prefix_attention", ["causal", "bidirectional"])
def test_parts_compute_the_same_as_pytorch(prefix_attention):
    cfg = dataclasses.replace(SMALL, prefix_attention=prefix_attention)
    params = registry.init_params(cfg, registry.model_spec(cfg))
    batch, rng = step_time.make_batch(cfg, 32, 2), np.random.default_rng(3)
    tensors = TorchStep(cfg, batch, params, compiled=False).inputs
    for part in step_parts(cfg, params, 32, 2, torch_reference):
        inputs = [rng.standard_normal(shape, np.float32) for shape in part.inputs]
        out, pullback = jax.vjp(lambda w, x, part=part: jax.tree.leaves(part.jax(w, x, batch)),
                                part.weights, inputs)
        grads = [rng.standard_normal(x.shape, np.float32) for x in out]
        torch_w, torch_inputs = torch_reference.from_jax(part.weights), []
        for x in inputs:
            torch_inputs.append(torch.tensor(x, requires_grad=True))
        torch_out = part.torch(torch_w, torch_inputs, tensors)
        if part.name == "head and loss":  # a sum per caption, and a mean over all targets
            out, torch_out = [out[0].sum()], torch_out * tensors[2][:, 1:].numel()
            grads = [np.float32(1)]
            gradients = pullback([np.ones(2, np.float32)])
        else:
            gradients = pullback(grads)
        torch_out = [torch_out] if isinstance(torch_out, torch.Tensor) else list(torch_out)
        torch_grads = torch.autograd.grad(
            torch_out, [*jax.tree.leaves(torch_w), *torch_inputs], [torch.tensor(g) for g in grads])
        for ours, theirs in zip([*out, *jax.tree.leaves(gradients)], [*torch_out, *torch_grads],
                                strict=True):
            np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-4, atol=1e-4,
                                       err_msg=part.name)
