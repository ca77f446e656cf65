"""``nestlearn train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from nestlearn.commands.common import changed, new_folder, open_checkpoint, shown
from nestlearn.errors import UserError

if TYPE_CHECKING:
    from nestlearn.train.checkpoint import Checkpoint
    from nestlearn.train.config import TrainConfig

DEFAULT_PRESET = "tiny-cpu"
KEPT = ("model", "seed", "batch_size", "sequence_length", "tokenizer", "optimizer", "optimizer_settings", "meta")


def train(
    preset: Annotated[str | None, shown("NAME", DEFAULT_PRESET)] = None,
    text: Annotated[tuple[str, ...], shown("PATH …", "the Python standard library's source")] = (),
    tokenizer: Annotated[str | None, shown("SPEC", "the preset's")] = None,
    tokens: Annotated[str | None, shown("N", "the preset's")] = None,
    out: Annotated[Path | None, shown("RUN", "runs/PRESET, numbered where that exists")] = None,
    seed: Annotated[int | None, shown("N", "the preset's")] = None,
    resume: Annotated[Path | None, shown("PATH", "a new run")] = None,
    overrides: Annotated[tuple[str, ...], shown("KEY=VALUE …", "none", name="set")] = (),
) -> None:
    """Train a model, evaluate it on held-out text and write a report.

    Args:
        preset: Name of a preset.
        text: Files and folders of .txt .md .py .jsonl .parquet, also .gz and .xz.
        tokenizer: bytes, a tokenizers JSON file or a Hugging Face folder.
        tokens: How many to train on, for example 20k or 5M.
        out: The run's folder, new or empty.
        seed: Of the initial weights and the order of the text.
        resume: A checkpoint, or the folder of a run, to go on with.
        overrides: Any other setting, as key=value, for example learning_rate=1e-3 model.hidden_size=64.
    """
    from nestlearn.train.config import parse_count

    given = {"text": text or None, "tokenizer": tokenizer, "seed": seed, "tokens": tokens and parse_count(tokens)}
    given = {key: value for key, value in given.items() if value is not None}
    if resume is None:
        _start(preset or DEFAULT_PRESET, given, overrides, out)
    else:
        _refuse_with_resume(preset=preset, seed=seed, out=out)
        _resume(resume, given, overrides)


def _start(preset: str, given: dict[str, Any], overrides: tuple[str, ...], out: Path | None) -> None:
    from nestlearn.recipes import load_recipe

    config = changed(load_recipe(preset), given, overrides)
    run = new_folder(out, preset)
    _train(config, run, None)


def _resume(path: Path, given: dict[str, Any], overrides: tuple[str, ...]) -> None:
    start = open_checkpoint(path)
    start.tokenizer(given.pop("tokenizer", None))
    config = changed(start.config, given, overrides)
    for key in KEPT:
        if getattr(config, key) != getattr(start.config, key):
            raise UserError(f"--set {key}: a resumed run keeps its {key}, train anew without --resume to change it")
    _train(config, start.folder.parent, start)


def _train(config: TrainConfig, run: Path, start: Checkpoint | None) -> None:
    from rich.console import Console

    from nestlearn.continual.meta_training import meta_gradient
    from nestlearn.train.display import Display
    from nestlearn.train.run import run_training

    display = Display(Console())
    page = run_training(config, run, start, display, meta_gradient(config))
    display.say(f"checkpoint: {sorted(run.glob('checkpoint-*'))[-1]}\nreport: {page}")


def _refuse_with_resume(**flags: Any) -> None:
    for name, value in flags.items():
        if value is not None:
            raise UserError(f"--{name} {value} together with --resume: a resumed run keeps its own, leave --{name} out")
