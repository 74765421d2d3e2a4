"""The parts of a step: together they are its model, their FLOPs are XLA's, the table adds up."""
import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import bench
from benchmarks import part_times, step_time
from benchmarks.step_parts import step_parts
from config import Config
from objectives import registry
from runtime import devices

SMALL = Config(encoder="micro/8", decoder="micro", vocab_size=512, max_text_len=24, keep_ratio=0.5,
               stages="resolution=48 steps=9 batch=4 lr=1e-3")
NAMES = ["patch embedding", "encoder: layer norms, residuals", "encoder: qkv and out",
         "encoder: attention", "encoder: MLP", "keep, project, embed text",
         "decoder: layer norms, residuals", "decoder: qkv and out", "decoder: attention",
         "decoder: MLP", "head and loss", "AdamW"]


@pytest.fixture(scope="module")
def params() -> dict:
    return registry.init_params(SMALL, registry.model_spec(SMALL))


def abstract(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def inputs_of(part) -> list:
    return [jax.ShapeDtypeStruct(shape, "float32") for shape in part.inputs]


def xla_flops(part, batch) -> float:
    """Forward and backward, as XLA counts them before it compiles."""
    def run(w, inputs, batch):
        out, pullback = jax.vjp(lambda w, inputs: part.jax(w, inputs, batch), w, inputs)
        return out, pullback(out)
    return jax.jit(run).lower(part.weights, inputs_of(part), batch).cost_analysis()["flops"]


def test_flops_of_the_parts_add_up_to_those_of_the_model(params):
    """The model's count includes a gradient of the images, which no step computes."""
    parts = step_parts(SMALL, params, 48, 4)
    total = sum(part.count * part.flops for part in parts)
    image_gradient = 2 * 36 * 8 * 8 * 3 * 96
    assert total == 4 * (step_time.model_flops(SMALL, 48) - image_gradient)


def test_flops_of_each_part_are_those_that_xla_counts(params):
    """A bit more, for what is not a matmul: most beside the small matmuls of attention."""
    batch = step_time.make_batch(SMALL, 48, 4)
    for part in step_parts(SMALL, params, 48, 4):
        if part.flops:
            assert part.flops < xla_flops(part, batch) < 1.35 * part.flops, part.name


def test_the_parts_have_every_parameter_once(params):
    weights = sum(part.count * sum(x.size for x in jax.tree.leaves(part.weights))
                  for part in step_parts(SMALL, params, 48, 4))
    unused = params["encoder"]["norm"]  # the caption loss reads tokens before it
    assert weights == sum(x.size for x in jax.tree.leaves(params)) - 2 * len(unused["scale"])


def test_parts_table(tmp_path):
    file = tmp_path / "parts.json"
    command = ["parts", "--encoder", "micro/8", "--resolution", "16", "--batch", "2",
               "--vocab-size", "64", "--max-text-len", "8", "--scan-unroll", "1", "--repeats", "1"]
    assert bench.main([*command, "--json", str(file)]) == 0
    *parts, total, step, matmul, memory = json.loads(file.read_text())["rows"]
    assert [row["part"] for row in parts] == NAMES
    assert [row["count"] for row in parts] == [1, 4, 4, 4, 4, 1, 3, 3, 3, 3, 1, 1]
    assert total["part"] == "sum of parts" and step["part"] == "whole step"
    for column in ("ms", "floor ms"):
        values = [row[column] for row in parts]
        assert min(values) > 0 and total[column] == pytest.approx(np.sum(values))
    assert step["ms"] > 0 and step["floor ms"] == total["floor ms"]
    assert total["ms / floor"] == pytest.approx(total["ms"] / total["floor ms"])
    assert total["torch ms"] is None and total["ms / torch"] is None
    assert "GFLOP/s" in matmul["rate"] and "GB/s" in memory["rate"]


def test_the_bytes_of_adamw_follow_the_dtype_of_its_first_moment():
    num_bytes = []
    for mu_dtype in ("float32", "bfloat16"):
        step = SimpleNamespace(cfg=dataclasses.replace(SMALL, mu_dtype=mu_dtype), state=[{}],
                               parallel=devices.DataParallel(1))
        num_bytes.append(part_times.adamw(step)[1])
    assert num_bytes[1] == num_bytes[0] * 24 / 28


@pytest.mark.parametrize("flag", [["--remat", "block"], ["--grad-accum", "2"], ["--zero1"],
                                  ["--objective", "clip"], ["--gated-attention"]])
def test_a_step_of_other_parts_is_refused_in_one_line(flag, capsys):
    assert bench.main(["parts", "toy", *flag]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and flag[0] in error and error.count("\n") == 1
