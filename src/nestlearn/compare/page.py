"""OUT/compare.html: the table and the curves on one page, complete in itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from nestlearn.compare.results import columns, rows
from nestlearn.eval import svg
from nestlearn.eval.curves import count, read_curve, smooth
from nestlearn.eval.run_record import METRICS_FILE_NAME

FILE_NAME = "compare.html"
# light and dark, told apart by the colour-blind as far as ten can be (after Okabe and Ito)
COLOURS = (
    ("#d55e00", "#ff8a3d"), ("#0072b2", "#56b4e9"), ("#009e73", "#2fc79b"), ("#b0588f", "#e59ac7"),
    ("#7a6a00", "#e3d24a"), ("#1d1c1a", "#ebe7df"), ("#5b3fb8", "#a996f5"), ("#77746d", "#a8a49b"),
    ("#8c2f2f", "#f08080"), ("#2a7f8c", "#7fd6e2"),
)  # fmt: skip

Models = Sequence[Mapping[str, Any]]


def write_page(out: Path, results: Mapping[str, Any]) -> Path:
    """Writes OUT/compare.html, whole or not at all."""
    path = out / FILE_NAME
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page(results, curves(out, results)), encoding="utf-8", errors="replace")
    os.replace(partial, path)
    return path


def curves(out: Path, results: Mapping[str, Any]) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Tokens and bits per byte of every seed's training, by model."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for model in results["models"]:
        paths = (out / run["folder"] / METRICS_FILE_NAME for run in model["runs"])
        read = [curve for path in paths if (curve := read_curve(path)) is not None]
        found[model["model"]] = [(curve.tokens, curve.loss) for curve in read]
    return found


def page(results: Mapping[str, Any], training: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]) -> str:
    """The HTML; it refers to nothing outside itself."""
    models = results["models"]
    sections = [_head(results), _table(results), _training(models, training), _tuning(models), _positions(models)]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nestlearn compare</title>
<style>{_asset("report.css")}{_colours()}</style>
</head>
<body>
<main>
{chr(10).join([*sections, _again(results)])}
</main>
<div id="tip" hidden></div>
<script>{_asset("report.js")}</script>
</body>
</html>
"""


def _head(results: Mapping[str, Any]) -> str:
    plan, base = results["plan"], results["plan"]["base"]
    first, last = base["seed"], base["seed"] + plan["seeds"] - 1
    seeds = f"seeds {first} to {last}" if last > first else f"seed {first}"
    what = (
        f"{count(plan['params'])} parameters each (± 2 %), {count(base['tokens'])} tokens, {seeds}; "
        "the same text in the same order, batches of "
        f"{base['batch_size']} × {base['sequence_length']} tokens ({base['tokenizer']}), {base['optimizer']}"
    )
    title = '<p class="kicker">nestlearn compare</p><h1>Side by side</h1>'
    return f'<header>{title}<p class="subtitle">{escape(what)}</p></header>'


