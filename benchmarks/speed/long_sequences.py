"""Long sequences on a CPU: what keeping fewer states costs and saves, one step at 32K, and packed documents.

    python benchmarks/speed/long_sequences.py                          # all three parts
    python benchmarks/speed/long_sequences.py --parts keep --length 8192 --keep 1 4 16 sqrt

The model is that of the preset tiny-cpu, batch 1, float32, one thread. Each figure is of a fresh process: the same once
at 512 tokens, then the least of ``--repeats``; peak memory is what the process holds at most, in all (RSS).

    keep     forward and backward at ``--length`` for each ``memory.keep_every``
    step     whole training steps, optimizer included, at ``--long``, with and without gradient checkpointing
    packing  ``--length`` tokens as one document, and as documents of 20 to 2,000 tokens packed in a row
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestlearn.recipes.tiny_cpu import tiny_cpu
from nestlearn.train.build import build_model, build_optimizer
from nestlearn.train.step import train_step

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import about

PARTS = ("keep", "step", "packing")


def cases(part: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a child process is to measure, one dictionary each."""
    if part == "keep":
        return [{"part": part, "length": args.length, "keep_every": keep} for keep in args.keep]
    if part == "step":
        return [{"part": part, "length": args.long, "checkpointing": on} for on in (False, True)]
    return [{"part": part, "length": args.length, "documents": many} for many in (False, True)]


def measure(case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Least seconds of the clock and of the processor, and the peak of the process's memory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make = {"keep": forward_backward, "step": step, "packing": forward_backward}[case["part"]]
    make(case | {"length": 512})()
    work = make(case)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(min(t[0] for t in times), 3), "cpu seconds": round(min(t[1] for t in times), 3),
            "peak MB": round(peak)}  # fmt: skip


def forward_backward(case: dict[str, Any]) -> Callable[[], None]:
    model, ids = model_of(case), random_bytes(case)
    given = {"position_ids": positions(case["length"])} if case.get("documents") else {}

    def work() -> None:
        model(ids, labels=ids, use_cache=False, **given).loss.backward()
        model.zero_grad()

    return work


def step(case: dict[str, Any]) -> Callable[[], None]:
    from nestlearn.data.batches import Batch

    config, model = tiny_cpu(), model_of(case)
    model.train()
    if case["checkpointing"]:
        model.gradient_checkpointing_enable()
    optimizer, ids = build_optimizer(config, model), random_bytes(case)
    batch = Batch(ids, ids.roll(-1, 1))
    return lambda: train_step(model, optimizer, batch, 0, config) and None


def model_of(case: dict[str, Any]) -> Any:
    keep = case.get("keep_every", "auto")
    keep = int(keep) if str(keep).isdigit() else keep
    return build_model(tiny_cpu().replace([f"model.memory.keep_every={json.dumps(keep)}"]), 257)


def random_bytes(case: dict[str, Any]) -> torch.Tensor:
    return torch.randint(0, 256, (1, case["length"]), generator=torch.Generator().manual_seed(0))


def positions(length: int) -> torch.Tensor:
    """Of documents whose lengths are spread evenly in logarithm over 20 to 2,000 tokens."""
    generator, counts = np.random.default_rng(0), []
    while sum(counts) < length:
        counts.append(int(np.exp(generator.uniform(np.log(20), np.log(2000)))))
    return torch.cat([torch.arange(n) for n in counts])[None, :length]


def in_a_child(case: dict[str, Any], repeats: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--repeats", str(repeats), "--child", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return case | json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--long", type=int, default=32768)
    parser.add_argument("--keep", nargs="+", default=["1", "4", "16", "sqrt"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(measure(json.loads(args.child), args.repeats)))
        return
    rows = []
    for case in (case for part in args.parts for case in cases(part, args)):
        rows.append(in_a_child(case, args.repeats))
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
