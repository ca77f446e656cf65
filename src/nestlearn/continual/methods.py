"""What a continual learner may do against forgetting, each as a few lines around the same training loop.

sequential    every parameter steps at each step, task after task
replay        a share of each task's texts is stored and takes a quarter of every later epoch: the tokens stay equal
ewc           + λ/2 Σ F (θ − θ*)²,  F the mean squared gradient at the end of each task, summed over tasks, θ* the
              weights after the last one (arXiv 1612.00796; F summed as in arXiv 1805.06370)
lora          each task trains its own low-rank W + B A, which is then added to the weights (arXiv 2106.09685)
levels        MLP blocks on paces of their own (`stack_levels`), above the frozen rest of the encoder
joint         all tasks at once: the upper bound of what these parameters and tokens can reach
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nestlearn.continual.classifier import Classifier
from nestlearn.errors import UserError, suggest
from nestlearn.levels import Level
from nestlearn.models.mlp_blocks import find_mlps
from nestlearn.models.stacking import stack_levels


@dataclass(frozen=True)
class Method:
    """One learner.

    head     "linear" or "memory"              replay  share of each task's texts that is stored, 0 to 1
    periods  of the MLP levels, tokens, fastest first; None: the MLPs step at each step; (): they never do
    reads    the frozen level is read beside the others (`Classifier`)
    ewc      strength λ, 0: none               rank    of each task's own low-rank change, 0: none
    joint    all tasks at once
    """

    name: str
    head: str = "linear"
    periods: tuple[int, ...] | None = None
    reads: bool = False
    replay: float = 0.0
    ewc: float = 0.0
    rank: int = 0
    joint: bool = False


RANK, EWC_STRENGTH = 8, 1e4


def methods(periods: tuple[int, ...]) -> dict[str, Method]:
    """All methods by name; ``periods``: of the MLP levels when there are most, fastest first."""
    known = [
        Method("sequential"),
        Method("ewc", ewc=EWC_STRENGTH),
        Method("lora", rank=RANK),
        Method("replay-1", replay=0.01),
        Method("replay-10", replay=0.1),
        Method("joint", joint=True),
        Method("sequential+memory", head="memory"),
        Method("ewc+memory", head="memory", ewc=EWC_STRENGTH),
        Method("lora+memory", head="memory", rank=RANK),
        Method("replay-10+memory", head="memory", replay=0.1),
        Method("joint+memory", head="memory", joint=True),
        Method("levels-linear", periods=periods),
    ]
    known += [
        Method(f"levels-{2 + n}", head="memory", periods=periods[len(periods) - n :], reads=n > 0)
        for n in range(len(periods) + 1)
    ]
    return {method.name: method for method in known}


def choose(names: Iterable[str], known: dict[str, Method]) -> list[Method]:
    """The methods of these names. Raises UserError for one that does not exist."""
    for name in names:
        if name not in known:
            raise UserError(f"method {name!r} does not exist{suggest(name, known)}: known are {', '.join(known)}")
    return [known[name] for name in names]


def prepare(model: Classifier, method: Method, trained: int) -> None:
    """Makes trainable what the method trains: the MLP blocks of the ``trained`` upper layers, and the head."""
    blocks = find_mlps(model)
    for block in blocks[len(blocks) - trained :] if method.periods != () else []:
        for module in block.modules:
            module.requires_grad_(True)
    if method.periods is not None:
        below = len(blocks) - (trained if method.periods else 0)
        n = len(method.periods)
        shares = [trained // n + (i >= n - trained % n) for i in range(n)]
        levels = [*map(float, method.periods), *([Level("frozen", math.inf)] if below else [])]
        stack_levels(model, levels, shares=[*shares, *([below] if below else [])])


class LowRank(nn.Module):
    """W + B A, zero at first."""

    def __init__(self, out: int, inside: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inside) / math.sqrt(inside))
        self.up = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def add_low_rank(model: Classifier, trained: int, rank: int) -> list[nn.Linear]:
    """A fresh low-rank change on each linear map of the upper MLP blocks, the only thing there that is trained."""
    blocks = find_mlps(model)[-trained:]
    layers = [m for block in blocks for module in block.modules for m in module.modules() if isinstance(m, nn.Linear)]
    for block in blocks:
        for module in block.modules:
            module.requires_grad_(False)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.out_features, layer.in_features, rank))
    return layers


def merge_low_rank(layers: list[nn.Linear]) -> None:
    """Adds the changes to the weights and takes the parametrization away."""
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        layer.weight.requires_grad_(False)


class Anchor:
    """Elastic weight consolidation; ``strength`` λ."""

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}  # by name: θ*, F

    def penalty(self, model: nn.Module) -> Tensor:
        parameters = dict(model.named_parameters())
        terms = [(f * (parameters[name] - at).square()).sum() for name, (at, f) in self.kept.items()]
        return self.strength / 2 * torch.stack(terms).sum() if terms else torch.zeros(())

    def hold(self, model: nn.Module, squares: dict[str, Tensor]) -> None:
        """At the end of a task: ``squares`` are its mean squared gradients."""
        for name, p in model.named_parameters():
            if name in squares:
                before = self.kept[name][1] if name in self.kept else torch.zeros_like(squares[name])
                self.kept[name] = (p.detach().clone(), before + squares[name])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [cast(nn.Parameter, p) for p in model.parameters() if p.requires_grad]