def _section(title: str, lede: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="lede">{escape(lede)}</p>{body}</section>'


def _table(results: Mapping[str, Any]) -> str:
    first, *others = columns(results)
    names = (f'<th class="number">{escape(name)}</th>' for name in others)
    head = f"<th>{escape(first)}</th>{''.join(names)}"
    body = "".join(f"<tr>{_cells(cells)}</tr>" for cells in rows(results))
    seeds = results["models"][0]["bits_per_byte"]["seeds"]
    lede = (
        f"Held-out text, mean ± standard deviation over the seeds ({seeds}). Speeds and memory of training were "
        "measured in turns, each model in a process of its own: the median of the rounds, memory beyond what the "
        f"libraries hold. State: what a stream keeps after {results['plan']['base']['sequence_length']:,} tokens."
    )
    if results["plan"]["online_rates"]:
        lede += (
            " As a stream: bits per byte of whole held-out documents; learning from it: while the model's levels "
            f"change every {results['plan']['online_period']} tokens at the rate given, the best of the grid."
        )
    return _section("Results", lede, f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')


def _cells(cells: Sequence[str]) -> str:
    numbers = (f'<td class="number">{escape(cell)}</td>' for cell in cells[1:])
    return f"<td>{escape(cells[0])}</td>{''.join(numbers)}"


def _training(models: Models, training: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]) -> str:
    lines = []
    for index, model in enumerate(models):
        if runs := training[model["model"]]:
            length = min(len(tokens) for tokens, _ in runs)
            loss = np.mean([values[:length] for _, values in runs], axis=0)
            lines.append(svg.Line(model["model"], runs[0][0][:length], smooth(loss, 5), _css(index)))
    lede = "Training loss at the chosen rate, mean over the seeds, smoothed over five lines of the log."
    return _section("Learning", lede, _chart(lines, "tokens", "bits per byte", cut=True))


def _tuning(models: Models) -> str:
    notes, lines = [], []
    for index, model in enumerate(models):
        tried = [(t["rate"], t["bits_per_byte"]) for t in model["tuning"] if t["bits_per_byte"] is not None]
        if tried:
            rates, bits = np.array(tried).T
            lines.append(svg.Line(model["model"], rates, bits, _css(index)))
        if model["note"]:
            notes.append(f"{model['model']}: {model['note']}.")
    lede = "Held-out bits per byte after the smaller budget, by learning rate; what broke down is left out."
    chart = _chart(lines, "learning rate", "bits per byte", log=True)
    return _section("Tuning", lede, f'{chart}<p class="note">{escape(" ".join(notes))}</p>')


def _positions(models: Models) -> str:
    lines = []
    for index, model in enumerate(models):
        read = [run["by_position"] for run in model["runs"] if run.get("by_position")]
        if read:
            loss = smooth(np.mean(read, axis=0), 17)
            lines.append(svg.Line(model["model"], np.arange(1, len(loss) + 1), loss, _css(index)))
    lede = "Loss at each position of a held-out window: what more context is worth to each model."
    return _section("Use of the context", lede, _chart(lines, "position", "bits per token", cut=True))


def _again(results: Mapping[str, Any]) -> str:
    facts = {
        "date": results["date"],
        "commit": results["commit"] or "unknown",
        "hardware": results["hardware"],
        "versions": ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
    }
    cells = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    command = f'<pre class="command">{escape(results["command"])}</pre>'
    return _section("Again", "The same, or what is left of it.", f'{command}<dl class="rows">{cells}</dl>')


def _chart(lines: Sequence[svg.Line], x: str, y: str, *, log: bool = False, cut: bool = False) -> str:
    """``cut`` leaves the steep beginning, above the upper 90 % of the values, outside the frame."""
    if not lines:
        return '<p class="absent">Nothing was measured.</p>'
    values = [line.y for line in lines]
    if cut:
        values = [v[v <= np.nanquantile(v, 0.9)] for v in values]
    text = (lambda value: f"{value:g}") if log else count
    across = svg.around([line.x for line in lines], x, log=log)
    across = svg.Axis(across.low, across.high, across.label, log, text)
    chart = svg.line_chart(lines, across, svg.around(values, y), width=900, height=380, note=f"{y} by {x}")
    return svg.legend(lines) + chart


def _css(index: int) -> str:
    return f"c-{index % len(COLOURS)}"


def _colours() -> str:
    light = " ".join(f".c-{i} {{ --colour: {colour}; }}" for i, (colour, _) in enumerate(COLOURS))
    dark = " ".join(f".c-{i} {{ --colour: {colour}; }}" for i, (_, colour) in enumerate(COLOURS))
    layout = ".chart { max-width: none; } th.number { text-align: right; }"
    return f"{light} @media (prefers-color-scheme: dark) {{ {dark} }} {layout}"


def _asset(name: str) -> str:
    return files("nestlearn.eval").joinpath(name).read_text(encoding="utf-8")
