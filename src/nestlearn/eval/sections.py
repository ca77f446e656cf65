"""The sections of a report, top to bottom: each a pure function from a Report to HTML."""

import json
import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from nestlearn.eval import curves, score, svg
from nestlearn.eval.curves import Curve, count, duration
from nestlearn.eval.gather import Report
from nestlearn.eval.passage import SHOWN_AS, Passage
from nestlearn.eval.run_record import Evaluation, LevelRecord

EARLY = 256  # beyond this position of a sequence, a gain is memory and not the local context
BEFORE = 192  # the loss late in a sequence is compared with that of positions BEFORE to EARLY
SHOWN_LAYERS = 6  # of the panels that show one layer each
NO_TWIN = "No rate-0 twin was trained beside this run, so the worth of its memories is not shown."


def section(title: str, body: str, lede: str = "") -> str:
    about = f'<p class="lede">{lede}</p>' if lede else ""
    return f"<section><h2>{escape(title)}</h2>{about}{body}</section>"


def absent(reason: str) -> str:
    return f'<p class="absent">{escape(reason)}</p>'


def _figure(caption: str, chart: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>"


def _readable(text: str) -> str:
    """Without the control characters that HTML forbids; line ends and tabs stay."""
    return "".join(c if c in "\n\t" or c.isprintable() else SHOWN_AS.get(c, "▯") for c in text)


# ---------------------------------------------------------------- the headline


def headline(report: Report) -> str:
    record, held_out = report.record, report.record.results.held_out
    if held_out is None:
        figure = absent("The run ended before its evaluation: run.json holds no held-out result.")
    else:
        figure = (
            f'<div class="hero"><p class="big"><b>{held_out.bits_per_byte:.3f}</b> '
            f"<span>bits per byte<br>on held-out text</span></p>{_bars(report)}</div>"
        )
    facts = [
        ("tokens read", count(record.tokens)),
        ("training time", duration(record.seconds)),
        ("tokens per second", count(record.tokens / record.seconds) if record.seconds > 0 else "–"),
        ("parameters", count(record.parameters)),
        ("sequence", f"{record.sequence_length:,} tokens"),
        ("tokenizer", record.tokenizer),
    ]
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return (
        f'<header><p class="kicker">nestlearn · training report · {escape(record.date[:10])}</p>'
        f"<h1>{escape(record.name)}</h1><p class='subtitle'>{escape(record.corpus.description)}</p></header>"
        f'{figure}<dl class="facts">{cells}</dl>'
    )


def _bars(report: Report) -> str:
    """Bits per byte of the same bytes, side by side; a shorter bar is a better model of the text."""
    results = report.record.results
    rows = [("HOPE", "s-hope", results.held_out and results.held_out.bits_per_byte)]
    rows.append(("HOPE, rate 0", "s-zero", results.rate_zero and results.rate_zero.bits_per_byte))
    rows += [("xz −9", "s-other", results.xz), ("bz2 −9", "s-other", results.bz2)]
    known = [(name, css, value) for name, css, value in rows if value is not None]
    longest = max(value for _, _, value in known)
    bars = "".join(
        f'<span>{name}</span><span class="track"><i class="{css}" style="width:{100 * value / longest:.1f}%"></i>'
        f"</span><b>{value:.3f}</b>"
        for name, css, value in known
    )
    note = "" if results.rate_zero else f"<p class='note'>{NO_TWIN}</p>"
    return f'<div><div class="bars">{bars}</div><p class="note">{_verdict(report)}</p>{note}</div>'


def _verdict(report: Report) -> str:
    """The bars in words. The compressors read these bytes alone; the model has trained on other text: say so."""
    results = report.record.results
    assert results.held_out is not None
    said, ours = [], results.held_out.bits_per_byte
    if results.rate_zero:
        gain = curves.relative(ours, results.rate_zero.bits_per_byte)
        said.append(f"{gain} than the same model with every memory’s rate at 0, trained on the same budget.")
    if results.xz is not None or results.bz2 is not None:
        said.append(
            f"All on the same {results.held_out.bytes:,} held-out bytes. The compressors start from nothing; "
            "the model has read the training text."
        )
    return " ".join(said)


# ---------------------------------------------------------------- learning


def learning(report: Report) -> str:
    if report.curve is None:
        return section("Learning", absent("metrics.jsonl is missing or empty: nothing was logged."))
    lines = [("HOPE", "s-hope", report.curve), ("rate 0", "s-zero", report.rate_zero)]
    known = [(name, css, curve) for name, css, curve in lines if curve is not None]
    smoothed = [curves.smooth(curve.loss, len(curve.loss) // 40) for _, _, curve in known]
    y = _loss_axis(smoothed, "training loss, bits per byte")
    results = report.record.results
    marks = [svg.Mark(f"{n} (held-out)", y=v) for n, v in (("xz −9", results.xz), ("bz2 −9", results.bz2)) if v]

    def chart(title: str, x: Callable[[Curve], np.ndarray], axis: svg.Axis) -> str:
        drawn = [svg.Line(n, x(c), s, css, raw=c.loss) for (n, css, c), s in zip(known, smoothed, strict=True)]
        return _figure(f"against {title}", svg.line_chart(drawn, axis, y, marks=marks, note=f"training loss: {title}"))

    unit, name = (60.0, "minutes") if report.curve.seconds[-1] > 180 else (1.0, "seconds")
    tokens = svg.Axis(0, max(c.tokens[-1] for _, _, c in known), "tokens read", text=count)
    time = svg.Axis(0, max(c.seconds[-1] for _, _, c in known) / unit or 1.0, f"time, {name}")
    keys = svg.legend([svg.Line(n, c.tokens, c.loss, css) for n, css, c in known])
    charts = chart("tokens", lambda c: c.tokens, tokens) + chart("time", lambda c: c.seconds / unit, time)
    body = f'{keys}<div class="pair">{charts}</div>'
    lede = "Loss of each logged step (faint) and its moving average."
    if max(c.loss[0] for _, _, c in known) > y.high:
        lede += " The first steps lie above the frame."
    return section("Learning", body + ("" if report.rate_zero else absent(NO_TWIN)), lede)


def _loss_axis(smoothed: Sequence[np.ndarray], label: str, skip: float = 0.04) -> svg.Axis:
    """Room for all but the first few per cent of a falling curve, whose height would flatten the rest."""
    tails = [values[min(int(len(values) * skip), len(values) - 1) :] for values in smoothed]
    return svg.around(tails, label, pad=0.08)


def positions(report: Report) -> str:
    title = "Loss by position in the sequence"
    results = report.record.results
    if results.held_out is None or len(results.held_out.by_position) < 2:
        return section(title, absent("The run has no held-out loss by position: it ended before its evaluation."))
    known = [("HOPE", "s-hope", results.held_out)] + (
        [("rate 0", "s-zero", results.rate_zero)] if results.rate_zero else []
    )
    lines = [_position_line(*row) for row in known]
    length = max(len(line.x) for line in lines)
    x = svg.Axis(0, length, "position in the sequence, tokens", text=count)
    y = _loss_axis([line.y for line in lines], "held-out loss, bits per token", 0.02)
    mark = [svg.Mark(f"{EARLY} tokens", x=EARLY)]
    charts = _figure("held-out loss", svg.line_chart(lines, x, y, marks=mark, note="held-out loss against position"))
    if len(lines) == 2 and len(lines[0].x) == len(lines[1].x):
        charts += _worth(lines[0], lines[1], x)
    body = f'{svg.legend(lines)}<div class="pair">{charts}</div>' + ("" if results.rate_zero else absent(NO_TWIN))
    return section(title, body, _fall(results.held_out, results.rate_zero))


def _position_line(name: str, css: str, evaluation: Evaluation) -> svg.Line:
    bits = np.array(evaluation.by_position)
    return svg.Line(name, np.arange(1.0, len(bits) + 1), curves.smooth(bits, len(bits) // 24), css)


def _worth(hope: svg.Line, zero: svg.Line, x: svg.Axis) -> str:
    """What the memories are worth at each position: rate 0 minus HOPE."""
    gain = svg.Line("rate 0 − HOPE", hope.x, zero.y - hope.y, "s-hope")
    skip = int(len(gain.y) * 0.02)
    y = svg.around([gain.y[skip:], np.zeros(1)], "rate 0 − HOPE, bits per token", pad=0.1)
    marks = [svg.Mark("no gain", y=0.0), svg.Mark(f"{EARLY} tokens", x=EARLY)]
    note = "loss of the rate-0 twin minus loss of HOPE, against position"
    return _figure("what the memories save", svg.line_chart([gain], x, y, marks=marks, note=note))


def _fall(held_out: Evaluation, twin: Evaluation | None) -> str:
    """In words: how far the loss falls from just before position EARLY to the last quarter of the sequence."""
    sequences = round(held_out.tokens / len(held_out.by_position))
    said = [f"Mean of {sequences:,} sequences, each from an empty memory, with a moving average over positions."]
    known = (("HOPE", held_out), ("its rate-0 twin", twin))
    falls = [f"{_late_fall(e.by_position)} for {name}" for name, e in known if e and len(e.by_position) >= 2 * EARLY]
    if falls:
        said.append(
            f"In the last quarter the loss is, against positions {BEFORE + 1} to {EARLY}, {' and '.join(falls)}."
        )
    if len(held_out.by_position) < 2 * EARLY:
        said.append(f"The sequences are too short to show what happens beyond {EARLY} tokens.")
    return " ".join(said)


def _late_fall(by_position: Sequence[float]) -> str:
    return curves.relative(
        float(np.mean(by_position[-len(by_position) // 4 :])), float(np.mean(by_position[BEFORE:EARLY]))
    )


# ---------------------------------------------------------------- levels


def levels(report: Report) -> str:
    rows = sorted(report.record.levels, key=lambda row: row.period)
    title = "Levels"
    if not rows:
        return section(title, absent("run.json lists no levels."))
    finite = [row.period for row in rows if row.period != math.inf]
    axis = svg.Axis(1, max([*finite, 10]) * 1.3, log=True)
    body = "".join(_level(row, axis) for row in rows)
    head = "<th>component</th><th class='number'>period, tokens</th><th class='wide'>fast → slow</th><th>objective</th>"
    head += "<th>context</th><th>rule</th><th class='number'>parameters</th>"
    lede = "Everything that changes, from the fastest to the slowest: how often, by which rule, to which end, on what."
    return section(
        title, f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>', lede
    )


def _level(row: LevelRecord, axis: svg.Axis) -> str:
    at = 100.0 if row.period == math.inf else 92 * float(axis.fraction(max(row.period, 1.0)))
    frozen = " frozen" if row.period == math.inf else ""
    return (
        f'<tr><td>{escape(row.component)}</td><td class="number">{curves.period(row.period)}</td>'
        f'<td class="wide"><span class="clock{frozen}"><i style="left:{at:.1f}%"></i></span></td>'
        f"<td>{escape(row.objective)}</td><td>{escape(row.context)}</td><td>{escape(row.rule)}</td>"
        f'<td class="number">{row.parameters:,}</td></tr>'
    )


# ---------------------------------------------------------------- the passage


def reading(report: Report) -> str:
    title = "Reading a held-out passage"
    if isinstance(report.passage, str):
        return section(title, absent(f"Not shown: {report.passage}"))
    shown = _spread(report.passage.groups, SHOWN_LAYERS) or [""]
    panels = "".join(_panel(report.passage, group, first=group == shown[-1]) for group in shown)
    return section(title, _tabs(shown) + panels, _reading_lede(report.passage, shown))


def _reading_lede(passage: Passage, shown: Sequence[str]) -> str:
    source = f" of <code>{escape(passage.source)}</code>" if passage.source else ""
    said = [
        f"{len(passage.texts):,} tokens{source}, which the model never trained on, read from an empty memory. Each "
        "character stands under its column; the stronger its colour, the larger the surprise. (· space, ↵ new line, "
        "⇥ tab, ¶ end of a document, ‥ part of a character.)",
    ]
    if not any(signal.is_memory for signal in passage.signals):
        said.append("This model’s mixer has no self-modifying memories, so rate and retention are absent.")
    if len(shown) < len(passage.groups):
        said.append(f"{len(shown)} of {len(passage.groups)} layers are shown.")
    return " ".join(said)


def _tabs(groups: Sequence[str]) -> str:
    if len(groups) < 2:
        return ""
    last = escape(groups[-1])
    buttons = "".join(
        f'<button type="button" data-group="{name}" aria-pressed="{str(name == last).lower()}">{name}</button>'
        for name in map(escape, groups)
    )
    return f'<div class="tabs">{buttons}</div>'


def _panel(passage: Passage, group: str, *, first: bool) -> str:
    hidden = "" if first else " hidden"
    return f'<div class="panel" data-group="{escape(group)}"{hidden}>{score.score(passage, group)}</div>'


def _spread(groups: list[str], wanted: int) -> list[str]:
    """At most `wanted` of the layers, evenly from the first to the last."""
    at = np.linspace(0, len(groups) - 1, min(wanted, len(groups))).round().astype(int)
    return [groups[i] for i in at]


def fingerprint(report: Report) -> str:
    title = "Surprise at a glance"
    if isinstance(report.passage, str) or not report.passage.signals:
        return section(title, absent("Not shown: no signals were traced."))
    lede = (
        "The same passage from left to right, one strip per memory and level, each coloured by its own range (right)."
    )
    return section(title, score.fingerprint(report.passage), lede)


def norms(report: Report) -> str:
    title = "State norms over time"
    if isinstance(report.passage, str):
        return section(title, absent(f"Not shown: {report.passage}"))
    kept = [s for s in report.passage.signals if s.norm is not None]
    groups = _spread(list(dict.fromkeys(s.group for s in kept)), SHOWN_LAYERS)
    if not groups:
        return section(
            title, absent("Not shown: this model’s mixer keeps no fast weights whose norm could be followed.")
        )
    charts = "".join(_norm_chart(report.passage, group) for group in groups)
    keys = [svg.Line(s.name, s.surprise, s.surprise, s.css) for s in report.passage.memories(groups[0])]
    lede = "The size of each memory’s fast weights while it reads the passage. A line that levels off stays bounded."
    return section(title, f'{svg.legend(keys)}<div class="pair">{charts}</div>', lede)


def _norm_chart(passage: Passage, group: str) -> str:
    signals = [(s, s.norm) for s in passage.memories(group) if s.norm is not None]
    lines = [svg.Line(s.name, np.arange(1.0, len(norm) + 1), norm, s.css) for s, norm in signals]
    values = [norm for _, norm in signals]
    log = svg.spans_decades(values, 8)
    y = svg.around(values, "norm" + (" (log)" if log else ""), log=log)
    x = svg.Axis(0, len(passage.texts), "token of the passage")
    return _figure(group, svg.line_chart(lines, x, y, height=260, note=f"state norms of {group}"))


# ---------------------------------------------------------------- sample, reproduction


def sample(report: Report) -> str:
    if report.record.sample is None:
        return section("A sample", absent("The run ended before it generated a sample."))
    prompt, text = map(_readable, (report.record.sample.prompt, report.record.sample.text))
    body = f'<pre class="sample"><span>{escape(prompt)}</span>{escape(text)}</pre>'
    return section("A sample", body, "The prompt (pale) is held-out text; the rest is the model’s.")


def reproduce(report: Report) -> str:
    record = report.record
    corpus = record.corpus
    facts = [
        ("seed", str(record.seed)),
        ("hardware", record.hardware),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        ("commit", record.commit or "unknown (not run from a git checkout)"),
        ("date", record.date),
        ("training text", f"{corpus.train_bytes:,} bytes, sha256 {corpus.train_sha256}"),
        ("held-out text", f"{corpus.held_out_bytes:,} bytes, sha256 {corpus.held_out_sha256}"),
    ]
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
    config = json.dumps(record.config, indent=2, ensure_ascii=False)
    details = (
        f"<details><summary>the whole configuration</summary><pre>{escape(config)}</pre></details>"
        if record.config
        else ""
    )
    body = f'<pre class="command">{escape(record.command)}</pre><dl class="rows">{rows}</dl>{details}'
    return section("How to repeat this run", body)


ALL = (headline, learning, positions, levels, reading, fingerprint, norms, sample, reproduce)
