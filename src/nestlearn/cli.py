"""The command line: ``nestlearn train | eval | generate | levels | report``.

Bad input ends with one line on stderr and exit code 2. Everything heavy is imported when a command needs it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from functools import partial, wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, arg

from nestlearn import __version__
from nestlearn.errors import UserError, suggest

if TYPE_CHECKING:
    from nestlearn.train.checkpoint import Checkpoint
    from nestlearn.train.config import TrainConfig

DEFAULT_PRESET = "tiny-cpu"


def _shown(metavar: str, default: str, name: str | None = None) -> Any:
    """How --help shows a flag."""
    return arg(name=name, metavar=metavar, help_behavior_hint=f"(default: {default})")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, or 2 for bad input and interruptions."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # Greek on a terminal that has none is no reason to fail
    if argv in (["--version"], ["-V"]):
        print(f"nestlearn {__version__}")
        return 0
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of saving and loading, which take no time to speak of
    try:
        command = _parse(argv or ["--help"])
        command()
    except SystemExit:  # tyro has printed --help
        return 0
    except UserError as error:
        return _refused(str(error))
    except KeyboardInterrupt:
        return _refused("interrupted: nothing was changed")
    except OSError as error:
        return _refused(
            f"{error.filename or 'input or output'}: {error.strerror or error}: make it accessible, then repeat"
        )
    return 0


def train(
    preset: Annotated[str | None, _shown("NAME", DEFAULT_PRESET)] = None,
    text: Annotated[tuple[str, ...], _shown("PATH …", "the Python standard library's source")] = (),
    tokenizer: Annotated[str | None, _shown("SPEC", "the preset's")] = None,
    tokens: Annotated[str | None, _shown("N", "the preset's")] = None,
    out: Annotated[Path | None, _shown("RUN", "runs/PRESET, numbered where that exists")] = None,
    seed: Annotated[int | None, _shown("N", "the preset's")] = None,
    resume: Annotated[Path | None, _shown("PATH", "a new run")] = None,
    overrides: Annotated[tuple[str, ...], _shown("KEY=VALUE …", "none", name="set")] = (),
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


def evaluate(
    checkpoint: Positional[Path],
    text: Annotated[tuple[str, ...], _shown("PATH …", "what the run has held out")] = (),
    tokenizer: Annotated[str | None, _shown("SPEC", "the checkpoint's")] = None,
    tokens: Annotated[str | None, _shown("N", "as in training")] = None,
) -> None:
    """Bits per byte of a checkpoint, beside xz -9 and bz2 -9 of the same bytes.

    Args:
        checkpoint: A checkpoint, or the folder of a run.
        text: Files and folders to read, all of them.
        tokenizer: Must be the checkpoint's own; checked if given.
        tokens: Evaluate at most so many.
    """
    import dataclasses

    from nestlearn.data.tokens import tokenize
    from nestlearn.eval.compression import compression
    from nestlearn.eval.perplexity import measured_bytes
    from nestlearn.train.build import load_model, read_corpus
    from nestlearn.train.config import parse_count
    from nestlearn.train.run import evaluate

    found = _checkpoint(checkpoint)
    config = dataclasses.replace(found.config, held_out_tokens=parse_count(tokens)) if tokens else found.config
    own = found.tokenizer(tokenizer)
    corpus = read_corpus(text or config.text)
    ids = tokenize((*corpus.train, *corpus.held_out) if text else corpus.held_out, own)
    measured = evaluate(load_model(found.folder), ids, own, config)
    packed = compression(measured_bytes(ids, own, config.held_out_tokens))
    print(corpus.summary)
    print(f"{measured.bits_per_byte:.3f} bits per byte of {measured.bytes:,} bytes, {measured.tokens:,} tokens")
    print(f"{packed.xz:.3f} xz -9\n{packed.bz2:.3f} bz2 -9")


def generate(
    checkpoint: Positional[Path],
    prompt: str,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    tokenizer: Annotated[str | None, _shown("SPEC", "the checkpoint's")] = None,
) -> None:
    """Continue a text.

    Args:
        checkpoint: A checkpoint, or the folder of a run.
        prompt: The text to continue.
        tokens: How many to add, at most.
        temperature: 0 takes the likeliest token, 1 samples as the model predicts.
        top_k: Sample among the k likeliest tokens; 0 among all.
        seed: The same seed gives the same text.
        tokenizer: Must be the checkpoint's own; checked if given.
    """
    from nestlearn.train.build import load_model
    from nestlearn.train.sample import continue_text

    found = _checkpoint(checkpoint)
    own = found.tokenizer(tokenizer)
    options: dict[str, Any] = {"tokens": tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
    text = continue_text(load_model(found.folder), own, prompt.encode(), **options)
    print(prompt + text.decode(errors="replace"))


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
        found = _checkpoint(Path(preset_or_checkpoint))
        config, model = found.config, load_model(found.folder)
    else:
        config = load_recipe(preset_or_checkpoint)
        with torch.device("meta"):
            model = build_model(config, vocabulary(config))
    _print_levels(level_table(model, config))


def report(run: Positional[Path]) -> None:
    """Write RUN/report.html again.

    Args:
        run: The folder of a run.
    """
    from nestlearn.eval.report import write_report

    print(write_report(run))


def _parse(argv: Sequence[str]) -> Callable[[], None]:
    """The command with its arguments, not yet called. What tyro refuses in a box becomes one line."""
    commands = {"train": train, "eval": evaluate, "generate": generate, "levels": levels, "report": report}
    _refuse_repeated(argv)
    later = {name: _later(command) for name, command in commands.items()}
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.extras.subcommand_cli_from_dict(later, prog="nestlearn", description=__doc__, args=argv)
    except SystemExit as end:
        if not end.code:
            raise
    words = _inside(box.getvalue()).partition(" Got errors:")[0].rstrip(". ")
    raise UserError(f"{words}{_nearest(argv, commands)}: see nestlearn {argv[0] if argv[0] in commands else ''} --help")


def _inside(box: str) -> str:
    """The first part of tyro's box in one line; where the output is not UTF-8, there is a title instead of a box."""
    parts = [""]
    for line in (line.strip("│ ") for line in box.splitlines() if line[:1] not in "╭╰"):
        parts = [*parts, ""] if line and not line.strip("─-") else [*parts[:-1], f"{parts[-1]} {line}"]
    return parts[0 if box.startswith("╭") else 1].strip()


