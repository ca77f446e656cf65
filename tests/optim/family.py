"""The optimizers that are memories, each with settings that matter and its independent truth.

To add one: an entry in ``FAMILY``. Every test of the contract (tests/contracts/optimizer.py) then runs on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nestlearn import optim
from tests.oracles import optimizers as truth


def set_gradient(optimizer: torch.optim.Optimizer, parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient


@dataclass(frozen=True)
class Member:
    """name      unique                        make      optimizer class
    oracle    oracle(weights, gradients, lr=, weight_decay=, **settings) -> weights, of a list of matrices (out, in)
              and, for each step, the list of their gradients
    settings  hyperparameters that both are given; private: given to the optimizer alone
    feed      feed(optimizer, parameter, gradient) before each step: sets ``.grad``, and inputs where they are needed
    bad       settings that must be refused
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]
    oracle: Callable[..., list[Tensor]]
    settings: dict[str, Any] = field(default_factory=dict)
    private: dict[str, Any] = field(default_factory=dict)
    feed: Callable[[torch.optim.Optimizer, Tensor, Tensor], None] = set_gradient
    bad: tuple[dict[str, Any], ...] = ()

    def build(self, params: Any, lr: Any = 0.02, **settings: Any) -> torch.optim.Optimizer:
        return self.make(params, lr=lr, **self.settings | self.private | settings)


def squash(g: Tensor) -> Tensor:
    """A value that a user might give."""
    return torch.tanh(g)


BAD_M3 = (
    {"betas": (1.0, 0.9, 0.9)},
    {"betas": (0.9, 0.9)},
    {"slow_period": 0},
    {"slow_weight": -1},
    {"ns_steps": 0},
    {"eps": 0},
    {"style": "emma"},
    {"slow_period_unit": "days"},
    {"ns_dtype": torch.int8},
)
BAD_DELTA = ({"decay": 1.0}, {"decay": -0.1}, {"key": "normalised"}, {"values": "diag"}, {"values": 3}, {"eps": -1})
BAD_PRECONDITIONED = ({"decay": 1.0}, {"preconditioner": "kroneker"}, {"period": 0}, {"beta": 1.0}, {"eps": 0.0})

FAMILY = [
    Member("m3", optim.M3, truth.jointly(truth.m3), {"slow_period": 3, "betas": (0.9, 0.95, 0.8)}, bad=BAD_M3),
    Member("m3-paper", optim.M3, truth.jointly(truth.m3),
           {"style": "paper", "slow_period": 4, "ns_steps": 3, "eps": 0.1, "betas": (0.9, 0.95, 0.8)}),
    Member("delta", optim.DeltaMomentum, truth.jointly(truth.delta_momentum), bad=BAD_DELTA),
    Member("delta-literal", optim.DeltaMomentum, truth.jointly(truth.delta_momentum), {"key": "literal"}),
    Member("delta-diagonal", optim.DeltaMomentum, truth.jointly(truth.delta_momentum),
           {"values": "diagonal", "beta": 0.9, "decay": 0.8}),
    Member("delta-given", optim.DeltaMomentum, truth.jointly(truth.delta_momentum), {"values": squash}),
    Member("diagonal", optim.PreconditionedMomentum, truth.jointly(truth.preconditioned), {"beta": 0.95},
           bad=BAD_PRECONDITIONED),
    Member("kronecker", optim.PreconditionedMomentum, truth.jointly(truth.preconditioned),
           {"preconditioner": "kronecker", "period": 3, "beta": 0.9, "eps": 1e-3}),
    Member("newton-schulz", optim.PreconditionedMomentum, truth.jointly(truth.preconditioned),
           {"preconditioner": "newton_schulz", "ns_steps": 4}),
]  # fmt: skip
