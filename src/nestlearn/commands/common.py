"""What several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import arg

from nestlearn.errors import UserError

if TYPE_CHECKING:
    from nestlearn.train.checkpoint import Checkpoint
    from nestlearn.train.config import TrainConfig


def shown(metavar: str, default: str, name: str | None = None) -> Any:
    """How --help shows a flag."""
    return arg(name=name, metavar=metavar, help_behavior_hint=f"(default: {default})")


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, or the last one in the folder of a run."""
    from nestlearn.train.checkpoint import find_checkpoint, load_checkpoint

    return load_checkpoint(find_checkpoint(path))


def changed(config: TrainConfig, given: dict[str, Any], overrides: tuple[str, ...]) -> TrainConfig:
    """The config with other fields, then other settings given as KEY=VALUE."""
    import dataclasses

    return dataclasses.replace(config, **given).replace(overrides)


def new_folder(out: Path | None, preset: str) -> Path:
    """``out`` if it is new or empty, or else the first free one of runs/PRESET, runs/PRESET-2, …"""
    if out is None:
        candidates = (Path("runs") / (preset if n == 1 else f"{preset}-{n}") for n in range(1, 10**6))
        return next(path for path in candidates if not path.exists())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder: name a new one, or go on with --resume {out}")
    return out
