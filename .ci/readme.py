"""Runs every command and every Python example of README.md, in order; stops at the first that fails.

They run in a scratch folder that links to the repository, so that no run of yours is touched, in the environment of the
Python that runs this. Only what makes them long is changed: `nestlearn train` is given a budget of a few thousand
tokens, and `make test`, which .ci/run has just done, is left out.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SHORT = "--tokens 20k --set held_out_tokens=20k"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def short_form(command: str) -> str | None:
    """The command as it is run here; None leaves it out."""
    if command.startswith("make demo"):
        return f'make demo VENV="{BIN.parent}" ARGS="{SHORT}"'
    if command.startswith(("make test", "git clone", "cd ", "source ")):
        return None
    return f"{command} {SHORT}" if command.startswith("nestlearn train") else command


def commands(readme: str) -> list[tuple[str, str]]:
    """(kind, text) of everything to run: a shell command per line, a Python example per block."""
    found = []
    for kind, text in BLOCK.findall(readme):
        if kind == "python":
            found.append((kind, text))
        elif kind == "sh":
            lines = [line.split("  #")[0].strip() for line in text.splitlines()]
            found += [(kind, short) for line in lines if line and (short := short_form(line))]
    return found


def run(kind: str, text: str, folder: Path) -> None:
    print(f"\n$ {text}", flush=True)
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    argv = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euo", "pipefail", "-c", text]
    subprocess.run(argv, cwd=folder, env=environment, check=True)


def main() -> None:
    found = commands((ROOT / "README.md").read_text())
    if len(found) < 3:
        sys.exit(
            f"README.md has {len(found)} commands to run, expected at least 3: are its blocks marked sh and python?"
        )
    with tempfile.TemporaryDirectory() as scratch:
        for path in ROOT.iterdir():
            if path.name != "runs" and not path.name.startswith("."):
                (Path(scratch) / path.name).symlink_to(path)
        for kind, text in found:
            run(kind, text, Path(scratch))


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"README.md: exit code {error.returncode} from: {error.cmd[-1]}")
