"""The state of a batch of streams that learn: what each level has learned, what is still open, and what happened.

A `State` like every other: immutable, saved and loaded bit for bit, row-selected, forked for free.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from nestlearn.continual.delta import Delta
from nestlearn.errors import UserError
from nestlearn.memory.state import State

VERSION = 1
HISTORY = 4096  # changes kept in the trace; older ones are dropped, so that a state does not grow for ever
COLUMNS = ("level", "token", "loss", "gradient", "step", "distance", "verdict")
VERDICTS = ("applied", "bounded", "spike", "not finite")  # the last two: rolled back


@dataclass(frozen=True)
class LevelState(State):
    """One level of B streams. Tuples run over the level's weights.

    deltas   what was learned                  good    the last state that a later period confirmed; None: not kept
    memory   of the rule                       pending the sum of the open period's gradients
    loss     (B,) sum over the open period     broken  (B,) whether something in it was not finite
    typical  (B, 3): periods judged, mean and variance of their losses
    """

    deltas: tuple[Delta, ...]
    good: tuple[Delta, ...] | None
    memory: tuple[tuple[Tensor, ...], ...]
    pending: tuple[Delta, ...]
    loss: Tensor
    broken: Tensor
    typical: Tensor
    losses: int = 0
    steps: int = 0


class Change(NamedTuple):
    """One line of the trace: what a level did with one period of one stream.

    token     the change was made after so many tokens       loss      mean of the period, nats per token
    gradient  norm before clipping: the surprise             step      ‖change of Δ‖
    distance  ‖Δ‖ after it                                   verdict   one of VERDICTS
    """

    level: str
    token: int
    loss: float
    gradient: float
    step: float
    distance: float
    verdict: str


class Moved(NamedTuple):
    """How far one level of one stream went: ‖Δ − Δ before‖, and its share of the weights' own norm."""

    level: str
    row: int
    distance: float
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class OnlineState(State):
    """All that B streams are: see `LevelState`; and

    context  of the model, up to the start of the open segment          open   (B, m) inputs read in it
    last     (B, 1) the last token, which no forward has seen yet; None before the first
    trace    (B, n, 7), see `Change`       marks   named earlier states
    """

    levels: tuple[LevelState, ...]
    context: State | None
    open: Tensor
    last: Tensor | None
    trace: Tensor
    tokens: int
    made_by: str
    fingerprint: str
    marks: tuple[State, ...] = ()
    version: int = VERSION

    @property
    def rows(self) -> int:
        """Streams."""
        return self.open.shape[0]

    @property
    def level_names(self) -> list[str]:
        return [level["name"] for level in json.loads(self.made_by)["levels"]]

    def changes(self, row: int = 0) -> list[Change]:
        """The trace of one stream: every level's changes, in order."""
        names = self.level_names
        return [
            Change(names[int(line[0])], int(line[1]), line[2], line[3], line[4], line[5], VERDICTS[int(line[6])])
            for line in self.trace[row].tolist()
        ]

    def diff(self, before: OnlineState | None = None) -> list[Moved]:
        """Which levels of which streams moved since ``before``, how far, on which tokens. None: since the beginning."""
        return diff(self, before)

    @staticmethod
    def merge(states: Sequence[OnlineState], weights: Sequence[float] | None = None) -> OnlineState:
        """The weighted mean of what several states have learned; see `merge`."""
        return merge(states, weights)

    def sizes(self) -> dict[str, int]:
        """Bytes for each stream, by what they hold."""
        parts = {
            "deltas": [d for level in self.levels for d in level.deltas],
            "last good": [d for level in self.levels for d in level.good or ()],
            "pending gradients": [d for level in self.levels for d in level.pending],
            "rule": [m for level in self.levels for m in level.memory],
            "context": [self.context] if self.context is not None else [],
        }
        return {name: _bytes(values) // self.rows for name, values in parts.items()}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. UserError for a missing, truncated or foreign file, or another version's."""
        state = super().load(path)
        if state.version != VERSION:
            raise UserError(f"{path} is a stream of version {state.version}, this is version {VERSION}: read it again")
        return state

    def save(self, path: str | Path) -> None:
        """One safetensors file, whole or not at all."""
        partial = Path(f"{path}.partial")
        try:
            super().save(partial)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"{path} cannot be written ({error}): nothing was changed") from error


