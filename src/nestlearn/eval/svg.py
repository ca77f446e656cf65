"""Line charts as inline SVG. Colours are CSS classes (report.css), so that one drawing serves light and dark."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

POINTS_PER_LINE = 500  # more than a reader can see
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 60, 14, 14, 44


@dataclass(frozen=True, eq=False)
class Line:
    """One line: `x`, `y` (n,) finite or NaN (a gap); `css` colours it; `raw` (n,) is drawn faintly behind it."""

    name: str
    x: np.ndarray
    y: np.ndarray
    css: str
    raw: np.ndarray | None = None


@dataclass(frozen=True)
class Mark:
    """A labelled straight line at a value of x (vertical) or y (horizontal)."""

    label: str
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class Axis:
    """`low` < `high`; on a logarithmic axis both are positive."""

    low: float
    high: float
    label: str = ""
    log: bool = False
    text: Callable[[float], str] | None = None  # how a value is written; None: with as many decimals as the ticks need

    def fraction(self, value: np.ndarray | float) -> np.ndarray:
        """Where a value lies between low (0) and high (1)."""
        if not self.log:
            return (np.asarray(value, dtype=np.float64) - self.low) / (self.high - self.low)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(np.asarray(value, dtype=np.float64) / self.low) / math.log(self.high / self.low)

    def ticks(self, wanted: int) -> list[float]:
        if self.log:
            return log_ticks(self.low, self.high, wanted)
        return linear_ticks(self.low, self.high, wanted)

    def named_ticks(self, wanted: int) -> list[tuple[float, str]]:
        ticks = self.ticks(wanted)
        return list(zip(ticks, map(self.text or _decimals(ticks), ticks), strict=True))


def _decimals(ticks: Sequence[float]) -> Callable[[float], str]:
    """One format for all: as many decimals as the tick that needs most."""
    decimals = max((len(f"{tick:.6g}".partition(".")[2]) for tick in ticks if "e" not in f"{tick:.6g}"), default=0)
    return lambda value: f"{value:.2g}" if value and abs(value) < 1e-4 else f"{value:,.{decimals}f}".replace("-", "−")


def linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about `wanted` of them."""
    raw = (high - low) / wanted
    size = 10 ** math.floor(math.log10(raw))
    step = size * next(m for m in (1, 2, 5, 10) if m * size >= raw * 0.7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Powers of ten within [low, high]; where there are fewer than two, linear ticks."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    stride = max(1, math.ceil(len(powers) / wanted))
    return [10.0**p for p in powers][::stride] if len(powers) >= 2 else linear_ticks(low, high, wanted)


def around(values: Sequence[np.ndarray], label: str = "", *, log: bool = False, pad: float = 0.04) -> Axis:
    """An axis that holds every finite value, with a little air."""
    kept = np.concatenate([np.asarray(v, dtype=np.float64).ravel() for v in values])
    kept = kept[np.isfinite(kept) & ((kept > 0) | (not log))]
    low, high = (float(kept.min()), float(kept.max())) if len(kept) else (1.0, 2.0)
    if log:
        room = max((high / low) ** pad, 1.05)
        return Axis(low / room, high * room, label, log=True)
    room = (high - low) * pad or abs(high) * 0.02 or 1.0
    return Axis(low - room, high + room, label)


def spans_decades(values: Sequence[np.ndarray], ratio: float = 30.0) -> bool:
    """Whether curves are so far apart that only a logarithmic axis shows them all."""
    kept = np.concatenate([v[np.isfinite(v)] for v in values])
    return len(kept) > 0 and bool(kept.min() > 0) and kept.max() / kept.min() > ratio


def path(x: np.ndarray, y: np.ndarray) -> str:
    """The `d` of an SVG path through (x, y); a value that is not finite lifts the pen."""
    parts, pen = [], "M"
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if not (math.isfinite(a) and math.isfinite(b)):
            pen = "M"
            continue
        parts.append(f"{pen}{a:.1f} {b:.1f}")
        pen = "L"
    return "".join(parts)


@dataclass(frozen=True)
class Frame:
    """The rectangle of a chart, in units of the drawing, and what its sides mean."""

    x: Axis
    y: Axis
    left: float
    right: float
    top: float
    bottom: float

    def across(self, value: np.ndarray | float) -> np.ndarray:
        return self.left + np.clip(self.x.fraction(value), -1, 2) * (self.right - self.left)

    def up(self, value: np.ndarray | float) -> np.ndarray:
        return self.bottom - np.clip(self.y.fraction(value), -1, 2) * (self.bottom - self.top)


def line_chart(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    width: int = 520,
    height: int = 300,
    marks: Sequence[Mark] = (),
    note: str = "",
) -> str:
    """A chart with grid, axes, marks and lines; `note` is what a screen reader says. What leaves the frame is cut."""
    frame = Frame(x, y, MARGIN_LEFT, width - MARGIN_RIGHT, MARGIN_TOP, height - MARGIN_BOTTOM)
    thin = [_thin(line) for line in lines]
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(note)}" '
        f'data-chart="{_readout(thin, frame)}">{_grid(frame)}{_clipped(frame, "".join(_curve(l, frame) for l in thin))}'
        f"{''.join(_mark(mark, frame) for mark in marks)}{_labels(frame, height)}"
        f'<line class="cursor" y1="{frame.top}" y2="{frame.bottom}" hidden=""/></svg>'
    )


