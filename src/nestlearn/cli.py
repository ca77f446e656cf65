"""The command line: ``nestlearn COMMAND``, each command of `COMMANDS` a file in `commands/`.

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
from typing import Any

import tyro

from nestlearn import __version__
from nestlearn.commands.compare import compare
from nestlearn.commands.continual import continual
from nestlearn.commands.doctor import doctor
from nestlearn.commands.eval import evaluate
from nestlearn.commands.generate import generate
from nestlearn.commands.levels import levels
from nestlearn.commands.report import report
from nestlearn.commands.train import train
from nestlearn.errors import UserError, suggest

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "levels": levels,
    "compare": compare,
    "report": report,
    "continual": continual,
    "doctor": doctor,
}


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


def _parse(argv: Sequence[str]) -> Callable[[], None]:
    """The command with its arguments, not yet called. What tyro refuses in a box becomes one line."""
    _refuse_repeated(argv)
    later = {name: _later(command) for name, command in COMMANDS.items()}
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.extras.subcommand_cli_from_dict(later, prog="nestlearn", description=__doc__, args=argv)
    except SystemExit as end:
        if not end.code:
            raise
    words = _inside(box.getvalue()).partition(" Got errors:")[0].rstrip(". ")
    raise UserError(f"{words}{_nearest(argv)}: see nestlearn {argv[0] if argv[0] in COMMANDS else ''} --help")


def _inside(box: str) -> str:
    """The first part of tyro's box in one line; where the output is not UTF-8, there is a title instead of a box."""
    parts = [""]
    for line in (line.strip("│ ") for line in box.splitlines() if line[:1] not in "╭╰"):
        parts = [*parts, ""] if line and not line.strip("─-") else [*parts[:-1], f"{parts[-1]} {line}"]
    return parts[0 if box.startswith("╭") else 1].strip()


def _later(command: Callable[..., None]) -> Callable[..., Any]:
    """Takes the same arguments, and does nothing yet."""
    return wraps(command)(lambda *args, **kwargs: partial(command, *args, **kwargs))


def _nearest(argv: Sequence[str]) -> str:
    """The nearest to a command or flag that does not exist."""
    if argv[0] not in COMMANDS:
        return suggest(argv[0], COMMANDS)
    names = signature(COMMANDS[argv[0]]).parameters
    flags = ["--set" if name == "overrides" else f"--{name.replace('_', '-')}" for name in names]
    unknown = [word for word in argv if word.startswith("--") and word.partition("=")[0] not in flags]
    return suggest(unknown[0], flags) if unknown else ""


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
