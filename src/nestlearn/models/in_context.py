"""The levels that a model was trained to change in context, and how fast: part of the model, saved with it.

η = exp(λ)        one inner rate for each level, learned with everything else (continual/meta.py)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nestlearn.errors import UserError, suggest

SETTINGS = ("period", "lr", "rule", "decay", "clip", "retention", "bound", "spike")
START = 0.1  # of a learned inner rate


def in_context_levels(given: Any, names: Sequence[str]) -> dict[str, dict[str, Any]] | None:
    """Checked and as strict JSON holds it, fastest first. names: the model's levels."""
    if not given:
        return None
    if not isinstance(given, Mapping) or not all(isinstance(own, Mapping) for own in given.values()):
        raise UserError(
            f"in_context is {given!r}: must be a level's settings by its name, {{'fast': {{'period': 64}}}}"
        )
    for name, own in given.items():
        if name not in names:
            raise UserError(f"in_context names the level {name!r}{suggest(str(name), names)}: there are {list(names)}")
        for key in own:
            if key not in SETTINGS:
                raise UserError(f"in_context.{name} has the unknown key {key!r}{suggest(str(key), SETTINGS)}")
        _check(f"in_context.{name}", own)
    ordered = sorted(given, key=lambda name: float(given[name]["period"]))
    return {name: {key: "inf" if v == math.inf else v for key, v in given[name].items()} for name in ordered}


def _check(where: str, own: Mapping[str, Any]) -> None:
    """What this floor relies on; OnlineLevel checks the rest."""
    period, rate = own.get("period"), own.get("lr", START)
    if not isinstance(period, int | float) or not 1 <= period < math.inf or period != int(period):
        raise UserError(f"{where}.period is {period!r}: must be a whole number of tokens, at least 1")
    if not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise UserError(f"{where}.lr is {rate!r}: must be a finite number above 0, where the learned rate starts")


class InnerRates(nn.Module):
    """λ (n,) of the levels, fastest first."""

    def __init__(self, levels: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self._start = [math.log(own.get("lr", START)) for own in levels.values()]
        self.log_rate = nn.Parameter(torch.empty(len(levels)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.log_rate.copy_(torch.tensor(self._start))
