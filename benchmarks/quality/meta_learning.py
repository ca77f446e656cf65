"""Meta-learning levels in context: what the orders cost, and what they are worth.

    python benchmarks/quality/meta_learning.py --out benchmarks/results/meta-learning.json

Bytes of the standard library; a sliding-window Transformer whose last layers have an MLP more, which learns in
context. Three models begin with equal weights and read the same batches: trained as ever ("none"), through the inner
steps in the first order, and exactly. Measured: held-out bits per byte, read as ever ("frozen") and by an OnlineLearner
with the levels as learned ("adapted"; the model trained as ever with the rate the others started from, and with the
best of several); processor seconds of training, and the peak memory of one step in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import about
from nestlearn import HopeConfig, HopeForCausalLM, MetaLearner, OnlineLearner, OnlineLevel
from nestlearn.data.batches import Batches
from nestlearn.data.text import standard_library
from nestlearn.data.tokens import load_tokenizer, tokenize

ORDERS = ("none", "first", "exact")
RATES = (0.03, 0.1, 0.3, 1.0)  # tried for the model that was not trained for any


def make_model(args: argparse.Namespace) -> HopeForCausalLM:
    torch.manual_seed(args.seed)
    width = args.width
    levels = [{"name": "fast", "period": 1, "hidden_size": width}, {"name": "mlp", "period": 1}]
    return HopeForCausalLM(
        HopeConfig(
            hidden_size=width, num_hidden_layers=args.layers, num_attention_heads=4, intermediate_size=4 * width,
            mixer="window_attention", window=args.window, levels=levels, initializer_range=width**-0.5,
        )
    )  # fmt: skip


def make_levels(args: argparse.Namespace, rate: float) -> list[OnlineLevel]:
    """One level: the added MLP of the last quarter of the layers."""
    chosen = range(args.layers - math.ceil(args.layers / 4), args.layers)
    paths = [f"model.blocks.{n}.cms.blocks.fast.{name}" for n in chosen for name in ("gate", "up", "down")]
    return [OnlineLevel("fast", args.period, tuple(paths), rate, clip=1.0, bound=math.inf)]


def make_learner(order: str, args: argparse.Namespace) -> MetaLearner:
    model = make_model(args)
    rate = 0.0 if order == "none" else args.inner_rate
    return MetaLearner(model, make_levels(args, rate), order="first" if order == "none" else order, context=math.inf)


def train(order: str, tokens: np.ndarray, args: argparse.Namespace) -> tuple[MetaLearner, float]:
    """The learner, its model trained, and the processor seconds of all steps."""
    learner = make_learner(order, args)
    optimizer = torch.optim.AdamW([*learner.model.parameters(), learner.log_rates], lr=args.rate, weight_decay=0.01)
    batches = Batches(tokens, args.batch, args.length, args.seed)
    state, begin = batches.initial(), time.process_time()
    for step in range(1, args.steps + 1):
        batch, state = batches.next(state)
        ids = torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)
        share = step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, share / 0.05) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))
        optimizer.zero_grad()
        loss = learner.backward(ids, rate_scale=min(1.0, share / args.warmup))
        torch.nn.utils.clip_grad_norm_(learner.model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"  {order} step {step}: {float(loss.mean()) / math.log(2):.3f} bits per byte", flush=True)
    return learner, time.process_time() - begin


@torch.no_grad()
def frozen(model: Any, rows: Tensor) -> list[float]:
    """Bits per byte at every position of streams (B, N)."""
    logits = model(input_ids=rows[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="none")
    return (losses.mean(dim=0) / math.log(2)).tolist()


def adapted(model: Any, levels: Sequence[OnlineLevel], rows: Tensor) -> list[float]:
    losses = OnlineLearner(model, levels, context=math.inf).read(rows)[:, 1:]
    return (losses.mean(dim=0) / math.log(2)).tolist()


def measure(order: str, text: tuple[np.ndarray, np.ndarray], args: argparse.Namespace) -> dict[str, Any]:
    learner, seconds = train(order, text[0], args)
    model = learner.model.eval()
    rows = torch.from_numpy(text[1][: args.streams * args.read].astype(np.int64)).view(args.streams, args.read)
    found: dict[str, Any] = {"processor seconds": round(seconds, 1), "frozen": summary(frozen(model, rows))}
    rates = RATES if order == "none" else [learner.levels[0].lr]
    for rate in rates:
        found[f"adapted at {rate:.3g}"] = summary(adapted(model, make_levels(args, rate), rows))
    found["learned rate"] = None if order == "none" else rates[0]
    found["peak MiB of a step"] = peak(order)
    print(f"{order}: {json.dumps(found)}", flush=True)
    return found


def summary(bits: Sequence[float]) -> dict[str, float]:
    """Of all positions, and of the second half."""
    half = bits[len(bits) // 2 :]
    return {"all": round(sum(bits) / len(bits), 4), "second half": round(sum(half) / len(half), 4)}


def peak(order: str) -> float:
    """MiB that two steps take above what the process held before them; a process for each order."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", order]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def peak_here(order: str, args: argparse.Namespace) -> float:
    learner = make_learner(order, args)
    ids = torch.randint(256, (args.batch, args.length + 1))
    before = most_memory()
    for _ in range(2):
        learner.backward(ids)
    return round((most_memory() - before) / 1024, 1)


def most_memory() -> int:
    """KiB that this process has held at most (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = {"--steps": 150, "--batch": 4, "--length": 256, "--period": 64, "--width": 64, "--layers": 4,
             "--window": 32, "--seed": 0, "--streams": 16, "--read": 1024}  # fmt: skip
    for name, default in whole.items():
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--rate", type=float, default=4e-3, help="of AdamW")
    parser.add_argument("--inner-rate", type=float, default=0.1, help="that the learned one starts from")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps in which it rises to that")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-of", choices=ORDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.peak_of:
        print(peak_here(args.peak_of, args))
        return
    corpus, tokenizer = standard_library(), load_tokenizer("bytes")
    text = tokenize(corpus.train, tokenizer), tokenize(corpus.held_out, tokenizer)
    facts = {**about(), "text": corpus.description, "threads": torch.get_num_threads(), "results": {}}
    for order in args.orders:
        facts["results"][order] = measure(order, text, args)
        if args.out:
            args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