@dataclass(frozen=True)
class Mark(State):
    """A state under a name, without the marks that it had itself."""

    name: str
    state: OnlineState


def _bytes(values: Sequence[Any]) -> int:
    tensors: list[Tensor] = []
    for value in values:
        tensors += [value] if isinstance(value, Tensor) else list(_flat(value))
    return sum(t.numel() * t.element_size() for t in tensors)


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, State):
        return list(value.tensors())
    return [t for item in value for t in ([item] if isinstance(item, Tensor) else _flat(item))]


def merge(states: Sequence[OnlineState], weights: Sequence[float] | None = None) -> OnlineState:
    """The weighted mean of what several states have learned. All else (context, rules, trace) is the first one's.

    weights  one for each state, >= 0 and not all 0; their sum is brought to 1. None: equal
    """
    weights = [1.0] * len(states) if weights is None else [float(w) for w in weights]
    if not states or len(weights) != len(states) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise UserError(f"merge has {len(states)} states and the weights {weights}: one each, >= 0 and not all 0")
    first = states[0]
    for other in states[1:]:
        check_alike(other, first.made_by, first.fingerprint, first.rows)
    shares = [w / sum(weights) for w in weights]
    levels = [_merged([s.levels[i] for s in states], shares) for i in range(len(first.levels))]
    return dataclasses.replace(first, levels=tuple(levels))


def _merged(levels: list[LevelState], shares: list[float]) -> LevelState:
    deltas = []
    for of_one_weight in zip(*(level.deltas for level in levels), strict=True):
        total = of_one_weight[0].scaled(shares[0])
        for delta, share in zip(of_one_weight[1:], shares[1:], strict=True):
            total = total.add(delta.scaled(share))
        deltas.append(total)
    good = None if levels[0].good is None else tuple(deltas)
    return dataclasses.replace(levels[0], deltas=tuple(deltas), good=good)


def diff(after: OnlineState, before: OnlineState | None = None) -> list[Moved]:
    """Which levels of which streams moved, how far, and on which tokens. before None: since the slow weights."""
    if before is not None:
        check_alike(before, after.made_by, after.fingerprint, after.rows)
    moved = []
    for i, (name, level) in enumerate(zip(after.level_names, after.levels, strict=True)):
        distance = _distance(level, None if before is None else before.levels[i])
        for row in range(after.rows):
            since = 0 if before is None else before.tokens
            own = tuple(c for c in after.changes(row) if c.level == name and c.token > since)
            moved.append(Moved(name, row, float(distance[row]), own))
    return moved


def _distance(level: LevelState, before: LevelState | None) -> Tensor:
    """‖Δ − Δ before‖ over all weights of a level (B,)."""
    if before is None:
        return total_norm(level.deltas)
    pairs = zip(level.deltas, before.deltas, strict=True)
    return torch.stack([torch.linalg.matrix_norm(a.matrix() - b.matrix()) for a, b in pairs]).norm(dim=0)


def total_norm(deltas: Sequence[Delta]) -> Tensor:
    """√Σ‖D‖² (B,)."""
    return torch.stack([d.norm() for d in deltas]).norm(dim=0)


def check_alike(state: OnlineState, made_by: str, fingerprint: str, rows: int | None = None) -> None:
    """UserError for a stream of another model, of other levels, or of another number of rows."""
    if state.fingerprint != fingerprint:
        raise UserError(
            f"the stream was read by another model (fingerprint {state.fingerprint[:12]}, not {fingerprint[:12]}): "
            "its deltas belong to those weights; load the model it was read with"
        )
    if state.made_by != made_by:
        raise UserError(f"the stream was read with other levels: {state.made_by}, not {made_by}: give the same levels")
    if rows is not None and state.rows != rows:
        raise UserError(f"the states hold {state.rows} and {rows} streams: they must be of the same rows")
