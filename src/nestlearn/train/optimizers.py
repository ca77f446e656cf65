"""The optimizers that a run can choose, by ``TrainConfig.optimizer``, and what each of them remembers (NL §4).

Matrices go to the chosen one; embeddings, heads, norms, biases and gates to AdamW, whichever is chosen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim import Optimizer

from nestlearn.errors import UserError, suggest
from nestlearn.optim import DMGD, M3, DeltaMomentum
from nestlearn.optim.by_rule import ByRule

if TYPE_CHECKING:
    from nestlearn.train.config import TrainConfig

Groups = list[dict[str, Any]]


class Memory(NamedTuple):
    """A row of the table of levels: what of the gradients is remembered, by which objective and rule.

    every  the group's steps between two writes; a string is the setting of the optimizer that says so
    """

    name: str
    objective: str
    rule: str
    every: int | str = 1


class Choice(NamedTuple):
    """name: in the table of levels. make: the class, or what stands for it. states: see ``parameter_groups``."""

    name: str
    make: Callable[..., Optimizer]
    memories: tuple[Memory, ...]
    states: str = "memory"


def muon(groups: Groups, lr: float, **settings: Any) -> Optimizer:
    """torch's, with the step size of AdamW; it takes no stacks of matrices."""
    memory = partial(torch.optim.Muon, lr=lr, **{"adjust_lr_fn": "match_rms_adamw", **settings})
    betas, eps = groups[0]["betas_adamw"], groups[0]["eps_adamw"]
    return ByRule(groups, memory, partial(torch.optim.AdamW, lr=lr, betas=betas, eps=eps))


def adamw(groups: Groups, lr: float, **settings: Any) -> Optimizer:
    """torch's, for everything."""
    betas, eps = groups[0]["betas_adamw"], groups[0]["eps_adamw"]
    return torch.optim.AdamW(groups, lr=lr, **{"betas": betas, "eps": eps, **settings})


# NL Eq. 33 and App. B for AdamW, 42–44 for Muon, 75 for M3, 48–49 for delta momentum, 50 for DMGD
_SECOND = Memory("second moment", "½‖s − g²‖²", "s ← β₂ s + (1 − β₂) g²")
OPTIMIZERS = {
    "adamw": Choice("AdamW", adamw, (Memory("first moment", "−⟨m, g⟩", "m ← β₁ m + (1 − β₁) g"), _SECOND)),
    "muon": Choice("Muon", muon, (Memory("momentum", "−⟨m, g⟩", "m ← μ m + (1 − μ) g"),), "adamw"),
    "m3": Choice("M3", M3, (
        Memory("fast momentum", "−⟨m, g⟩", "m ← β₁ m + (1 − β₁) g"), _SECOND,
        Memory("slow momentum", "−⟨m, ḡ⟩", "m ← β₃ m + (1 − β₃) ḡ", "slow_period"))),
    "delta_momentum": Choice("DeltaMomentum", partial(DeltaMomentum, values="diagonal"), (
        Memory("momentum", "½‖m gᵀ − P‖²", "m ← m (α I − kᵀ k) − η P g"), _SECOND)),
    "dmgd": Choice("DMGD", DMGD, (Memory("deep momentum", "½‖m(u) + u‖²", "m ← α m − η ∇L(m; u)"),)),
}  # fmt: skip


def make_optimizer(groups: Groups, config: TrainConfig) -> Optimizer:
    """The chosen one. UserError for a setting that it does not have."""
    for group in groups:
        group |= {"betas_adamw": (config.beta1, config.beta2), "eps_adamw": config.epsilon}
    choice = OPTIMIZERS[config.optimizer]
    known = setting_names(config.optimizer)
    for key in config.optimizer_settings:
        if key not in known:
            raise UserError(f"unknown key 'optimizer_settings.{key}'{suggest(key, known)}: {choice.name} has {known}")
    return choice.make(groups, lr=config.learning_rate, **config.optimizer_settings)


def setting_names(optimizer: str) -> list[str]:
    """What ``optimizer_settings`` may hold."""
    torch_own = {"adamw": torch.optim.AdamW, "muon": torch.optim.Muon}
    parameters = inspect.signature(torch_own.get(optimizer, OPTIMIZERS[optimizer].make)).parameters
    return [name for name in parameters if name not in ("params", "lr", "weight_decay", "maximize")]


def write_period(memory: Memory, period: float, config: TrainConfig) -> float:
    """Tokens between two writes of a memory whose level has this period, as the settings or the default say."""
    if isinstance(memory.every, int):
        return period * memory.every
    default = inspect.signature(OPTIMIZERS[config.optimizer].make).parameters[memory.every].default
    count = config.optimizer_settings.get(memory.every, default)
    in_tokens = config.optimizer_settings.get(f"{memory.every}_unit") == "tokens"
    return max(period, count) if in_tokens else period * count
