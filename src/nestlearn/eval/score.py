"""A passage as a score: the text in rows of COLUMNS monospaced characters, with staves above each row, as inline SVG.

The staves share the row's columns: the model's loss and, for one layer, surprise, rate and retention of each of its
memories. Every staff has one scale for the whole passage, so that rows compare.
"""

import base64
import json
import struct
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from nestlearn.eval.passage import Passage, Signal
from nestlearn.eval.svg import Axis, around, digits, path

COLUMNS = 90
CELL = 10.0  # width of a column, in units of the drawing
GUTTER = 126.0  # room for the names of the staves
TEXT_HEIGHT = 26.0
STAFF_GAP = 9.0
HEAT_STEPS = 12
HEAT_COLOUR = (213, 94, 0)  # vermillion of Okabe and Ito, visible on white and on black
SPACE = frozenset("·↵⇥‥")


@dataclass(frozen=True, eq=False)
class Voice:
    """One line of a staff: `drawn` (T,) is its shape, `values` (T,) what the read-out says."""

    name: str
    css: str
    values: np.ndarray
    drawn: np.ndarray


@dataclass(frozen=True, eq=False)
class Staff:
    """A small multiple above every row of text. `low` fixes the lower end of its axis."""

    title: str
    unit: str
    voices: tuple[Voice, ...]
    height: float = 40.0
    low: float | None = None
    bars: bool = False

    @property
    def axis(self) -> Axis:
        """From `low`, else the least value, to the 99.5th percentile: one outlier shall not flatten the rest."""
        drawn = np.concatenate([voice.drawn for voice in self.voices])
        drawn = drawn[np.isfinite(drawn)]
        high = np.percentile(drawn, 99.5) if len(drawn) else 1.0
        axis = around([drawn[drawn <= high]], pad=0.06)
        return axis if self.low is None else Axis(self.low, max(axis.high, self.low + 1e-9))


def group_staves(passage: Passage, group: str) -> list[Staff]:
    """Loss, then surprise, rate and retention of this group's memories, then the surprise of its CMS levels."""
    memories = passage.memories(group)
    surprise = [(s, s.surprise, s.surprise) for s in memories]
    rate = [(s, s.rate, s.rate / _mean(s.rate)) for s in memories if s.rate is not None]
    retain = [(s, s.retain, s.retain) for s in memories if s.retain is not None]
    staves = [
        Staff("loss", "bits", (Voice("loss", "m-loss", passage.loss, passage.loss),), low=0.0, bars=True),
        Staff("surprise", "‖∇y L̃‖", _merged(surprise), 54.0, low=0.0),
        Staff("rate η", "÷ its mean", _merged(rate)),
        Staff("retention α", "", _merged(retain), 32.0),
        Staff("CMS levels", "‖∇y L‖", level_voices(passage.levels(group)), 44.0, low=0.0),
    ]
    return [staff for staff in staves if staff.voices]


def _mean(values: np.ndarray) -> float:
    """The mean; 1 where it is 0, so that a rate that never writes is drawn as a line at 0."""
    return float(values.mean()) or 1.0


def level_voices(levels: Sequence[Signal]) -> tuple[Voice, ...]:
    """CMS levels in shades from fast (light) to slow (dark)."""
    shades = np.linspace(0, 4, len(levels)).round().astype(int) if levels else ()
    return tuple(Voice(s.name, f"l-{shade}", s.surprise, s.surprise) for s, shade in zip(levels, shades, strict=True))


def _merged(curves: Sequence[tuple[Signal, np.ndarray, np.ndarray]]) -> tuple[Voice, ...]:
    """A voice for each (signal, values, drawn); of those with the same shape only the first is drawn."""
    voices: list[Voice] = []
    for signal, values, drawn in curves:
        seen = any(np.allclose(drawn, voice.drawn, rtol=1e-4, atol=0, equal_nan=True) for voice in voices)
        voices.append(Voice(signal.name, signal.css, values, np.full(len(drawn), np.nan) if seen else drawn))
    return tuple(voices)


def score(passage: Passage, group: str) -> str:
    """The whole passage for one group (a layer): one SVG per row of text, and the numbers for the read-out."""
    staves = group_staves(passage, group)
    starts, widths = layout(passage.texts)
    heat = heat_levels(heat_source(passage, group))
    rows = [_row(passage, staves, heat, tokens, starts, widths) for tokens in _rows(starts)]
    data = {
        "left": GUTTER,
        "cell": CELL,
        "texts": passage.texts,
        "staves": [
            {"title": f"{s.title} {s.unit}".strip(), "lines": [[v.name, v.css, digits(v.values, 3)] for v in s.voices]}
            for s in staves
        ],
    }
    return f'{_keys(staves)}<div class="score">{"".join(rows)}{script_data(data)}</div>'


