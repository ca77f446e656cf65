"""FLOPs and fewest bytes per token of each part of a HOPE model, the time they need at least, and the time they take.

    python benchmarks/speed/performance_model.py tiny-cpu --tokens 512 --batch 4       # beside what is measured here
    python benchmarks/speed/performance_model.py hope-340m --tokens 2048 --no-measure
    python benchmarks/speed/performance_model.py hope-1.3b --decode --no-measure

FLOPs are 2 for each multiplication and addition of a matrix product; elementwise work is not counted. Bytes are each
weight, activation and state read once and written once. The floor of a part is the larger of FLOPs over this machine's
matmul rate and bytes over its copy bandwidth, both measured when the script starts. `docs/performance.md` has the
formulas. Training is three times the forward products (two for the gradients), four for the inner loop, whose chunks
are computed again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
from nestlearn.levels import parse_levels
from nestlearn.memory.self_modifying import SelfModifyingConfig
from nestlearn.models.config import HopeConfig
from nestlearn.models.continuum import split_hidden
from nestlearn.recipes import NAMES, load_recipe


@dataclass(frozen=True)
class Part:
    """One part of the model, all layers together: FLOPs and bytes of one token's forward pass.

    weight_bytes  read once for a whole batch;  bytes  for each token;  training  a step's work, in forward passes
    """

    name: str
    flops: float
    bytes: float
    weight_bytes: float
    training: int = 3


def memory_flops(c: SelfModifyingConfig, size: int | None = None) -> dict[str, float]:
    """Matrix-product FLOPs of one head for one token, in chunks of ``size`` tokens (the memory's own by default)."""
    d, h, chunk = c.head_width, c.hidden_width, size or c.chunk
    moving = (c.retain_to == "initial" and c.retention) + (c.momentum > 0)  # anchors, momenta
    pass_through, written = 2 * d * h, len(c.written)
    sums = 2 if c.momentum else 1  # at momentum 0 both sums of a solve share R'
    full = 3 if "q" in c.names else 2  # k, v, q; of eta and alpha one number is wanted
    return {
        "generate": full * 2 * pass_through + (1 + c.retention) * (pass_through + 2 * (d + h)),
        "errors": written * 3 * pass_through + written * 2 * pass_through,  # targets, w1ᵀ e; z and w1 a
        "carried": written * 2 * moving * pass_through,
        "solves": 2 * chunk * (d + written * h) + written * sums * 2 * chunk * (d + h) + written * 4 * chunk**2 / 3,
        "ends": written * 2 * (1 + (c.momentum > 0)) * pass_through,
        "reads": 2 * (1 + moving) * pass_through + (1 + sums) * 2 * chunk * (d + h),
    }


def parts(config: HopeConfig, *, tokens: int, element: int = 4, decode: bool = False) -> list[Part]:
    """Every part, of a sequence of ``tokens``, or of one token at position ``tokens``; weights of ``element`` bytes."""
    width, layers = config.hidden_size, config.num_hidden_layers
    memory = config.memory_config()
    hidden = sum(split_hidden(config.intermediate_size, parse_levels(config.levels), config.connection))
    state = 4 * 2 * len(memory.names) * memory.head_width * memory.hidden_width * memory.heads * layers
    if memory.momentum:
        state *= 2
    chunk = 1 if decode else min(memory.chunk, tokens)
    # a state is read and written once per chunk; decoding also reads the copies of the chunk's start
    traffic = 3 * state if decode else 2 * state / chunk
    inner = [Part(f"memory: {n}", f * memory.heads * layers, 0, 0, 4) for n, f in memory_flops(memory, chunk).items()]
    return [
        Part("projections", layers * 10 * width**2, layers * 12 * width * element, layers * 5 * width**2 * element),
        Part("convolution", layers * 2 * config.conv_width * 3 * width, layers * 6 * width * element, 0),
        *inner,
        Part("memory: state traffic", 0, traffic + layers * 4 * width * 4, 0, 4),
        Part("continuum", layers * 6 * width * hidden, layers * (4 * width + 3 * hidden) * element,
             layers * 3 * width * hidden * element),
        Part("embedding", 0, width * element, 0),
        Part("head", 2 * width * config.vocab_size, config.vocab_size * element, config.vocab_size * width * element),
    ]  # fmt: skip


def training_flops(config: HopeConfig, tokens: int) -> float:
    """Of one token of a training step: what model-FLOPs utilisation counts, recomputation left out."""
    return 3 * sum(part.flops for part in parts(config, tokens=tokens))


def transformer_flops(width: int, layers: int, intermediate: int, vocab: int, tokens: int) -> float:
    """The same for a Transformer with causal attention: on average half of ``tokens`` are visible."""
    attention = 8 * width**2 + 4 * width * tokens / 2
    return 3 * (layers * (attention + 6 * width * intermediate) + 2 * width * vocab)


def measure_machine(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large square product and bytes/s, read plus written, of a large copy."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn((1 << 30 if device.type == "cuda" else 1 << 25) // 4, device=device)
    target = torch.empty_like(source)
    return {
        "matmul FLOP/s": 2 * size**3 / seconds(lambda: a @ b, device),
        "copy bytes/s": 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), device),
    }


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Median time of a call, the device idle before and after; the first call is not counted."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def floor(part: Part, machine: dict[str, float], *, batch: int, training: bool) -> float:
    """Seconds per token that the part needs at least."""
    passes = part.training if training else 1
    moved = part.bytes + part.weight_bytes / batch
    return passes * max(part.flops / machine["matmul FLOP/s"], moved / machine["copy bytes/s"])


