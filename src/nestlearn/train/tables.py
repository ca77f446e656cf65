"""The table of levels with the optimizer in it: its moments are memories too, which compress gradients (NL §4)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from nestlearn.eval.run_record import LevelRecord
from nestlearn.optim import parameter_groups
from nestlearn.train.config import TrainConfig

# AdamW's two moments: name, internal objective, rule (NL Eq. 33 and App. B)
_MOMENTS = (
    ("first moment", "−⟨m, g⟩", "m ← β₁ m + (1 − β₁) g"),
    ("second moment", "½‖s − g²‖²", "s ← β₂ s + (1 − β₂) g²"),
)


def level_table(model: Any, config: TrainConfig) -> list[LevelRecord]:
    """The model's own rows, then AdamW's, from the fastest level to the slowest."""
    rows = [LevelRecord(*row) for row in model.level_table()]
    every_step = [
        dataclasses.replace(row, period=config.tokens_per_step) if math.isnan(row.period) else row for row in rows
    ]
    return every_step + optimizer_rows(model, config)


def optimizer_rows(model: Any, config: TrainConfig) -> list[LevelRecord]:
    """Two moments for each period of the model's parameters. A level steps at most once per optimizer step."""
    counts: dict[float, int] = {}
    for group in parameter_groups(model, lr=config.learning_rate):
        period = max(group["period"], config.tokens_per_step)
        counts[period] = counts.get(period, 0) + sum(p.numel() for p in group["params"])
    return [
        LevelRecord(
            f"AdamW / {name}", period, objective, f"mean gradient of {period:,.0f} tokens", counts[period], rule
        )
        for period in sorted(counts)
        if period != math.inf  # a frozen level has no moments
        for name, objective, rule in _MOMENTS
    ]