def _clipped(frame: Frame, inside: str) -> str:
    """A nested svg cuts its content at its own edge, without ids that could clash."""
    width, height = frame.right - frame.left, frame.bottom - frame.top
    box = f'x="{frame.left}" y="{frame.top}" width="{width}" height="{height}"'
    return f'<svg {box} viewBox="{frame.left} {frame.top} {width} {height}">{inside}</svg>'


def legend(lines: Sequence[Line]) -> str:
    keys = "".join(f'<li><i class="key {line.css}"></i>{escape(line.name)}</li>' for line in lines)
    return f'<ul class="legend">{keys}</ul>'


def _thin(line: Line) -> Line:
    stride = math.ceil(len(line.x) / POINTS_PER_LINE)
    keep = slice(None, None, max(1, stride))
    return Line(line.name, line.x[keep], line.y[keep], line.css, None if line.raw is None else line.raw[keep])


def _curve(line: Line, frame: Frame) -> str:
    x, y = frame.across(line.x), frame.up(line.y)
    if len(x) == 1:
        return f'<circle class="dot {line.css}" cx="{x[0]:.1f}" cy="{y[0]:.1f}" r="3.5"/>'
    raw = "" if line.raw is None else f'<path class="raw {line.css}" d="{path(x, frame.up(line.raw))}"/>'
    return f'{raw}<path class="line {line.css}" d="{path(x, y)}"/>'


def _grid(frame: Frame) -> str:
    parts = [_rule("axis", frame.left, frame.bottom, frame.right, frame.bottom)]
    for tick, name in frame.y.named_ticks(7):
        at = float(frame.up(tick))
        parts.append(_rule("grid", frame.left, at, frame.right, at))
        parts.append(_text("tick", frame.left - 7, at + 4, name, "end"))
    for tick, name in frame.x.named_ticks(6):
        at = float(frame.across(tick))
        parts.append(_rule("axis", at, frame.bottom, at, frame.bottom + 4))
        parts.append(_text("tick", at, frame.bottom + 17, name, "middle"))
    return "".join(parts)


def _labels(frame: Frame, height: float) -> str:
    across, up = (frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2
    turned = f'<g transform="rotate(-90 13 {up:.1f})">{_text("label", 13, up, frame.y.label, "middle")}</g>'
    return _text("label", across, height - 7, frame.x.label, "middle") + turned


def _mark(mark: Mark, frame: Frame) -> str:
    """Only a mark inside the frame is drawn: a yardstick far from the curves would squeeze them."""
    if mark.x is not None and frame.x.low <= mark.x <= frame.x.high:
        at = float(frame.across(mark.x))
        text = _text("mark-text", at + 5, frame.top + 11, mark.label, "start")
        return _rule("mark", at, frame.top, at, frame.bottom) + text
    if mark.y is not None and frame.y.low <= mark.y <= frame.y.high:
        at = float(frame.up(mark.y))
        text = _text("mark-text", frame.right - 4, at - 5, mark.label, "end")
        return _rule("mark", frame.left, at, frame.right, at) + text
    return ""


def _rule(css: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(css: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _readout(lines: Sequence[Line], frame: Frame) -> str:
    """What report.js needs to say the values under the pointer."""
    data = {
        "frame": [frame.left, frame.right],
        "x": {"low": frame.x.low, "high": frame.x.high, "label": frame.x.label},
        "unit": frame.y.label,
        "lines": [
            {"name": line.name, "css": line.css, "x": digits(line.x, 6), "y": digits(line.y, 4)} for line in lines
        ],
    }
    return escape(json.dumps(data, separators=(",", ":")), quote=True)


def digits(values: np.ndarray, significant: int) -> list[float | None]:
    """JSON numbers of a few digits; what is not finite becomes null."""
    return [float(f"{v:.{significant}g}") if math.isfinite(v) else None for v in np.asarray(values).tolist()]
