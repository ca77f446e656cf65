"""What the quality benchmarks share: settings from the command line, and facts to keep with a result."""

from __future__ import annotations

import ast
import sys
import time
from typing import Any

from nestlearn.train.environment import commit, hardware, versions


def setting(text: str) -> tuple[str, Any]:
    """ "chunk=32" to ("chunk", 32)."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def about() -> dict[str, Any]:
    """Command, date, commit, hardware and versions of a result."""
    return {
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
    }
