"""What reading a shared context once is worth: the choices of a multiple-choice task, with and without reuse of states.

    python benchmarks/speed/eval_reuse.py --data ../shared/data --rows 1000 --threads 2

A model of tiny-cpu's shape with random weights (speed does not depend on them) scores HellaSwag's four endings; tokens
are bytes. Without --data the contexts and endings are made up, of HellaSwag's mean lengths. Both ways batch by length.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nestlearn.eval.families import Row
from nestlearn.eval.reading import Reader
from nestlearn.recipes import load_recipe
from nestlearn.train.build import build_model

FILE = "hellaswag/hellaswag_val.jsonl.xz"
CONTEXT, ENDING = 220, 60  # bytes, where there is no file


def read_rows(data: Path | None, number: int) -> list[Row]:
    """Four rows for each question."""
    if data is None:
        rng = random.Random(0)
        made = [(rng.randbytes(CONTEXT), [rng.randbytes(ENDING) for _ in range(4)]) for _ in range(number)]
        return [Row(tuple(context + ending), ENDING) for context, endings in made for ending in endings]
    with lzma.open(data / FILE, "rt") as file:
        documents = [json.loads(line) for _, line in zip(range(number), file, strict=False)]
    pairs = [(d["query"].encode(), f" {e}".encode()) for d in documents for e in d["endings"]]
    return [Row(tuple(context + ending), len(ending)) for context, ending in pairs]


def measure(model: Any, rows: Sequence[Row], batch_size: int, *, reuse: bool) -> dict[str, Any]:
    reader = Reader(model, batch_size, reuse=reuse)
    wall, cpu = time.perf_counter(), time.process_time()
    scores = reader.score(rows)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    seconds = {"wall_seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}
    return {**seconds, "tokens_read": reader.tokens_read, "scores": [score for score, _ in scores]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-reuse", action="store_true", help="leave out reading anew")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, rows = build_model(load_recipe("tiny-cpu"), 256), read_rows(args.data, args.rows)
    found = {
        way: measure(model, rows, args.batch_size, reuse=way) for way in (True, False)[: 1 if args.only_reuse else 2]
    }
    scores = [one.pop("scores") for one in found.values()]
    print(json.dumps({"rows": args.rows, "threads": args.threads, "batch_size": args.batch_size}))
    for way, one in found.items():
        print(json.dumps({"reuse": way, **one}))
    if len(scores) == 2:
        print(f"largest difference of a log-likelihood: {max(abs(a - b) for a, b in zip(*scores, strict=True)):.1e}")


if __name__ == "__main__":
    main()
