"""The Triton kernels, in Triton's CPU interpreter, against the reference memory in float64, differentiated by autograd.

The interpreter must be chosen before Triton is imported, so everything runs in one child process, which prints what it
found as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nestlearn.memory.self_modifying import SelfModifyingConfig, SelfModifyingMemory
from nestlearn.ops.inner_chunk import LoopSpec
from nestlearn.ops.inner_loop import LoopInputs, LoopState, LoopTrained
from tests.ops.memories import memory_of

pytest.importorskip("triton")

BASE = SelfModifyingConfig(
    head_width=12, hidden_width=20, heads=2, chunk=16, rate_max=4.0, rate_start=0.4, retain_start=(0.97, 0.8),
    retain_to="initial", slow_rate_scale=0.5, w1_scale=0.5, w2_scale=2.0, recompute=False,
)  # fmt: skip
CASES: dict[str, tuple[SelfModifyingConfig, int]] = {  # configuration, tokens
    "hope": (BASE, 37),
    "momentum": (replace(BASE, momentum=0.7, retain_to="zero"), 21),
    "l2, adaptive query": (replace(BASE, objective="l2", adaptive=("k", "v", "eta", "alpha", "q"), heads=1), 19),
    "static, letter": (replace(BASE, adaptive=("v",), target_norm="none", retention=False, rate_max=0.5, heads=1), 18),
    "forgets at once": (
        replace(BASE, retain_start=1e-4, chunk=32, memory_chunk=32, head_width=5, hidden_width=16, heads=1),
        32,
    ),
}


def draw(config: SelfModifyingConfig, tokens: int, rows: int = 1) -> list[Tensor]:
    """x, query, value_input and the weights of the loss."""
    generator = torch.Generator().manual_seed(11)
    shape = (rows, tokens, config.heads, config.head_width)
    x, query, value, dy = (torch.randn(shape, generator=generator, dtype=torch.double) for _ in range(4))
    return [x, torch.nn.functional.normalize(query, dim=-1), value, dy]


def truth(config: SelfModifyingConfig, tokens: int) -> dict[str, Tensor]:
    """y and gradients by autograd through the chunk-by-chunk reference."""
    memory = memory_of(config)
    x, query, value, dy = draw(config, tokens)
    for t in (x, query, value):
        t.requires_grad_()
    y, after = memory(x, query, None, value)
    ((y * dy).sum() + sum(t.square().sum() for t in (after.w1, after.w2, after.m1, after.m2))).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in memory.named_parameters()}
    named = {"y": y, "w1": after.w1, "w2": after.w2, "m1": after.m1, "dx": x.grad, "dq": query.grad, "dv": value.grad}
    return {n: t.detach() for n, t in {**named, **found}.items() if t is not None}


def kernels(config: SelfModifyingConfig, tokens: int, operands: torch.dtype) -> dict[str, Tensor]:
    """The same in float32 through the kernels."""
    memory = memory_of(config).float()
    x, query, value, dy = (t.float() for t in draw(config, tokens))
    for t in (x, query, value):
        t.requires_grad_()
    y, after = on_kernels(memory, x, query, value, operands)
    ((y * dy).sum() + sum(t.square().sum() for t in after)).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in memory.named_parameters()}
    named = {"y": y, "w1": after.w1, "w2": after.w2, "m1": after.m1, "dx": x.grad, "dq": query.grad, "dv": value.grad}
    return {n: t.detach() for n, t in {**named, **found}.items() if t is not None}


def on_kernels(
    memory: SelfModifyingMemory, x: Tensor, query: Tensor, value: Tensor, operands: torch.dtype, **options: Any
) -> tuple[Tensor, LoopState]:
    from nestlearn.ops.kernels.inner_loop import inner_loop

    c = memory.config
    rows = len(options.get("cu_seqlens", range(len(x) + 1))) - 1
    initial = memory.initial_weights(torch.float32)
    live = [w.expand(rows, *w.shape) for w in initial]
    state = LoopState(*live, *(torch.zeros_like(w) for w in live))
    reads = (memory.rate_read.weight, memory.rate_read.bias, memory.retain_read.weight, memory.retain_read.bias)
    scales = torch.stack([memory.rate_scale[n] for n in c.written]).abs()
    trained = LoopTrained(*initial, scales, *reads, torch.ones_like(scales) if c.objective == "l2" else None)
    spec = LoopSpec(
        c.names, len(c.written), c.chunk, c.momentum, c.rate_max, c.target_norm == "l2", c.retain_to == "initial",
        c.retention, keep=2,
    )  # fmt: skip
    y, after = inner_loop(
        LoopInputs(*(t.transpose(1, 2) for t in (x, value, query))), state, trained, spec, operands=operands, **options
    )
    return y.transpose(1, 2), after


def distance(found: Tensor, true: Tensor) -> float:
    return float((found - true).detach().norm() / true.norm().clamp_min(1e-12))


def measure(name: str, operands: torch.dtype) -> dict[str, float]:
    """Relative error of every result and gradient; what is 0 in truth is left out where it is 0."""
    true, found = truth(*CASES[name]), kernels(*CASES[name], operands)
    return {n: distance(found[n].double(), t) for n, t in true.items() if t.norm() > 0 or found[n].norm() > 0}


def packed() -> dict[str, float]:
    """Documents in one row against each by itself."""
    memory, edges = memory_of(replace(BASE, heads=1)).float(), [0, 5, 38]
    x, query, value, dy = (t.float() for t in draw(replace(BASE, heads=1), edges[-1]))
    x.requires_grad_()
    y, after = on_kernels(memory, x, query, value, torch.float32, cu_seqlens=edges)
    (dx,) = torch.autograd.grad(((y * dy).sum() + after.m1.sum() + after.w1.square().sum()), x)
    errors = {}
    for number, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        part = x[:, a:b].detach().requires_grad_()
        alone, end = on_kernels(memory, part, query[:, a:b], value[:, a:b], torch.float32)
        (d_part,) = torch.autograd.grad((alone * dy[:, a:b]).sum() + end.m1.sum() + end.w1.square().sum(), part)
        pairs = {"y": (y[:, a:b], alone), "w2": (after.w2[number], end.w2[0]), "dx": (dx[:, a:b], d_part)}
        errors.update({f"{n} {number}": distance(*pair) for n, pair in pairs.items()})
    return errors


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    """All errors, from the child process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_reference(found: dict[str, dict[str, float]], name: str) -> None:
    assert len(found[name]) > 12
    assert {n: e for n, e in found[name].items() if not e < 1e-4} == {}


def test_bfloat16_operands_stay_near_the_reference(found: dict[str, dict[str, float]]) -> None:
    errors = found["bfloat16"]
    assert errors["y"] < 2e-2 and errors["w1"] < 2e-2 and errors["w2"] < 2e-2
    assert {n: e for n, e in errors.items() if not e < 2e-2} == {}


def test_packed_documents_equal_each_alone(found: dict[str, dict[str, float]]) -> None:
    assert {n: e for n, e in found["packed"].items() if not e < 1e-6} == {}


if __name__ == "__main__":
    results = {name: measure(name, torch.float32) for name in CASES}
    results["bfloat16"] = measure("hope", torch.bfloat16)
    results["packed"] = packed()
    print(json.dumps(results))