def _later(command: Callable[..., None]) -> Callable[..., Any]:
    """Takes the same arguments, and does nothing yet."""
    return wraps(command)(lambda *args, **kwargs: partial(command, *args, **kwargs))


def _nearest(argv: Sequence[str], commands: dict[str, Callable[..., None]]) -> str:
    """The nearest to a command or flag that does not exist."""
    if argv[0] not in commands:
        return suggest(argv[0], commands)
    names = signature(commands[argv[0]]).parameters
    flags = ["--set" if name == "overrides" else f"--{name.replace('_', '-')}" for name in names]
    unknown = [word for word in argv if word.startswith("--") and word.partition("=")[0] not in flags]
    return suggest(unknown[0], flags) if unknown else ""


def _start(preset: str, given: dict[str, Any], overrides: tuple[str, ...], out: Path | None) -> None:
    from nestlearn.recipes import load_recipe

    config = _changed(load_recipe(preset), given, overrides)
    run = _new_folder(out, preset)
    _train(config, run, None)


def _resume(path: Path, given: dict[str, Any], overrides: tuple[str, ...]) -> None:
    start = _checkpoint(path)
    start.tokenizer(given.pop("tokenizer", None))
    config = _changed(start.config, given, overrides)
    for key in ("model", "seed", "batch_size", "sequence_length", "tokenizer", "optimizer", "optimizer_settings"):
        if getattr(config, key) != getattr(start.config, key):
            raise UserError(f"--set {key}: a resumed run keeps its {key}, train anew without --resume to change it")
    _train(config, start.folder.parent, start)


def _train(config: TrainConfig, run: Path, start: Checkpoint | None) -> None:
    from rich.console import Console

    from nestlearn.train.display import Display
    from nestlearn.train.run import run_training

    display = Display(Console())
    page = run_training(config, run, start, display)
    display.say(f"checkpoint: {sorted(run.glob('checkpoint-*'))[-1]}\nreport: {page}")


def _changed(config: TrainConfig, given: dict[str, Any], overrides: tuple[str, ...]) -> TrainConfig:
    import dataclasses

    return dataclasses.replace(config, **given).replace(overrides)


def _checkpoint(path: Path) -> Checkpoint:
    from nestlearn.train.checkpoint import find_checkpoint, load_checkpoint

    return load_checkpoint(find_checkpoint(path))


def _new_folder(out: Path | None, preset: str) -> Path:
    """``out`` if it is new or empty, or else the first free one of runs/PRESET, runs/PRESET-2, …"""
    if out is None:
        candidates = (Path("runs") / (preset if n == 1 else f"{preset}-{n}") for n in range(1, 10**6))
        return next(path for path in candidates if not path.exists())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder: name a new one, or go on with --resume {out}")
    return out


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


def _refuse_with_resume(**flags: Any) -> None:
    for name, value in flags.items():
        if value is not None:
            raise UserError(f"--{name} {value} together with --resume: a resumed run keeps its own, leave --{name} out")


def _refuse_repeated(argv: Sequence[str]) -> None:
    """Of a flag given twice, the parser would silently keep the last."""
    flags = [word.partition("=")[0] for word in argv if word.startswith("--") and len(word) > 2]
    for flag in flags:
        if flags.count(flag) > 1:
            raise UserError(f"{flag} is given twice: give it once, with several values where it takes them")


def _refused(message: str) -> int:
    print(f"nestlearn: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
