"""What the optimizer benchmarks share: every optimizer by its name, for any model; finished runs kept in a JSON file.

A name may carry settings, "M3 slow_weight=0.5 slow_period=8". Matrices go to the optimizer of that name at the swept
rate; embeddings, heads, norms and biases to AdamW at a rate that is the same for all of them (AdamW's own best one).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nestlearn import optim
from nestlearn.optim import parameter_groups
from nestlearn.optim.by_rule import ByRule

sys.path.insert(0, str(Path(__file__).parents[3]))
from benchmarks.quality.common import about, setting

BETAS = (0.9, 0.95)
RESULTS = Path(__file__).parents[2] / "results"
Groups = list[dict[str, Any]]


def adamw(groups: Groups, lr: float, **settings: Any) -> Optimizer:
    """torch's, for everything."""
    return torch.optim.AdamW(groups, lr=lr, **{"betas": BETAS, "weight_decay": 0.0, **settings})


def muon(groups: Groups, lr: float, **settings: Any) -> Optimizer:
    """torch's Muon for matrices, with the step size of AdamW, and torch's AdamW for the rest."""
    memory = partial(torch.optim.Muon, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", **settings)
    return ByRule(groups, memory, partial(torch.optim.AdamW, lr=lr, betas=BETAS, weight_decay=0.0))


def momentum(groups: Groups, lr: float, **settings: Any) -> Optimizer:
    """Gradient descent with momentum 0.9, for everything."""
    return torch.optim.SGD(groups, lr=lr, **{"momentum": 0.9, **settings})


def delta_momentum(groups: Groups, lr: float, **settings: Any) -> Optimizer:
    """Delta Momentum with Adam-like values: without them its step has the scale of the gradient, as momentum's has."""
    return optim.DeltaMomentum(groups, lr=lr, **{"values": "diagonal", **settings})


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "momentum": momentum,
    "AdamW": adamw,
    "Muon": muon,
    "M3": lambda groups, lr, **settings: optim.M3(groups, lr=lr, **settings),
    "DeltaMomentum": delta_momentum,
    "DMGD": lambda groups, lr, **settings: optim.DMGD(groups, lr=lr, **settings),
}


def make(name: str, lr: float) -> Callable[[Groups], Optimizer]:
    """A factory of the optimizer, for groups or for ``Leveled``."""
    kind, *settings = name.split()
    return partial(OPTIMIZERS[kind], lr=lr, **dict(setting(s) for s in settings))


def groups_for(name: str, model: nn.Module, lr: float, adamw_lr: float | None = None) -> Groups:
    """Groups with the rates set. Muon takes no stacks of matrices: a fast weight's initial states are AdamW's there."""
    kind = name.split()[0]
    if kind in ("AdamW", "momentum"):
        adamw_lr = None
    states = "adamw" if kind == "Muon" else "memory"
    return parameter_groups(model, lr=lr, adamw_lr=adamw_lr, weight_decay=0.0, states=states)


class Results:
    """Finished runs in a file: what is in it is not run again. A run is a dictionary; its key is a part of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []

    def find(self, **key: Any) -> list[dict[str, Any]]:
        return [run for run in self.runs if all(run.get(name) == value for name, value in key.items())]

    def run(self, key: dict[str, Any], function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The run of this key: the finished one, or a new one, which is written at once."""
        if found := self.find(**key):
            return found[0]
        self.runs.append(key | function())
        self.write()
        return self.runs[-1]

    def write(self, **summary: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"about": about(), **summary, "runs": self.runs}, indent=1)
        partial_file = self.path.with_suffix(".partial")
        partial_file.write_text(text + "\n")
        partial_file.replace(self.path)


def dated(name: str) -> Path:
    """Where a result of today goes if nothing else is asked for."""
    return RESULTS / f"{name}-{time.strftime('%Y-%m-%d')}.json"


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and standard deviation of the sample (0 for one value)."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def figure(columns: int) -> Any:
    """(figure, axes) without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(5.2 * columns, 4.2), layout="constrained")
