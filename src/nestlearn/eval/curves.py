"""Recorded numbers, ready to draw: reading metrics.jsonl, smoothing, and naming quantities with their units."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nestlearn.errors import UserError


class Curve(NamedTuple):
    """Training as it was logged, each (n,) float64: tokens (increasing), seconds, loss in bits per byte."""

    tokens: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray


def read_curve(path: Path) -> Curve | None:
    """The curve in a metrics.jsonl; None where the file is missing or holds nothing yet.

    A resumed run repeats some tokens: the later line wins. An unfinished last line (the run was killed while it wrote)
    is left out; a broken line anywhere else is a UserError.
    """
    if not path.exists():
        return None
    rows: list[tuple[float, float, float]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            raw = json.loads(line)
            row = (float(raw["tokens"]), float(raw["seconds"]), float(raw["loss_bits_per_byte"]))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise UserError(f"{path} line {number} is not a line of metrics ({error}): delete that line") from None
        while rows and rows[-1][0] >= row[0]:
            rows.pop()
        rows.append(row)
    return Curve(*np.array(rows).T) if rows else None


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving average over `width` entries, over fewer at the ends; as long as `values` (n,)."""
    half = max(0, width // 2)
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def count(value: float) -> str:
    """1234567 -> "1.23 M": three significant digits and a multiple of a thousand."""
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if size == 1e4 else size):.3g}{suffix}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """252 -> "4 min 12 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def period(tokens: float) -> str:
    """A level's period in words."""
    return "never changes" if tokens == math.inf else f"{tokens:,.0f}"


def relative(value: float, reference: float) -> str:
    """(95.8, 100) -> "4.2 % lower"."""
    change = (value - reference) / reference
    return f"{100 * abs(change):.1f} % {'higher' if change > 0 else 'lower'}"