def measured(config: HopeConfig, batch: int, tokens: int, device: torch.device) -> dict[str, float]:
    """Seconds per token of the forward pass of one layer's parts, times the layers, and of the head."""
    from nestlearn.models.continuum import Continuum
    from nestlearn.models.memory_layer import SelfModifyingLayer

    shape = config.shape()
    with torch.device(device):
        layer = SelfModifyingLayer(shape.hidden_size, shape.memory, conv_width=shape.conv_width)
        cms = Continuum(shape.hidden_size, shape.intermediate_size, shape.levels, shape.connection, shape.eps)
        x = torch.randn(batch, tokens, shape.hidden_size)
        table = torch.randn(config.vocab_size, shape.hidden_size)
    inside = x.unflatten(-1, (shape.heads, -1))
    query = F.normalize(inside, dim=-1)
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "projections": (lambda: layer.out(layer.project(x)[..., : shape.hidden_size]), shape.layers),
        "memory": (lambda: layer.memory(inside, query), shape.layers),
        "continuum": (lambda: cms(x), shape.layers),
        "head": (lambda: x @ table.T, 1),
    }
    with torch.no_grad():
        return {n: times * seconds(run, device, 3) / (batch * tokens) for n, (run, times) in calls.items()}


def table(config: HopeConfig, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows: FLOPs and bytes per token, floor and what is measured, in microseconds per token."""
    machine = measure_machine(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    print(json.dumps({key: f"{value:.3g}" for key, value in machine.items()}))
    batch = args.batch * (1 if args.decode else args.tokens)
    found = measured(config, args.batch, args.tokens, device) if args.measure and not args.decode else {}
    rows = []
    for part in parts(config, tokens=args.tokens, decode=args.decode):
        row = asdict(part) | {
            "floor, us": 1e6 * floor(part, machine, batch=batch, training=False),
            "measured, us": 1e6 * found[part.name] if part.name in found else None,
        }
        if not args.decode:
            row["training floor, us"] = 1e6 * floor(part, machine, batch=batch, training=True)
        rows.append(row)
    inner = [r for r in rows if r["name"].startswith("memory")]
    rows.append({"name": "memory, all", **{key: sum(r[key] for r in inner) for key in ("flops", "bytes")},
                 "floor, us": max(sum(r["floor, us"] for r in inner if r["flops"]), inner[-1]["floor, us"]),
                 "measured, us": 1e6 * found["memory"] if found else None})  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'part':24s}{'MFLOP':>12s}{'KB':>12s}{'floor us':>12s}{'measured us':>14s}   per token, forward")
    for r in rows:
        took = "" if r["measured, us"] is None else f"{r['measured, us']:.3f}"
        print(f"{r['name']:24s}{r['flops'] / 1e6:12.4f}{r['bytes'] / 1e3:12.3f}{r['floor, us']:12.4f}{took:>14s}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=NAMES)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--measure", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = HopeConfig(**{"vocab_size": 256, **load_recipe(args.preset).model})
    rows = table(config, args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    show(rows)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
