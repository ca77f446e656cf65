"""What a level is: a name and a period in tokens, and which levels fire at a given moment.

The *period* is the number of tokens between two changes of a component, the one unit of time everywhere in this
library; the *update frequency* of NL Def. 2 is 1/period. ``math.inf`` is a level that never changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nestlearn.errors import UserError, suggest


@dataclass(frozen=True)
class Level:
    """One level of a continuum memory system.

    name         unique among its siblings
    period       tokens between two changes, >= 1; ``math.inf`` (also "inf") never changes
    hidden_size  hidden width of its block; None shares the model's ``intermediate_size`` equally
    lr_scale     multiplies the learning rate of this level, >= 0
    layers       share of a model's layers, the last ones (rounded up), that have this level, in (0, 1]
    """

    name: str
    period: float
    hidden_size: int | None = None
    lr_scale: float = 1.0
    layers: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "." in self.name:
            raise UserError(f"level name is {self.name!r}, must be a word without dots (it names parameters)")
        period = _number(self.period)
        if not period >= 1:
            raise UserError(
                f"level {self.name!r}: period is {self.period}, must be at least 1 token (or inf for a frozen level)"
            )
        if period != math.inf and period != int(period):
            raise UserError(f"level {self.name!r}: period is {self.period}, must be a whole number of tokens (or inf)")
        if self.hidden_size is not None and not (isinstance(self.hidden_size, int) and self.hidden_size >= 1):
            raise UserError(
                f"level {self.name!r}: hidden_size is {self.hidden_size}, must be at least 1 (or None to share)"
            )
        if not (isinstance(self.lr_scale, int | float) and self.lr_scale >= 0):
            raise UserError(f"level {self.name!r}: lr_scale is {self.lr_scale}, must be >= 0")
        if not (isinstance(self.layers, int | float) and 0 < self.layers <= 1):
            raise UserError(f"level {self.name!r}: layers is {self.layers}, must be a share of the layers in (0, 1]")
        if self.layers < 1 and self.hidden_size is None:
            raise UserError(f"level {self.name!r}: layers is {self.layers}, so its own hidden_size must be given")
        object.__setattr__(self, "period", period)

    @property
    def frequency(self) -> float:
        """Changes per token."""
        return 1.0 / self.period

    def to_dict(self) -> dict[str, Any]:
        """A form that strict JSON can hold: an infinite period is the string "inf"."""
        period: float | str = "inf" if self.period == math.inf else int(self.period)
        told = asdict(self) | {"period": period}
        return {key: value for key, value in told.items() if key != "layers" or value != 1}


def fires(period: float, before: int, after: int) -> bool:
    """Whether a multiple of ``period`` lies in ``(before, after]``: the rule for every slow level.

    before, after: tokens seen before and after a step.
    """
    return period != math.inf and after // int(period) > before // int(period)


def parse_levels(levels: Iterable[Level | Mapping[str, Any] | tuple | float]) -> tuple[Level, ...]:
    """Levels from Level objects, dicts, (name, period) pairs or bare periods, fastest first, names unique."""
    parsed = tuple(_parse(level) for level in levels)
    if not parsed:
        raise UserError("levels is empty: give at least one, for example levels=[4096]")
    names = [level.name for level in parsed]
    if len(set(names)) < len(names):
        raise UserError(f"levels have the names {names}: each name must be unique")
    periods = [level.period for level in parsed]
    if periods != sorted(periods):
        raise UserError(
            f"levels have the periods {periods}: order them from the fastest (smallest period) to the slowest"
        )
    return parsed


def _parse(level: Level | Mapping[str, Any] | tuple | list | float) -> Level:
    if isinstance(level, Level):
        return level
    if isinstance(level, Mapping):
        known = Level.__dataclass_fields__
        for key in level:
            if key not in known:
                raise UserError(f"level has the unknown key {key!r}{suggest(str(key), known)}: known are {list(known)}")
        if "period" not in level:
            raise UserError(f"level {dict(level)} has no period: give the tokens between two changes")
        return Level(**{"name": _name(level["period"]), **level})
    if isinstance(level, tuple | list):
        if not 2 <= len(level) <= 5:
            raise UserError(f"level {level!r} must be (name, period), then hidden_size, lr_scale and layers if wanted")
        return Level(*level)
    return Level(_name(level), _number(level))


def _name(period: float | str) -> str:
    number = _number(period)
    return f"every-{int(number)}" if math.isfinite(number) else "frozen"


def _number(period: Any) -> float:
    try:
        return float(period)
    except (TypeError, ValueError):
        raise UserError(f"level period is {period!r}, must be a number of tokens (or inf for a frozen level)") from None
