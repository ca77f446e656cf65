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
from nestlearn.optim.capture import forget_inputs, record_inputs
from nestlearn.optim.matrices import matrices, whole
from tests.oracles import dgd_batch, dmgd, generalized
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
    shared    matrices of a group share their memory: who joins late joins what the others have learned
    alone     needs all samples in one process, and says so
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]
    oracle: Callable[..., list[Tensor]]
    settings: dict[str, Any] = field(default_factory=dict)
    private: dict[str, Any] = field(default_factory=dict)
    feed: Callable[[torch.optim.Optimizer, Tensor, Tensor], None] = set_gradient
    bad: tuple[dict[str, Any], ...] = ()
    shared: bool = False
    alone: bool = False

    def build(self, params: Any, lr: Any = 0.02, **settings: Any) -> torch.optim.Optimizer:
        return self.make(params, lr=lr, **self.settings | self.private | settings)


def set_samples(optimizer: torch.optim.Optimizer, parameter: Tensor, gradient: Tensor) -> None:
    """The gradient, and samples that have it."""
    parameter.grad = gradient
    forget_inputs(parameter)
    if parameter.ndim >= 2:
        record_inputs(
            parameter, *(t if parameter.ndim == 3 else t[0] for t in dgd_batch.samples(matrices(whole(gradient))))
        )


def squash(g: Tensor) -> Tensor:
    """A value that a user might give."""
    return torch.tanh(g)


def squares(z: Tensor) -> Tensor:
    """A feature map that a user might give: twice as many keys."""
    return torch.cat([z, z * z], dim=-1)


def huber(predicted: Tensor, value: Tensor) -> Tensor:
    """An objective of weights that has no closed form, one number for each sample."""
    return ((predicted - value).square() + 1).sqrt().sum(-1)


def half_way(error: Tensor, predicted: Tensor) -> Tensor:
    return 0.5 * predicted - error


def rough(state: Tensor, history: list[Tensor]) -> Tensor:
    """A retention that has no closed form."""
    return ((state - history[0]).square() + 0.1 * (state - history[-1]).pow(4)).sum() / 2


def saturating(memory: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """An objective of a momentum: what it recalls for its key is bounded."""
    return (memory * value).sum((-2, -1)) + torch.log(torch.cosh(memory @ key.mT)).sum((-2, -1))


BAD_DMGD = (
    {"decay": 1.0},
    {"memory_lr": -1},
    {"hidden": 0},
    {"objective": "l1"},
    {"output": "tan"},
    {"feature_map": "unt"},
    {"feature_map": 3},
    {"scale": "RMS"},
    {"ns_steps": 0},
)
BAD_DGD = ({"momentum": 1.0}, {"reduction": "men"}, {"batch": "joined"})
BAD_GGD = (
    {"objective": "l1"},
    {"value": "eror"},
    {"retention": 3},
    {"history": 0},
    {"solve": "closed"},
    {"inner_steps": 0},
    {"inner_lr": 0},
    {"reduction": "none"},
)
BAD_GM = ({"decay": 1.0}, {"objective": "L2"}, {"key": "normalised"}, {"values": "diagonal"}, *BAD_GGD[2:-1])
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
    Member("dmgd", optim.DMGD, dmgd.path, {"hidden": 6}, bad=BAD_DMGD, shared=True),
    Member("dmgd-given", optim.DMGD, dmgd.path, shared=True,
           settings={"hidden": 5, "objective": "dot", "output": "tanh", "feature_map": squares, "decay": 0.7}),
    Member("dmgd-newton-schulz", optim.DMGD, dmgd.path, shared=True,
           settings={"hidden": 4, "output": "newton_schulz", "feature_map": "unit", "ns_steps": 3}),
    Member("dmgd-literal", optim.DMGD, dmgd.path, shared=True,
           settings={"hidden": 4, "scale": "literal", "memory_lr": 2.0, "decay": 0.95, "seed": 3}),
    Member("dgd", optim.DGD, truth.jointly(dgd_batch.path), {"momentum": 0.5}, feed=set_samples, bad=BAD_DGD),
    Member("dgd-sequential", optim.DGD, truth.jointly(dgd_batch.path), feed=set_samples,
           settings={"momentum": 0.5, "batch": "sequential"}, alone=True),
    Member("generalized-gd", optim.GeneralizedGD, truth.jointly(generalized.weights_path), feed=set_samples,
           settings={"value": "step", "history": 3}, bad=BAD_GGD),
    Member("generalized-gd-given", optim.GeneralizedGD, truth.jointly(generalized.weights_path), feed=set_samples,
           settings={"objective": huber, "value": half_way, "retention": rough, "history": 2, "solve": "gradient",
                     "inner_steps": 3, "inner_lr": 0.3}, alone=True),
    Member("generalized-momentum", optim.GeneralizedMomentum, truth.jointly(generalized.momentum_path),
           {"history": 2, "solve": "exact", "key": "literal"}, bad=BAD_GM),
    Member("generalized-momentum-given", optim.GeneralizedMomentum, truth.jointly(generalized.momentum_path),
           {"objective": saturating, "key": squash, "values": squash, "retention": rough, "history": 2,
            "inner_steps": 3, "inner_lr": 0.3}),
]  # fmt: skip
SHARDED = [member for member in FAMILY if not member.alone]
