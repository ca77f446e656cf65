"""Two optimizers as one: the groups with the rule "memory" to one of them, the others to the other.

The optimizers of `nestlearn.optim` have AdamW on board and need none of this; torch.optim.Muon, which takes matrices
only, does. Both share the state and the groups of this one: it saves, resumes and schedules like any single optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

Factory = Callable[[list[dict[str, Any]]], Optimizer]


class ByRule(Optimizer):
    """Steps the groups of ``parameter_groups`` with the optimizer that ``memory`` or ``adamw`` builds, by their rule.

    memory  for the groups with the rule "memory", e.g. ``partial(torch.optim.Muon, lr=0.01)``
    adamw   for those with the rule "adamw"
    """

    def __init__(self, groups: Iterable[dict[str, Any]], memory: Factory, adamw: Factory) -> None:
        super().__init__(groups, {})
        self.parts: dict[str, Optimizer] = {}
        for rule, factory in (("memory", memory), ("adamw", adamw)):
            if own := self._groups(rule):
                self.parts[rule] = factory(own)
                self.defaults |= self.parts[rule].defaults
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both. Returns the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for rule, part in self.parts.items():
            part.param_groups = self._groups(rule)
            part.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _groups(self, rule: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["rule"] == rule]

    def _share(self) -> None:
        for part in self.parts.values():
            part.state = self.state