def script_data(data: object) -> str:
    """JSON inside a page: no text in it can end the script element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c").replace("&", "\\u0026")
    return f'<script type="application/json">{text}</script>'


def layout(texts: Sequence[str]) -> tuple[list[tuple[int, int]], list[int]]:
    """(row, column) where each token starts, and its width in columns; a token is never split, a row never too long."""
    starts, widths = [], []
    row = column = 0
    for text in texts:
        width = min(COLUMNS, sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text))
        if column + width > COLUMNS:
            row, column = row + 1, 0
        starts.append((row, column))
        widths.append(width)
        column += width
    return starts, widths


def heat_levels(values: np.ndarray) -> np.ndarray:
    """(T,) integers 0..HEAT_STEPS-1: where a value stands between the 5th and the 99th percentile of the passage."""
    known = values[np.isfinite(values)]
    if not len(known) or known.max() == known.min():
        return np.zeros(len(values), dtype=int)
    low, high = np.percentile(known, [5, 99])
    fraction = np.clip((np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-12), 0, 1)
    return np.minimum((fraction * HEAT_STEPS).astype(int), HEAT_STEPS - 1)


def heat_source(passage: Passage, group: str) -> np.ndarray:
    """What colours the text: the surprise of the memory that is read, else of the fastest CMS level, else the loss."""
    signals = passage.memories(group) + passage.levels(group)
    return signals[0].surprise if signals else passage.loss


def _rows(starts: Sequence[tuple[int, int]]) -> list[range]:
    rows = np.array([row for row, _ in starts])
    edges = np.searchsorted(rows, np.arange(rows[-1] + 2)).tolist()
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def _row(
    passage: Passage,
    staves: Sequence[Staff],
    heat: np.ndarray,
    tokens: range,
    starts: Sequence[tuple[int, int]],
    widths: Sequence[int],
) -> str:
    lefts = np.array([GUTTER + CELL * starts[t][1] for t in tokens])
    spans = np.array([CELL * widths[t] for t in tokens])
    parts, top = [], 6.0
    for staff in staves:
        parts.append(_staff(staff, tokens, lefts, spans, top))
        top += staff.height + STAFF_GAP
    parts.append(_text(passage.texts, heat, tokens, lefts, spans, top - 3))
    width, height = GUTTER + CELL * COLUMNS + 4, top + TEXT_HEIGHT
    columns = ",".join(str(starts[t][1]) for t in tokens)
    return (
        f'<svg class="row" viewBox="0 0 {width:g} {height:g}" data-first="{tokens.start}" data-columns="{columns}" '
        f'role="img" aria-label="tokens {tokens.start + 1} to {tokens.stop}">{"".join(parts)}'
        f'<rect class="column" y="2" height="{height - 4:g}" width="{CELL:g}" x="-99"/></svg>'
    )


def _staff(staff: Staff, tokens: range, lefts: np.ndarray, spans: np.ndarray, top: float) -> str:
    axis, bottom = staff.axis, top + staff.height
    right = GUTTER + CELL * COLUMNS
    inside = slice(tokens.start, tokens.stop)

    def y(values: np.ndarray) -> np.ndarray:
        return bottom - np.clip(axis.fraction(values), 0, 1) * staff.height

    draw = _bars if staff.bars else _voice
    curves = "".join(draw(voice, lefts, spans, y(voice.drawn[inside]), bottom) for voice in reversed(staff.voices))
    digits = 5 if axis.low > 0.99 else 3  # retention lives between 0.999 and 1
    low, high = (f"{value:.{digits}g}" for value in (axis.low, axis.high))
    middle = (top + bottom) / 2
    return (
        f'<rect class="staff" x="{GUTTER:g}" y="{top:g}" width="{right - GUTTER:g}" height="{staff.height:g}"/>{curves}'
        f'<text class="staff-title" x="0" y="{middle + (-2 if staff.unit else 4):g}">{escape(staff.title)}</text>'
        f'<text class="staff-unit" x="0" y="{middle + 13:g}">{_subscript(staff.unit)}</text>'
        f'<text class="staff-end" x="{GUTTER - 4:g}" y="{top + 8:g}">{high}</text>'
        f'<text class="staff-end" x="{GUTTER - 4:g}" y="{bottom:g}">{low}</text>'
    )


def _subscript(unit: str) -> str:
    return escape(unit).replace("∇y ", '∇<tspan dy="2.5" font-size="8">y</tspan><tspan dy="-2.5">\u2009</tspan>')


def _voice(voice: Voice, lefts: np.ndarray, spans: np.ndarray, y: np.ndarray, bottom: float) -> str:
    return f'<path class="voice {voice.css}" d="{path(lefts + spans / 2, y)}"/>'


def _bars(voice: Voice, lefts: np.ndarray, spans: np.ndarray, y: np.ndarray, bottom: float) -> str:
    bars = [
        f"M{a + 1:g} {bottom:g}V{b:.1f}h{w - 2:g}V{bottom:g}z"
        for a, w, b in zip(lefts.tolist(), spans.tolist(), y.tolist(), strict=True)
        if np.isfinite(b)
    ]
    return f'<path class="loss-bars" d="{"".join(bars)}"/>'


def _text(
    texts: Sequence[str], heat: np.ndarray, tokens: range, lefts: np.ndarray, spans: np.ndarray, top: float
) -> str:
    cells = [
        f'<rect class="h{heat[t]}" x="{a:g}" y="{top:g}" width="{w:g}" height="{TEXT_HEIGHT - 4:g}"/>'
        for t, a, w in zip(tokens, lefts.tolist(), spans.tolist(), strict=True)
        if heat[t]
    ]
    middle = top + TEXT_HEIGHT - 10
    glyphs = [
        f'<tspan x="{a:g}"{_dim(texts[t])}>{escape(texts[t])}</tspan>'
        for t, a in zip(tokens, lefts.tolist(), strict=True)
    ]
    return f'{"".join(cells)}<text class="glyphs" y="{middle:g}">{"".join(glyphs)}</text>'


def _dim(text: str) -> str:
    return ' class="space"' if SPACE.issuperset(text) else ""


def _keys(staves: Sequence[Staff]) -> str:
    voices = {v.css: v.name for staff in staves for v in staff.voices if not staff.bars}
    keys = "".join(f'<li><i class="key {css}"></i>{escape(name)}</li>' for css, name in voices.items())
    return f'<ul class="legend">{keys}</ul><p class="note">{escape(" ".join(_remarks(staves)))}</p>'


def _remarks(staves: Sequence[Staff]) -> list[str]:
    said = []
    for staff in staves:
        if staff.title.startswith("rate"):
            means = ", ".join(f"{voice.name} {voice.values.mean():.3g}" for voice in staff.voices)
            said.append(f"Mean rates: {means}.")
        hidden = [voice.name for voice in staff.voices if np.isnan(voice.drawn).all()]
        if hidden:
            said.append(f"In “{staff.title}” the lines of {', '.join(hidden)} lie under another.")
    return said


# ---------------------------------------------------------------- the fingerprint: every signal at a glance


def fingerprint(passage: Passage) -> str:
    """A heat map: one row per memory or level, one column per token, each row scaled by its own range."""
    parts = []
    for group in passage.groups:
        prints = "".join(_print(s) for s in passage.memories(group) + passage.levels(group))
        parts.append(f'<h4>{escape(group)}</h4><div class="prints">{prints}</div>')
    return "".join(parts)


def _print(signal: Signal) -> str:
    low, high = np.nanmin(signal.surprise), np.nanmax(signal.surprise)
    name = escape(signal.name)
    return (
        f'<span>{name}</span><img alt="surprise of {name} over the passage" src="{png(heat_levels(signal.surprise))}">'
        f'<span class="range">{low:.3g} – {high:.3g}</span>'
    )


def png(levels: np.ndarray) -> str:
    """A data URI: an image of one row, in one colour, whose opacity is `levels` / (HEAT_STEPS - 1)."""
    opacity = (levels * 255 // (HEAT_STEPS - 1)).astype(np.uint8)
    row = np.stack([np.full_like(opacity, part) for part in HEAT_COLOUR] + [opacity], axis=1)
    header = struct.pack(">IIBBBBB", len(levels), 1, 8, 6, 0, 0, 0)  # 8 bits per channel, RGBA
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"\0" + row.tobytes(), 9)) + _chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
