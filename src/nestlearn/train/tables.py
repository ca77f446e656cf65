"""The table of levels with the optimizer in it: its moments are memories too, which compress gradients (NL §4)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from nestlearn.eval.run_record import LevelRecord
from nestlearn.train.build import optimizer_groups
from nestlearn.train.config import TrainConfig
from nestlearn.train.optimizers import OPTIMIZERS, Memory, write_period


def level_table(model: Any, config: TrainConfig) -> list[LevelRecord]:
    """The model's own rows, then the optimizer's, from the fastest level to the slowest."""
    rows = [LevelRecord(*row) for row in model.level_table()]
    every_step = [
        dataclasses.replace(row, period=config.tokens_per_step) if math.isnan(row.period) else row for row in rows
    ]
    return every_step + optimizer_rows(model, config)


def optimizer_rows(model: Any, config: TrainConfig) -> list[LevelRecord]:
    """Each memory of gradients, for each period of the model's parameters, the chosen optimizer's and AdamW's.

    A level steps at most once per optimizer step; a frozen one has no memories.
    """
    counts: dict[tuple[float, str], int] = {}
    for group in optimizer_groups(config, model):
        optimizer = config.optimizer if group["rule"] == "memory" else "adamw"
        key = (max(group["period"], config.tokens_per_step), optimizer)
        counts[key] = counts.get(key, 0) + sum(p.numel() for p in group["params"])
    return [
        _row(optimizer, period, memory, count, config)
        for (period, optimizer), count in sorted(counts.items())
        if period != math.inf
        for memory in OPTIMIZERS[optimizer].memories
    ]


def _row(optimizer: str, period: float, memory: Memory, count: int, config: TrainConfig) -> LevelRecord:
    own = write_period(memory, period, config)
    name, context = f"{OPTIMIZERS[optimizer].name} / {memory.name}", f"mean gradient of {own:,.0f} tokens"
    return LevelRecord(name, own, memory.objective, context, count, memory.rule)
