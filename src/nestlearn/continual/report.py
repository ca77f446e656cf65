"""OUT/report.html: one page that shows what each method kept, from the accuracy matrices of all seeds."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nestlearn.continual.benchmark import Plan, read_results
from nestlearn.continual.metrics import learning_curve, summary
from nestlearn.errors import UserError
from nestlearn.eval import svg
from nestlearn.eval.report import html_page
from nestlearn.eval.sections import section

COLOURS = ("m-memory", "m-k", "m-v", "m-eta", "m-alpha", "m-other", "l-4", "l-2", "l-0", "s-zero", "m-loss")
FILE_NAME = "report.html"
SHADES = 11  # the classes h1 … h11 of report.css


class Measured:
    """All seeds of one method: accuracies (seeds, tasks, tasks), and its numbers as (mean, standard deviation)."""

    def __init__(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        self.name, self.rate, self.seeds = name, records[0]["rate"], len(records)
        self.accuracies = np.array([r["accuracies"] for r in records], dtype=np.float64)
        each = [summary(r) | {"tokens": record["tokens"], "seconds": record["seconds"]}
                for r, record in zip(self.accuracies, records, strict=True)]  # fmt: skip
        self.numbers = {key: spread([numbers[key] for numbers in each]) for key in each[0]}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; NaN for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def measured(out: Path) -> list[Measured]:
    """The methods of a folder in the order they were first run, those with a finished test run."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for record in read_results(out):
        if record["part"] == "test":
            by_method.setdefault(record["method"], []).append(record)
    if not by_method:
        raise UserError(f"{out} holds no finished run: run nestlearn continual first")
    return [Measured(name, records) for name, records in by_method.items()]


def table_text(found: Sequence[Measured]) -> str:
    """For the terminal: one line for each method."""
    rows: list[tuple[str, ...]] = [
        ("method", "rate", "seeds", "average accuracy", "forgetting", "backward", "area", "tokens", "seconds")
    ]
    for m in found:
        shown = (_percent(*m.numbers[k]) for k in ("average_accuracy", "forgetting", "backward_transfer",
                                                   "area_under_curve"))  # fmt: skip
        rows.append((m.name, f"{m.rate:g}", str(m.seeds), *shown, f"{m.numbers['tokens'][0]:,.0f}",
                     f"{m.numbers['seconds'][0]:.0f}"))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def write_report(plan: Plan, out: Path) -> Path:
    """Writes OUT/report.html, whole or not at all, and returns its path."""
    found = measured(out)
    parts = [_head(plan, found), _curves(found), _table(found), _matrices(found), _how(plan)]
    path = out / FILE_NAME
    partial = path.with_name(path.name + ".partial")
    partial.write_text(html_page(f"{Path(plan.data).name} · continual learning", parts), encoding="utf-8")
    os.replace(partial, path)
    return path


def _head(plan: Plan, found: Sequence[Measured]) -> str:
    best = max(m.numbers["average_accuracy"][0] for m in found)
    bars = "".join(
        f'<span>{escape(m.name)}</span><span class="track"><i class="{"s-hope" if "levels" in m.name else "s-other"}" '
        f'style="width:{100 * m.numbers["average_accuracy"][0] / best:.1f}%"></i></span>'
        f"<b>{_percent(*m.numbers['average_accuracy'])}</b>"
        for m in found
    )
    tasks = found[0].accuracies.shape[1]
    return (
        '<header><p class="kicker">nestlearn · continual learning</p>'
        f"<h1>{escape(Path(plan.data).name)}</h1><p class='subtitle'>{tasks} tasks, each with classes of its own. "
        "Average accuracy over all of them after the last, without being told the task.</p></header>"
        f'<div class="bars">{bars}</div>'
    )


