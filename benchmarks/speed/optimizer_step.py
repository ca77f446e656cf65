"""Time of a step and bytes of state of every optimizer, beside torch's AdamW(foreach=True) and Muon, taking turns.

    python benchmarks/speed/optimizer_step.py --out benchmarks/results/optimizer-step.json
    python benchmarks/speed/optimizer_step.py --sets small --turns 15

Sets of matrices: "small" is that of the preset tiny-cpu; "340m" that of the preset hope-340m, cut to one layer of 24.
Gradients are random and the same for all; a step is ``optimizer.step()`` alone. In a turn an optimizer takes 4 steps,
M3 and the Kronecker preconditioner, whose steps differ, 16: one default slow period of M3. Every figure is the median
over the turns; a ratio is the median of the ratios within a turn. On one thread it is the core's time that counts, so
that other processes do not. Weights and gradients are float32. Muon is torch's: one matrix at a time, Newton–Schulz in
bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nestlearn.optim import DMGD, M3, DeltaMomentum, GeneralizedMomentum, PreconditionedMomentum

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import about


def layer(width: int, *hidden: int) -> list[tuple[int, int]]:
    """The matrices of a HOPE layer: projections of the mixer, then gate, up and down of each level."""
    mixer = [(4 * width, width), (width, width)]
    return mixer + [shape for h in hidden for shape in ((h, width), (h, width), (width, h))]


SETS = {"small": 2 * layer(128, 256, 128, 64), "340m": layer(1024, 768, 768, 768)}
PERIOD, STEPS = 16, 4
LEFT_OUT = {"340m": ["PreconditionedMomentum, kronecker"]}  # roots of factors of width 4096 take minutes on one core
Make = Callable[[list[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-3, foreach=True),
    "Muon": lambda ps: torch.optim.Muon(ps, lr=1e-3),
    "M3": lambda ps: M3(ps, lr=1e-3),
    "M3, slow_weight=0": lambda ps: M3(ps, lr=1e-3, slow_weight=0),
    "DeltaMomentum": lambda ps: DeltaMomentum(ps, lr=1e-3),
    "DeltaMomentum, values=diagonal": lambda ps: DeltaMomentum(ps, lr=1e-3, values="diagonal"),
    "DeltaMomentum, matmul_dtype=bfloat16": lambda ps: DeltaMomentum(ps, lr=1e-3, matmul_dtype=torch.bfloat16),
    "PreconditionedMomentum, diagonal": lambda ps: PreconditionedMomentum(ps, lr=1e-3, preconditioner="diagonal"),
    "PreconditionedMomentum, newton_schulz": lambda ps: PreconditionedMomentum(
        ps, lr=1e-3, preconditioner="newton_schulz"
    ),
    "PreconditionedMomentum, kronecker": lambda ps: PreconditionedMomentum(ps, lr=1e-3, preconditioner="kronecker"),
    "DMGD": lambda ps: DMGD(ps, lr=1e-3),
    "GeneralizedMomentum": lambda ps: GeneralizedMomentum(ps, lr=1e-3),
}


def parameters(shapes: list[tuple[int, int]]) -> list[nn.Parameter]:
    """Random weights with random gradients, equal for equal shapes."""
    generator = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(shape, generator=generator) / shape[1] ** 0.5) for shape in shapes]
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator)
    return ps


def state_bytes(optimizer: Optimizer) -> int:
    """Of all tensors in the state, those that share memory counted once; a view counts what it shows."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(t.numel() * t.element_size() for t in {(t.data_ptr(), t.shape): t for t in tensors}.values())


def turn(optimizer: Optimizer, steps: int) -> float:
    """Seconds of a step, averaged over so many."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    for _ in range(steps):
        optimizer.step()
    return (clock() - begin) / steps


def measure(name: str, names: list[str], turns: int) -> list[dict[str, Any]]:
    """A row for every optimizer of a set."""
    shapes = SETS[name]
    optimizers = {n: OPTIMIZERS[n](parameters(shapes)) for n in names}
    seconds: dict[str, list[float]] = {n: [] for n in names}
    for number in range(turns + 1):
        for n, optimizer in optimizers.items():
            taken = turn(optimizer, PERIOD if n.startswith("M3") or "kronecker" in n else STEPS)
            if number:  # the first turn warms up
                seconds[n].append(taken)
    count = sum(out * into for out, into in shapes)
    return [
        {
            "set": name,
            "optimizer": n,
            "ms of a step": round(1000 * statistics.median(seconds[n]), 3),
            **{f"ratio to {base}": ratio(seconds[n], seconds[base]) for base in ("AdamW", "Muon")},
            "state bytes of a parameter": round(state_bytes(optimizers[n]) / count, 2),
        }
        for n in names
    ]


def ratio(own: list[float], base: list[float]) -> float:
    """Median of the ratios within a turn."""
    return round(statistics.median(a / b for a, b in zip(own, base, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", choices=list(SETS), nargs="+", default=list(SETS))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = list(dict.fromkeys(["AdamW", "Muon", *args.optimizers]))
    rows = []
    for name in args.sets:
        own = [n for n in names if n not in LEFT_OUT.get(name, ())]
        rows += measure(name, own, args.turns)
        for row in rows[-len(own) :]:
            print(json.dumps(row), flush=True)
    if args.out:
        result = {"about": about(), "threads": args.threads, "turns": args.turns, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
