"""Every unit of work is a folder and a fresh process: unit.json goes in, result.json comes out.

So no unit depends on those before it, and one that dies takes nothing with it. The child reads its standard input,
a pipe that closes when the parent stops waiting or is killed: then it saves where it is, and ends.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nestlearn.errors import UserError

UNIT, RESULT = "unit.json", "result.json"
REFUSED, STOPPED = 2, 3  # exit codes; the reason of the first is in the file REASON
REASON = "refused.txt"

Launch = Callable[[str, Path], int]  # (module, folder) -> exit code


def do_unit(module: str, folder: Path, unit: dict[str, Any], launch: Launch) -> dict[str, Any]:
    """The result of a unit, from its folder where it is there already.

    Raises UserError where the folder holds another unit, and KeyboardInterrupt where this one was stopped.
    """
    from nestlearn.compare.plan import filled, write_json

    path = folder / UNIT
    unit = json.loads(json.dumps(unit))
    old = json.loads(path.read_text()) if path.exists() else unit
    if old | {"config": filled(old["config"])} != unit:
        raise UserError(f"{path} is not what these settings ask for: name another --out, or remove {folder}")
    if not (folder / RESULT).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, unit)
        _judge(launch(module, folder), folder)
    return json.loads((folder / RESULT).read_text())


def launcher(lock: int) -> Launch:
    """Runs ``main(folder)`` of a module in a new process, handing on the lock."""

    def launch(module: str, folder: Path) -> int:
        command = [sys.executable, "-m", __name__, module, str(folder)]
        # of its own session: Ctrl-C reaches the parent alone, who lets the child save
        child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, pass_fds=(lock,))
        try:
            return child.wait()
        except KeyboardInterrupt:
            assert child.stdin is not None
            child.stdin.close()
            _wait_or_kill(child)
            raise

    return launch


def stop_with_parent() -> None:
    """In the child: SIGTERM to itself once the parent closes the pipe."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def refuse(folder: Path, error: UserError) -> int:
    """In the child: leaves the reason for the parent."""
    (folder / REASON).write_text(str(error), encoding="utf-8")
    return REFUSED


def _wait_or_kill(child: subprocess.Popen[bytes]) -> None:
    """A second Ctrl-C does not wait."""
    try:
        child.wait()
    except KeyboardInterrupt:
        child.kill()
        child.wait()


def _judge(code: int, folder: Path) -> None:
    if code == STOPPED:
        raise KeyboardInterrupt
    if code == REFUSED and (folder / REASON).exists():
        raise UserError((folder / REASON).read_text(encoding="utf-8"))
    if code != 0 or not (folder / RESULT).exists():
        why = f"signal {-code}, often for want of memory" if code < 0 else f"exit code {code}, its error is above"
        raise UserError(f"the process of {folder} ended with {why}: the same command again goes on from there")


if __name__ == "__main__":
    stop_with_parent()  # before the module is imported, which takes seconds
    sys.exit(importlib.import_module(sys.argv[1]).main(Path(sys.argv[2])))
