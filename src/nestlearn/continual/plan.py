"""What does not change while a learner lives: its levels, the weights that they change, and where segments end."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from nestlearn.continual import learning
from nestlearn.continual.delta import Delta
from nestlearn.continual.online_level import (
    OnlineLevel,
    check_levels,
    describe,
    find_linear,
    linear_matrix,
    linear_shape,
)
from nestlearn.continual.seam import Deltas, usable
from nestlearn.continual.stream_state import OnlineState
from nestlearn.errors import UserError


@dataclass(frozen=True)
class Weight:
    """A linear weight that a level may change."""

    out: int
    into: int
    norm: float
    dtype: torch.dtype
    device: torch.device

    def zero(self, rows: int) -> Delta:
        return Delta.zero(rows, self.out, self.into, torch.promote_types(self.dtype, torch.float32), self.device)


@dataclass(frozen=True)
class Plan:
    """Made by `make_plan`. made_by, fingerprint: what a state remembers of the levels and of the model."""

    levels: tuple[OnlineLevel, ...]
    connection: str
    context: float
    weights: dict[str, Weight]
    made_by: str
    fingerprint: str

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    @property
    def taped(self) -> list[str]:
        """The weights that some active level changes."""
        active = {path for level in self.levels if level.active for path in level.weights}
        return [path for path in self.weights if path in active]

    def room(self, tokens: int) -> float:
        """Tokens until the open segment ends."""
        ends = [level.period for level in self.levels if level.active] + [self.context]
        return min((end - tokens % end for end in ends if end != math.inf), default=math.inf)

    def empty(self, rows: int) -> OnlineState:
        """Nothing read."""
        levels = [
            learning.initial_level(level, [self.weights[path].zero(rows) for path in level.weights])
            for level in self.levels
        ]
        return OnlineState(
            levels=tuple(levels),
            context=None,
            open=torch.zeros(rows, 0, dtype=torch.long, device=self.device),
            last=None,
            trace=torch.zeros(rows, 0, 7, dtype=torch.float64, device=self.device),
            tokens=0,
            made_by=self.made_by,
            fingerprint=self.fingerprint,
        )

    def deltas(self, state: OnlineState) -> dict[str, tuple[Delta, ...]]:
        """By weight, what the active levels have learned."""
        found: dict[str, tuple[Delta, ...]] = {}
        for level, own in zip(self.levels, state.levels, strict=True):
            for path, delta in zip(level.weights, own.deltas, strict=True):
                if level.active:
                    found[path] = (*found.get(path, ()), delta)
        return found

    def in_use(self, model: nn.Module, state: OnlineState) -> Deltas:
        """The same, as the model's forward uses it."""
        found = self.deltas(state).items()
        forms = {path: usable(model.get_submodule(path), own, self.weights[path].dtype) for path, own in found}
        return {path: form for path, form in forms.items() if form}


def make_plan(model: nn.Module, levels: Iterable[OnlineLevel], connection: str, context: float | None) -> Plan:
    """Raises UserError for levels that the model cannot have."""
    _check_differentiable(model)
    levels = check_levels(levels, connection)
    paths = dict.fromkeys(path for level in levels for path in level.weights)
    weights = {path: _measure(find_linear(model, path)) for path in paths}
    if connection == "nested":
        check_shapes(levels, {path: (weight.out, weight.into) for path, weight in weights.items()})
    limit = context_limit(model, context)
    return Plan(levels, connection, limit, weights, describe(levels, connection), fingerprint(model, paths))


def fingerprint(model: nn.Module, paths: Iterable[str]) -> str:
    """Of the architecture and of the weights that adapt: a state's deltas belong to these."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for path in sorted(paths):
        matrix = linear_matrix(model.get_submodule(path)).flatten()
        sample = matrix[:: max(1, len(matrix) // 4096)].double().cpu()
        digest.update(f"{path} {len(matrix)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _measure(module: nn.Module) -> Weight:
    out, into = linear_shape(module)
    own = next(iter(module.parameters()), torch.zeros(0))
    dtype = own.dtype if own.is_floating_point() else torch.float32
    return Weight(out, into, float(linear_matrix(module).norm()), dtype, own.device)


def _check_differentiable(model: nn.Module) -> None:
    """Weights may be of any precision, but what is above a level must pass its gradient down."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise UserError(
                f"module {name!r} is a {type(module).__name__} of {type(module).__module__}, "
                "which passes no gradient down: give a model in bfloat16, or one whose weights alone are quantised"
            )


def context_limit(model: nn.Module, context: float | None) -> float:
    if context is None:
        config = getattr(model, "config", None)
        return float(getattr(config, "max_position_embeddings", None) or math.inf)
    if not context >= 2 or (context != math.inf and context != int(context)):
        raise UserError(f"context is {context}, must be a whole number of tokens, at least 2 (or inf)")
    return context


def check_shapes(levels: tuple[OnlineLevel, ...], sizes: Mapping[str, tuple[int, ...]]) -> None:
    """UserError where nested levels cannot take over one another's Δ. sizes: (out, in) of each weight."""
    shapes = [[sizes[path] for path in level.weights] for level in levels]
    if any(own != shapes[0] for own in shapes):
        raise UserError(
            f"nested levels have weights of the shapes {shapes}: a level restarts from the next slower, so all "
            "must have the same, in the same order"
        )
