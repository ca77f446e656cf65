"""Stages: the machine; the Triton kernels against the plain-torch version in float64; their speed against the floor."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_stages.common import Run, free, timed
from benchmarks.speed.performance_model import measure_machine, memory_flops
from nestlearn.memory.self_modifying import SelfModifyingConfig
from nestlearn.ops.inner_chunk import LoopSpec
from nestlearn.ops.inner_loop import LoopInputs, LoopState, LoopTrained, inner_loop

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# head width, hidden width, chunk, tokens, momentum, heads: the ends of every range, tails, odd widths
GRID = {
    "small": [(32, 32, 16, 75, 0.0, 2), (32, 64, 32, 100, 0.7, 2), (20, 36, 24, 61, 0.0, 3), (48, 96, 64, 64, 0.0, 1)],
    "usual": [
        (64, 64, 64, 200, 0.0, 2),
        (64, 64, 64, 130, 0.6, 2),
        (64, 128, 32, 97, 0.0, 1),
        (64, 64, 16, 33, 0.9, 2),
    ],
    "large": [(128, 128, 64, 130, 0.0, 1), (128, 256, 64, 70, 0.0, 1), (128, 64, 128, 200, 0.5, 1)],
}
SLOW = ("k", "v", "eta", "alpha")


def environment(run: Run) -> dict[str, Any]:
    """Versions, device, and the two rates that every floor is made of."""
    import platform
    from importlib.util import find_spec

    import numpy
    import transformers

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"transformers": transformers.__version__, "numpy": numpy.__version__}
    if find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    found["flash-linear-attention"] = find_spec("fla") is not None
    if run.gpu:
        card = torch.cuda.get_device_properties(run.device)
        found |= {"device": card.name, "multiprocessors": card.multi_processor_count}
        found |= {"memory GB": round(card.total_memory / 2**30, 1), "L2 MB": getattr(card, "L2_cache_size", 0) / 2**20}
    dtype = torch.bfloat16 if run.gpu else torch.float32
    return found | measure_machine(run.device, dtype)


def draw(
    batch: int, heads: int, tokens: int, d: int, h: int, spec: LoopSpec, device: torch.device, *, mixed: bool = False
) -> tuple[LoopInputs, LoopState, LoopTrained]:
    """Fresh random inputs in the range that a trained model has, float32."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, device=device)

    m, g = len(spec.names), spec.written
    w1, w2 = normal(m, heads, d, h, scale=0.3 * h**-0.5), normal(m, heads, h, d, scale=2 * d**-0.5)
    query = torch.nn.functional.normalize(normal(batch, heads, tokens, d), dim=-1)
    inputs = LoopInputs(normal(batch, heads, tokens, d), normal(batch, heads, tokens, d), query)
    shapes = [w.expand(batch, *w.shape) for w in (w1, w2)]
    state = LoopState(
        *(w + normal(*w.shape, scale=0.05) for w in shapes), *(normal(*w.shape, scale=0.05) for w in shapes)
    )
    reads = (normal(heads, d, scale=0.2), normal(heads), normal(heads, d, scale=0.2), 3 + normal(heads))
    return inputs, state, LoopTrained(w1, w2, normal(g, heads).abs(), *reads, normal(g, heads).abs() if mixed else None)


def results(call: Any, given: Any, spec: LoopSpec, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """y, the state after, and the gradient of every tensor, of one random weighting of them."""
    groups = [[None if t is None else t.detach().to(dtype).requires_grad_() for t in group] for group in given]
    y, after = call(LoopInputs(*groups[0]), LoopState(*groups[1]), LoopTrained(*groups[2]), spec, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        weights = [torch.randn(t.shape).to(t) for t in (y, *after)]
    flat = [t for group in groups for t in group if t is not None]
    grads = torch.autograd.grad([y, *after], flat, weights, allow_unused=True)
    return [t.detach().double() for t in (y, *after)] + [
        torch.zeros_like(t, dtype=torch.double) if g is None else g.double() for g, t in zip(grads, flat, strict=True)
    ]


def correct(group: str, dtype: torch.dtype, run: Run) -> dict[str, Any]:
    """Largest relative error of every result and gradient, for a group of shapes; "passed": all within the limit."""
    from nestlearn.ops.kernels.inner_loop import inner_loop as on_gpu

    begin, rows = time.monotonic(), []
    grid = [(16, 16, 16, 18, 0.0, 1)] if run.smoke else GRID[group]
    for d, h, chunk, tokens, mu, heads in grid:
        if run.late(begin):
            break
        spec = LoopSpec((*SLOW, "memory"), 5, chunk, mu, 4.0, True, mu == 0, True, keep=2)
        given = draw(2, heads, tokens, d, h, spec, run.device, mixed=mu > 0)
        true = results(inner_loop, given, spec, torch.float64)
        found = results(on_gpu, given, spec, torch.float32, operands=dtype)
        errors = [float((f - t).norm() / t.norm()) for f, t in zip(found, true, strict=True) if t.norm() > 0]
        shape = {"head width": d, "hidden": h, "chunk": chunk, "tokens": tokens, "momentum": mu, "heads": heads}
        rows.append({**shape, "largest error": max(errors), "y error": errors[0]})
        free()
    worst = max(row["largest error"] for row in rows)
    return {
        "dtype": str(dtype), "limit": LIMITS[dtype], "rows": rows, "worst": worst, "all run": len(rows) == len(grid),
        "passed": worst <= LIMITS[dtype] and len(rows) == len(grid),
    }  # fmt: skip


def speed(run: Run) -> dict[str, Any]:
    """Forward, and forward with backward, at hope-340m's heads, against the floor of FLOPs or bytes, beside torch."""
    from nestlearn.ops.kernels.inner_loop import inner_loop as on_gpu

    d, chunk, heads, batch, tokens = (16, 16, 1, 1, 18) if run.smoke else (64, 64, 16, 16, 2048)
    config = SelfModifyingConfig(d, d, heads, chunk=chunk, retain_to="initial")
    spec = LoopSpec(config.names, 5, chunk, 0.0, 4.0, True, True, True)
    given = draw(batch, heads, tokens, d, d, spec, run.device)
    count = batch * tokens
    machine = measure_machine(run.device, torch.bfloat16 if run.gpu else torch.float32)
    flops = sum(memory_flops(config).values()) * heads * count
    state = 4 * 2 * 5 * d * d * heads * batch
    moved = {"forward": 4 * 4 * d * heads * count + 2 * state, "step": 12 * 4 * d * heads * count + 6 * state}
    calls = {"torch": inner_loop, "triton float32": on_gpu,
             "triton bfloat16": lambda *a: on_gpu(*a, operands=torch.bfloat16)}  # fmt: skip
    rows: dict[str, Any] = {}
    for name, call in calls.items():

        def forward(call: Any = call) -> None:
            with torch.no_grad():
                call(*given, spec)

        def step(call: Any = call) -> None:
            tensors = [[t if t is None else t.detach().requires_grad_() for t in group] for group in given]
            y, _ = call(LoopInputs(*tensors[0]), LoopState(*tensors[1]), LoopTrained(*tensors[2]), spec)
            y.sum().backward()

        for kind, passes, go in (("forward", 1, forward), ("step", 4, step)):
            go()
            took = statistics.median(timed(go, run.device) for _ in range(1 if run.smoke else 10))
            floor = max(passes * flops / machine["matmul FLOP/s"], moved[kind] / machine["copy bytes/s"])
            rows[f"{name}, {kind}"] = {"ms": 1e3 * took, "floor ms": 1e3 * floor, "times floor": took / floor}
    return {"tokens": count, "heads": heads, "rows": rows}
