"""A level that learns in context: which weights, how often, by which rule, and how far it may go."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.errors import UserError, suggest
from nestlearn.levels import Level
from nestlearn.models.hf import HopeForCausalLM
from nestlearn.models.level_chain import LevelChain
from nestlearn.models.stacking import stacked_levels

RULES = ("sgd", "momentum", "delta_momentum", "m3")
CONNECTIONS = ("sequential", "independent", "nested")


@dataclass(frozen=True)
class OnlineLevel:
    """One level of a stream's memory, a change Δ of linear weights every ``period`` tokens.

        g ← the mean gradient of the period, scaled to the norm ``clip`` at most
        Δ ← retention · Δ + rule(g);      ‖Δ‖ ≤ bound · ‖W‖ for each weight W

    name       unique among the levels
    period     tokens between two changes, >= 1; inf: the level is absent
    weights    paths of linear modules in the model, as ``model.get_submodule`` takes them; levels may share a weight
    lr         >= 0; 0: the level is absent. "sgd", "momentum" and "delta_momentum" move by at most lr · clip without
               momentum; "m3" by lr · 0.2 per entry
    rule       "sgd", "momentum", "delta_momentum" or "m3", see nestlearn.rules
    decay      of the momentum, in [0, 1)
    clip       > 0, of the norm of the level's gradient in nats per token; inf: never
    retention  in (0, 1], of Δ at each change: towards the slow weights
    bound      > 0, of ‖Δ‖_F / ‖W‖_F; inf: none
    spike      a period whose loss exceeds the running mean by ``spike`` standard deviations (and half a nat) rolls the
               level back to its last good state; inf: only what is not finite does, and no copy is kept for it
    """

    name: str
    period: float
    weights: tuple[str, ...]
    lr: float = 0.5
    rule: str = "sgd"
    decay: float = 0.9
    clip: float = 1.0
    retention: float = 1.0
    bound: float = 0.2
    spike: float = 6.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "period", Level(self.name, self.period).period)
        object.__setattr__(self, "weights", tuple(self.weights))
        if not self.weights or not all(isinstance(w, str) for w in self.weights):
            raise UserError(f"level {self.name!r}: weights is {self.weights!r}, must be at least one path of a module")
        if len(set(self.weights)) < len(self.weights):
            raise UserError(f"level {self.name!r}: weights names a module twice: name each once")
        if self.rule not in RULES:
            known = f"must be one of {list(RULES)}{suggest(str(self.rule), RULES)}"
            raise UserError(f"level {self.name!r}: rule is {self.rule!r}, {known}")
        self._check_numbers()

    def _check_numbers(self) -> None:
        ranges = {
            "lr": (self.lr >= 0 and math.isfinite(self.lr), "finite and >= 0"),
            "decay": (0 <= self.decay < 1, "in [0, 1)"),
            "clip": (self.clip > 0, "> 0 (or inf)"),
            "retention": (0 < self.retention <= 1, "in (0, 1]"),
            "bound": (self.bound > 0, "> 0 (or inf)"),
            "spike": (self.spike > 0, "> 0 (or inf)"),
        }
        for name, (holds, rule) in ranges.items():
            if not holds:
                raise UserError(f"level {self.name!r}: {name} is {getattr(self, name)}, must be {rule}")

    @property
    def active(self) -> bool:
        """Whether it ever changes anything."""
        return self.lr > 0 and self.period != math.inf


def check_levels(levels: Iterable[OnlineLevel], connection: str) -> tuple[OnlineLevel, ...]:
    """Names unique, fastest first; nested periods are multiples of each other."""
    levels = tuple(levels)
    check_connection(connection)
    if not levels or not all(isinstance(level, OnlineLevel) for level in levels):
        raise UserError(f"levels is {list(levels)!r}: give at least one OnlineLevel, or None for the model's own")
    names, periods = [level.name for level in levels], [level.period for level in levels]
    if len(set(names)) < len(names):
        raise UserError(f"levels have the names {names}: each name must be unique")
    if periods != sorted(periods):
        raise UserError(f"levels have the periods {periods}: order them from the fastest to the slowest")
    if connection == "nested":
        _check_nested(levels)
    return levels


def check_connection(connection: str, name: str = "connection") -> None:
    """UserError for one that does not exist."""
    if connection not in CONNECTIONS:
        near = suggest(str(connection), CONNECTIONS)
        raise UserError(f"{name} is {connection!r}, must be one of {list(CONNECTIONS)}{near}")


def _check_nested(levels: tuple[OnlineLevel, ...]) -> None:
    periods = [level.period for level in levels if level.active]
    for faster, slower in zip(periods, periods[1:], strict=False):
        if slower % faster:
            raise UserError(
                f"nested levels have the periods {periods}: each must be a multiple of the one before, since a level "
                f"restarts when the next slower one steps, but {slower:g} is none of {faster:g}"
            )
    counts = [len(level.weights) for level in levels]
    if len(set(counts)) > 1:
        raise UserError(f"nested levels have {counts} weights: a level restarts from the next, so all must have equal")


def online_levels(model: nn.Module, **settings: Any) -> tuple[OnlineLevel, ...]:
    """The levels that the model itself has, every linear weight of them: of a HopeForCausalLM, or of `stack_levels`.

    settings  of OnlineLevel but name and weights, the same for all levels: also a ``period`` instead of each one's
              own. A level's ``lr_scale`` multiplies ``lr``. A model that was trained for levels in context (its
              config's ``in_context``) brings their settings and learned rates
    """
    linear = {f"{name}.weight": name for name, module in model.named_modules() if is_linear(module)}
    if clash := sorted({"name", "weights"} & set(settings)):
        raise UserError(f"online_levels takes no {clash[0]!r}: a model's levels bring theirs; leave it out")
    if isinstance(model, HopeForCausalLM) and model.config.in_context:
        return _trained_levels(model, linear, settings)
    rate, made = settings.pop("lr", OnlineLevel.lr), []
    for level, names in _own_levels(model).items():
        own = tuple(linear[name] for name in names if name in linear)
        if not own:
            raise UserError(
                f"level {level.name!r} of {type(model).__name__} has no linear module (nn.Linear, Conv1D) whose "
                f"change a stream could hold; its weights are {list(names)[:2]}: give OnlineLevel objects of others"
            )
        told = {"period": level.period, "lr": rate * level.lr_scale, **settings}
        made.append(OnlineLevel(level.name, weights=own, **told))
    return tuple(made)


def _trained_levels(
    model: HopeForCausalLM, linear: dict[str, str], settings: dict[str, Any]
) -> tuple[OnlineLevel, ...]:
    names = {level.name: own for level, own in _own_levels(model).items()}
    rates, made = model.inner_rates.log_rate.detach().double().exp().tolist(), []  # pyright: ignore
    for rate, (name, told) in zip(rates, model.config.in_context.items(), strict=True):
        own = tuple(linear[weight] for weight in names[name] if weight in linear)
        told = {key: math.inf if value == "inf" else value for key, value in told.items()}
        made.append(OnlineLevel(name, weights=own, **{**told, "lr": rate, **settings}))
    return tuple(made)


def _own_levels(model: nn.Module) -> dict[Level, list[str]]:
    """Each level, fastest first, with the names of its parameters."""
    if isinstance(model, HopeForCausalLM):
        grouped: dict[Level, list[str]] = {}
        for name, level in model.parameter_levels().items():
            grouped.setdefault(level, []).append(name)
        return dict(sorted(grouped.items(), key=lambda item: item[0].period))
    if any(isinstance(module, LevelChain) for module in model.modules()):
        raise UserError(
            "the model was stacked with by='chain', which uses every MLP several times: a stream's levels cannot be "
            "told apart there; stack it by='depth', or let several OnlineLevels name the same weights"
        )
    if getattr(getattr(model, "config", None), "nested_levels", None) is not None:
        return stacked_levels(model)
    raise UserError(
        f"{type(model).__name__} has no levels of its own: give levels=[OnlineLevel(...)], or stack_levels(model) first"
    )


def is_linear(module: nn.Module) -> bool:
    """A torch Linear, GPT-2's Conv1D, or a quantised one: a map of the last dimension with a known width."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or hasattr(module, "in_features")


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is stored as (in, out)."""
    return type(module).__name__ == "Conv1D"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    if is_conv1d(module):
        into, out = module.weight.shape  # pyright: ignore
        return int(out), int(into)
    return int(module.out_features), int(module.in_features)  # pyright: ignore


def linear_matrix(module: nn.Module) -> Tensor:
    """W (out, in) in float32 at least; of a quantised module by what it does to the unit vectors."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        return wide.mT if is_conv1d(module) else wide
    with torch.no_grad():
        units = torch.eye(linear_shape(module)[1])
        return (module(units) - module(torch.zeros_like(units))).float().mT


def find_linear(model: nn.Module, path: str) -> nn.Module:
    """The module at a path. UserError where there is none, or it is not linear."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        known = [name for name, m in model.named_modules() if is_linear(m)]
        near = suggest(path, known) or f"; the first linear ones are {known[:3]}"
        raise UserError(f"the model has no module {path!r}{near}") from None
    if not is_linear(module):
        raise UserError(f"module {path!r} is a {type(module).__name__}, must be linear (nn.Linear, Conv1D)")
    return module


def describe(levels: tuple[OnlineLevel, ...], connection: str) -> str:
    """The levels as strict JSON: a state remembers who made it."""
    plain = [{k: _plain(v) for k, v in dataclasses.asdict(level).items()} for level in levels]
    return json.dumps({"connection": connection, "levels": plain}, sort_keys=True, allow_nan=False)


def _plain(value: Any) -> Any:
    return "inf" if value == math.inf else value
