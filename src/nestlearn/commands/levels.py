"""``nestlearn levels``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from nestlearn.commands.common import open_checkpoint


def levels(preset_or_checkpoint: Positional[str]) -> None:
    """Print what learns at which pace: component, period, objective, context, parameters; the optimizer included.

    Args:
        preset_or_checkpoint: Name of a preset, or a folder.
    """
    import torch

    from nestlearn.recipes import load_recipe
    from nestlearn.train.build import build_model, load_model, vocabulary
    from nestlearn.train.tables import level_table

    if Path(preset_or_checkpoint).is_dir():
        found = open_checkpoint(Path(preset_or_checkpoint))
        config, model = found.config, load_model(found.folder)
    else:
        config = load_recipe(preset_or_checkpoint)
        with torch.device("meta"):
            model = build_model(config, vocabulary(config))
    _print_levels(level_table(model, config))


def _print_levels(rows: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("component", "period", "objective", "context", "parameters", "rule", box=None, pad_edge=False)
    for row in rows:
        period = "never" if row.period == float("inf") else f"{row.period:,.0f}"
        table.add_row(row.component, period, row.objective, row.context, f"{row.parameters:,}", row.rule)
    for index in (1, 4):
        table.columns[index].justify = "right"
    Console(width=None if sys.stdout.isatty() else 200).print(table)