def _curves(found: Sequence[Measured]) -> str:
    lines = []
    for place, m in enumerate(found):
        curve = np.mean([learning_curve(r) for r in m.accuracies], axis=0)
        at = np.arange(1, len(curve) + 1, dtype=np.float64)
        if np.isnan(curve).all():  # all tasks at once: one point
            at, curve = at[-1:], m.accuracies[:, -1].mean(axis=1).mean(keepdims=True)
        lines.append(svg.Line(m.name, at, 100 * curve, COLOURS[place % len(COLOURS)]))
    tasks = found[0].accuracies.shape[1]
    x = svg.Axis(0.5, tasks + 0.5, "tasks learned")
    chart = svg.line_chart(lines, x, svg.Axis(0, 102, "accuracy on all classes so far, %"), note="learning curves")
    body = f"{svg.legend(lines)}<figure>{chart}</figure>"
    return section("While it learns", body, "Mean over the seeds. Joint training sees all tasks at once: a point.")


def _table(found: Sequence[Measured]) -> str:
    columns = {"average_accuracy": "average accuracy", "forgetting": "forgetting", "backward_transfer": "backward "
               "transfer", "area_under_curve": "area under the curve"}  # fmt: skip
    head = "".join(f'<th class="number">{name}</th>' for name in ("rate", "seeds", *columns.values(), "tokens", "s"))
    rows = ""
    for m in found:
        cells = [f"{m.rate:g}", str(m.seeds), *(_percent(*m.numbers[key]) for key in columns),
                 f"{m.numbers['tokens'][0]:,.0f}", f"{m.numbers['seconds'][0]:.0f}"]  # fmt: skip
        rows += f"<tr><td>{escape(m.name)}</td>{''.join(f'<td class=number>{cell}</td>' for cell in cells)}</tr>"
    lede = "Per cent, mean ± standard deviation over the seeds; tokens and seconds of training, mean."
    return section("In numbers", f'<div class="scroll"><table><tr><th>method</th>{head}</tr>{rows}</table></div>', lede)


def _matrices(found: Sequence[Measured]) -> str:
    panels = "".join(f"<figure><figcaption>{escape(m.name)}</figcaption>{_matrix(m)}</figure>" for m in found)
    lede = "Accuracy on each task (column) after each task (row), from the first at the top; darker is better."
    return section("What is left of each task", f'<div class="pair">{panels}</div>', lede)


def _matrix(m: Measured, size: int = 26) -> str:
    mean = m.accuracies.mean(axis=0)
    known = [(i, j) for i, j in np.ndindex(*mean.shape) if math.isfinite(mean[i, j])]
    cells = "".join(
        f'<rect class="h{max(1, math.ceil(mean[i, j] * SHADES))}" x="{j * size}" y="{i * size}" width="{size - 2}" '
        f'height="{size - 2}"><title>task {j + 1} after {i + 1}: {100 * mean[i, j]:.0f} %</title></rect>'
        for i, j in known
    )
    side = len(mean) * size
    return f'<svg class="chart" viewBox="0 0 {side} {side}" role="img" style="max-width:{side}px">{cells}</svg>'


def _how(plan: Plan) -> str:
    s = plan.settings
    text = (
        f"Encoder {plan.encoder}; the MLP blocks of its {s.trained} upper layers and the head are trained, by AdamW, "
        f"{s.epochs} passes over at most {plan.train} texts of each class, {s.batch} at a time; a linear head learns "
        f"{s.head_lr:g} times as fast. Tested on at most {plan.test} texts of each class. Each method's rate is the "
        f"best of {', '.join(f'{r:g}' for r in plan.rates)} on the validation texts of another order of the tasks"
        f"{'' if plan.tune_tasks is None else f' (its first {plan.tune_tasks})'}. “+memory” and “levels-n” answer with "
        "a class memory, the fastest level; levels-n counts it, the MLP levels and the frozen rest."
    )
    return section("How it was measured", f'<p class="note">{escape(text)}</p>')


def _percent(mean: float, deviation: float) -> str:
    if not math.isfinite(mean):
        return "–"
    return f"{100 * mean:.1f}" + (f" ± {100 * deviation:.1f}" if math.isfinite(deviation) else "")
