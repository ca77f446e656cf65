"""Associative recall (MQAR): how many training steps until a model recalls 99 % of the pairs it has just read.

    python benchmarks/quality/recall.py --out benchmarks/results/recall.json
    python benchmarks/quality/recall.py --models hope --pairs 12 --rates 3e-3 --steps 600 --memory chunk=32

A sequence is P random pairs, then all P keys again in another random order:

    k1 v1 k2 v2 … kP vP  q1 … qP        loss and accuracy at the queries only, where the value is due

Keys (drawn without replacement) and values (with) come from disjoint vocabularies. Every step has fresh sequences; the
steps go through the list of P in turn, so that all P are learned together, without a curriculum. All models have the
same frame: 2 layers, width 64, the same feed-forward blocks, AdamW with 50 steps of warm-up and then a constant rate,
each with its own best learning rate of the grid. A P counts as learned at the first step at which the accuracy over the
last 10 batches of that P is at least 99 %; since no sequence comes twice, that is held-out accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn import HopeConfig, HopeForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import about, setting

KEYS, VALUES, WIDTH, LAYERS, HEADS = 64, 64, 64, 2, 1
LEARNED, LAST, WARMUP = 0.99, 10, 50
SPREAD = 0.08  # of the outer weights: at the usual 0.02 every model needs twice the steps
RATE_ZERO = {"rate_max": 0.0, "retention": False}
MODELS: dict[str, dict[str, Any]] = {
    "hope": {},
    "gated_delta": {"mixer": "gated_delta"},
    "hope, rate 0": {"memory": RATE_ZERO},
    "attention": {"mixer": "attention"},
}


@dataclass
class Run:
    """One training run. reached[P] is the step at which P pairs were learned, None where they were not."""

    model: str
    learning_rate: float
    seed: int
    parameters: int
    steps: int = 0
    seconds: float = 0.0
    reached: dict[int, int | None] = field(default_factory=dict)
    final: dict[int, float] = field(default_factory=dict)
    curve: list[tuple[int, int, float, float]] = field(default_factory=list)

    @property
    def all_reached(self) -> int | None:
        """The step at which the last P was learned."""
        steps = list(self.reached.values())
        return None if None in steps else max(s for s in steps if s is not None)


def make_model(
    name: str, memory: Mapping[str, Any], heads: int = HEADS, seed: int = 0, spread: float = SPREAD
) -> HopeForCausalLM:
    """A model of `MODELS`; ``memory`` changes settings of its self-modifying memory."""
    torch.manual_seed(seed)
    settings = dict(MODELS[name])
    settings["memory"] = {**memory, **settings.get("memory", {})}
    return HopeForCausalLM(
        HopeConfig(
            vocab_size=KEYS + VALUES,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            intermediate_size=2 * WIDTH,
            levels=[1],
            initializer_range=spread,
            **settings,
        )
    )


def sequences(
    pairs: int, batch: int, generator: torch.Generator, *, keys: int = KEYS, values: int = VALUES
) -> tuple[Tensor, Tensor]:
    """(ids (B, 3P), answers (B, P), the values that the last P tokens ask for)."""
    asked = torch.rand(batch, keys, generator=generator).argsort(-1)[:, :pairs]
    answers = torch.randint(keys, keys + values, (batch, pairs), generator=generator)
    order = torch.rand(batch, pairs, generator=generator).argsort(-1)
    read = torch.stack([asked, answers], dim=-1).flatten(1)
    return torch.cat([read, asked.gather(1, order)], dim=1), answers.gather(1, order)


def train(
    name: str,
    pairs: Sequence[int],
    learning_rate: float,
    steps: int,
    *,
    batch: int,
    memory: Mapping[str, Any],
    heads: int = HEADS,
    seed: int = 0,
    verbose: bool = True,
) -> Run:
    """Train until every P is learned, at most ``steps`` steps."""
    model = make_model(name, memory, heads, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1000 + seed)
    run = Run(name, learning_rate, seed, sum(p.numel() for p in model.parameters()), reached=dict.fromkeys(pairs))
    recent = {p: deque[float](maxlen=LAST) for p in pairs}
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        count = pairs[(step - 1) % len(pairs)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / WARMUP)
        loss, accuracy = learn(model, optimizer, *sequences(count, batch, generator))
        recent[count].append(accuracy)
        run.curve.append((step, count, round(loss, 4), round(accuracy, 4)))
        run.final = {p: sum(r) / max(1, len(r)) for p, r in recent.items()}
        if run.reached[count] is None and len(recent[count]) == LAST and run.final[count] >= LEARNED:
            run.reached[count] = step
        if verbose and step % 100 == 0:
            print(f"  {name} lr {learning_rate:g} step {step} " + shown(run.final), flush=True)
        run.steps, run.seconds = step, time.perf_counter() - begin
        if run.all_reached is not None or loss != loss:
            break
    return run


def learn(
    model: HopeForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor, answers: Tensor
) -> tuple[float, float]:
    """One step; (loss in nats, accuracy), both before the step."""
    logits = model(ids, use_cache=False, logits_to_keep=answers.shape[1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), (logits.argmax(-1) == answers).float().mean().item()


def shown(accuracy: Mapping[int, float]) -> str:
    return "  ".join(f"P={p}: {a:.1%}" for p, a in accuracy.items())


def table(runs: Sequence[Run]) -> str:
    """One line per run, the best learning rate of each model marked."""
    best = {
        name: min((r for r in runs if r.model == name), key=_order) for name in dict.fromkeys(r.model for r in runs)
    }
    pairs = list(runs[0].reached)
    lines = ["| model | learning rate | " + " | ".join(f"P = {p}" for p in pairs) + " | all | s per step |"]
    lines.append("|---" * (len(pairs) + 4) + "|")
    for run in runs:
        cells = [str(s) if s else f"({run.final[p]:.1%})" for p, s in run.reached.items()]
        mark = "**" if run is best[run.model] else ""
        name, every = f"{mark}{run.model}{mark}", run.all_reached or f"> {run.steps}"
        cells = [name, f"{run.learning_rate:g}", *cells, str(every), f"{run.seconds / run.steps:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _order(run: Run) -> tuple[float, ...]:
    """Learned first, by steps; the others by accuracy."""
    return (run.all_reached or float("inf"), -sum(run.final.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 16, 32, 64], help="at most 64")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[2e-3, 3e-3, 5e-3], help="learning rates to choose from"
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--memory", type=setting, nargs="*", default=[], metavar="NAME=VALUE", help="settings of HOPE's memory"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs = kept(args)
    for seed in args.seeds:
        for name in args.models:
            for rate in args.rates:
                run = train(
                    name,
                    args.pairs,
                    rate,
                    args.steps,
                    batch=args.batch,
                    memory=dict(args.memory),
                    heads=args.heads,
                    seed=seed,
                )
                print(f"{name} lr {rate:g}: {run.reached} {shown(run.final)}, {run.seconds:.0f} s", flush=True)
                runs.append(run)
                if args.out:
                    args.out.write_text(json.dumps(record(args, runs)) + "\n")
    print(table(runs))


def kept(args: argparse.Namespace) -> list[Run]:
    """Runs that the file of results holds already and that are not made again: models may run one after another."""
    if not (args.out and args.out.exists()):
        return []
    runs = [Run(**run) for run in json.loads(args.out.read_text())["runs"]]
    for run in runs:
        run.reached, run.final = ({int(p): value for p, value in d.items()} for d in (run.reached, run.final))
    again = {(name, rate, seed) for name in args.models for rate in args.rates for seed in args.seeds}
    return [run for run in runs if (run.model, run.learning_rate, run.seed) not in again]


def record(args: argparse.Namespace, runs: Sequence[Run]) -> dict[str, Any]:
    """What is kept of a run of this script."""
    return {
        **about(),
        "settings": {name: make_model(name, dict(args.memory), args.heads).config.memory for name in args.models},
        "curve columns": ["step", "pairs", "loss in nats", "accuracy"],
        "runs": [vars(run) for run in runs],
    }


if __name__ == "__main__":
    main()
