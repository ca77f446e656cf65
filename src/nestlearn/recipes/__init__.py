"""Presets: a run is a function that returns a complete TrainConfig. Loaded by name, when asked for."""

from __future__ import annotations

from importlib import import_module

from nestlearn.errors import UserError, suggest
from nestlearn.train.config import TrainConfig

NAMES = ("tiny-cpu", "ttt-e2e", "hope-340m", "hope-760m", "hope-1.3b")


def load_recipe(name: str) -> TrainConfig:
    """The preset of that name; UserError with the nearest name where there is none."""
    if name not in NAMES:
        raise UserError(f"unknown preset {name!r}{suggest(name, NAMES)}: known are {', '.join(NAMES)}")
    function = name.replace("-", "_").replace(".", "_")
    return getattr(import_module(f"nestlearn.recipes.{function}"), function)()
