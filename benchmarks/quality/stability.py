"""Which settings of the self-modifying memory train at all: gradient norms of a small byte model, and where it is NaN.

    python benchmarks/quality/stability.py --out benchmarks/results/stability.json

Each row changes the letter of the paper or HOPE's defaults in one respect and trains for some steps on the standard
library (2 layers, width 128, AdamW 2e-3), without clipping the gradients, so that what is measured is the memory's own.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data.batches import Batches
from nestlearn.data.text import standard_library
from nestlearn.data.tokens import load_tokenizer, tokenize

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import about

FULL = {
    "rate_max": 8.0,
    "rate_start": 0.5,
    "retain_to": "zero",
    "retain_start": 0.9999,
    "w1_scale": 1.0,
    "w2_scale": 1.0,
}
ROWS: dict[str, dict[str, Any]] = {
    "HOPE's defaults": {},
    "targets as in the letter": {"target_norm": "none"},
    "retention towards zero, 0.9999": {"retain_to": "zero", "retain_start": 0.9999},
    "one rate for all five memories": {"slow_rate_scale": 1.0},
    "rate 4, scales 1, retention towards zero": FULL,
    "the same, one rate for all five": {**FULL, "slow_rate_scale": 1.0},
    "the same, targets as in the letter": {**FULL, "target_norm": "none"},
    "letter: l2, own targets, one rate 0.25": {
        **FULL,
        "rate_max": 0.5,
        "objective": "l2",
        "target_norm": "none",
        "slow_rate_scale": 1.0,
    },
}


def train(memory: Mapping[str, Any], batches: Batches, steps: int) -> dict[str, Any]:
    """Gradient norms and loss (bits per byte), up to the first that is not finite."""
    torch.manual_seed(0)
    model = HopeForCausalLM(HopeConfig(levels=[1], memory=dict(memory)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    norms, losses, state = [], [], batches.initial()
    for _ in range(steps):
        batch, state = batches.next(state)
        loss = F.cross_entropy(model(batch.inputs, use_cache=False).logits.mT, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()
        if not (math.isfinite(norm) and math.isfinite(loss.item())):
            break
        norms.append(round(norm, 3))
        losses.append(round(loss.item() / math.log(2), 3))
        optimizer.step()
    return {"finite_steps": len(norms), "norms": norms, "bits_per_byte": losses}


def row(name: str, result: Mapping[str, Any], steps: int) -> str:
    """One line of the table."""
    norms = sorted(result["norms"]) or [math.nan]
    end = result["bits_per_byte"][-10:] or [math.nan]
    finite = f"all {steps}" if result["finite_steps"] == steps else f"NaN after {result['finite_steps']}"
    return f"| {name} | {finite} | {norms[len(norms) // 2]:.2f} | {norms[-1]:.1f} | {sum(end) / len(end):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokens = tokenize(standard_library().train, load_tokenizer("bytes"))
    batches = Batches(tokens, args.batch, args.length, seed=0)
    results = {}
    print(
        "| memory | finite steps | median gradient norm | largest | bits per byte, last 10 steps |\n" + "|---" * 5 + "|"
    )
    for name, memory in ROWS.items():
        results[name] = train(memory, batches, args.steps)
        print(row(name, results[name], args.steps), flush=True)
        if args.out:
            args.out.write_text(json.dumps({**about(), "results": results}) + "\n")


if __name__ == "__main__":
    main()
