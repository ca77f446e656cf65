"""MAD: six small tasks, each of which asks a model for one ability; two layers, everybody trained alike.

    python benchmarks/quality/mad.py --out benchmarks/results/mad.json
    python benchmarks/quality/mad.py --models hope transformer --tasks memorization --rates 3e-3 --seeds 1

The tasks are described in `nestlearn/eval/synthetic/mad.py`; ``--data`` reads their test sequences from files where the
folder holds them (all but memorization, whose facts are those of the training sequences). As in MAD a model has two
layers, and training walks over 12,800 sequences (256 for memorization) in a new order each time; unlike there it is
short, and the models are narrow: see --steps, --batch and --width. For compression the last state alone is decoded, by
MAD's decoder: the state plus a place, then an MLP.

A model is trained at every learning rate of one grid, until the training loss is below 0.01 nats and 99.9 % of 128 test
answers are right or the steps are over. The rate is chosen by the accuracy on half of the test sequences, the accuracy
that is reported is that on the other half.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import setting
from benchmarks.quality.synthetic import BASELINES, Results, draw, make_model, table, train
from nestlearn import HopeForCausalLM
from nestlearn.eval.synthetic import IGNORED, MAD_TASKS, MadTask

MODELS = ("hope", *BASELINES)
HOPE_MEMORY: dict[str, Any] = {"chunk": 32}
ENOUGH = 0.01
Pair = tuple[Tensor, Tensor]


class FromLast(nn.Module):
    """MAD's auto-encoder: every token is decoded from the last state plus the sines of its place."""

    def __init__(self, model: HopeForCausalLM, length: int) -> None:
        super().__init__()
        width, vocabulary = model.config.hidden_size, model.config.vocab_size
        self.model = model
        rates = torch.exp(torch.arange(width // 2) * (-math.log(10_000) / (width // 2 - 1)))
        angles = torch.arange(length)[:, None] * rates
        self.places = torch.cat([angles.sin(), angles.cos()], dim=1)
        self.decoder = nn.Sequential(
            nn.RMSNorm(width), nn.Linear(width, width), nn.GELU(),
            nn.RMSNorm(width), nn.Linear(width, width), nn.GELU(),
            nn.RMSNorm(width), nn.Linear(width, vocabulary),
        )  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) to logits (B, T, vocabulary)."""
        hidden, _ = self.model.model(self.model.embedding(ids))
        return self.decoder(hidden[:, -1:] + self.places)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids) if isinstance(model, FromLast) else model(ids, use_cache=False).logits


def tensors(inputs: np.ndarray, targets: np.ndarray) -> Pair:
    return torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(targets.astype(np.int64))


def sequences(args: argparse.Namespace, name: str) -> tuple[Pair, Pair]:
    """Training and test sequences."""
    task = MAD_TASKS[name]
    path = args.data and args.data / f"{name}.npz"
    if path and path.exists() and name != "memorization":
        held = np.load(path)
        test = tensors(held["test_inputs"], held["test_targets"])
    else:
        test = tensors(*task.split(args.data_seed, training=False))
    return tensors(*task.split(args.data_seed, training=True)), tuple(t[: args.tests] for t in test)  # pyright: ignore


def batches(pair: Pair, size: int, seed: int) -> Iterator[Pair]:
    """Without end, in a new order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(pair[0]), generator=generator)
        for begin in range(0, len(order) - size + 1, size):
            chosen = order[begin : begin + size]
            yield pair[0][chosen], pair[1][chosen]


def loss_of(model: nn.Module, pair: Pair) -> Tensor:
    """Mean cross-entropy of what is asked, in nats."""
    return F.cross_entropy(logits_of(model, pair[0]).flatten(0, 1), pair[1].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def accuracy(model: nn.Module, pair: Pair, size: int = 128) -> float:
    """Share of the asked tokens that are right."""
    right = asked = 0
    for ids, targets in zip(pair[0].split(size), pair[1].split(size), strict=True):
        said = logits_of(model, ids).argmax(-1)
        right, asked = right + int((said == targets).sum()), asked + int((targets != IGNORED).sum())
    return right / asked


def build(args: argparse.Namespace, model_name: str, task: MadTask, seed: int) -> nn.Module:
    settings: Mapping[str, Any] = BASELINES.get(model_name, {"memory": {**HOPE_MEMORY, **dict(args.memory)}})
    model = make_model(settings, vocabulary=task.vocabulary, width=args.width, layers=2, heads=args.heads, seed=seed)
    return FromLast(model, task.length) if task.from_last else model


def run(args: argparse.Namespace, model_name: str, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one model and test it."""
    training, test = sequences(args, name)
    model = build(args, model_name, MAD_TASKS[name], seed)
    feed = batches(training, args.batch, seed)
    half = len(test[0]) // 2
    choose, report = (test[0][:half], test[1][:half]), (test[0][half:], test[1][half:])
    few: Callable[[], float] = lambda: accuracy(model, (choose[0][:128], choose[1][:128]))  # noqa: E731
    done = train(
        model,
        lambda: loss_of(model, next(feed)),
        lambda: few() >= 0.999,
        rate=rate,
        steps=args.steps,
        enough=ENOUGH,
    )
    return {"validation": accuracy(model, choose), "test": accuracy(model, report), **done}


def found(
    results: Results, models: Sequence[str], tasks: Sequence[str], seeds: Sequence[int]
) -> dict[str, list[float]]:
    """Test accuracy of each model and task at each seed's best rate, the mean over seeds; NaN where there is none."""
    cells = {}
    for model in models:
        runs = [[results.best(model=model, task=task, seed=seed) for seed in seeds] for task in tasks]
        cells[model] = [float(np.mean([r["test"] for r in row if r is not None] or [np.nan])) for row in runs]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=list(MAD_TASKS), default=list(MAD_TASKS))
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 5e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--tests", type=int, default=512, help="test sequences, at most 1280")
    parser.add_argument("--data", type=Path, help="folder of MAD's files, TASK.npz, for the test sequences")
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--memory", type=setting, nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    names = ("steps", "batch", "width", "heads", "tests", "data_seed", "memory")
    results = Results(args.out, {name: getattr(args, name) for name in names} | {"hope memory": HOPE_MEMORY})
    for seed in args.seeds:
        for task in args.tasks:
            for model in args.models:
                for rate in args.rates:
                    key = {"model": model, "task": task, "rate": rate, "seed": seed}
                    results.once(key, lambda key=key: run(args, key["model"], key["task"], key["rate"], key["seed"]))
    results.write()
    cells = found(results, args.models, args.tasks, args.seeds)
    print(table({model: [*row, float(np.mean(row))] for model, row in cells.items()}, [*args.tasks, "mean"]))
    if args.picture:
        draw(args.picture, cells, args.tasks, "accuracy on held-out sequences")


if __name__ == "__main__":
    main()
