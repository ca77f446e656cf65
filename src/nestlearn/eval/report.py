"""RUN/report.html: one page, complete in itself, that shows what a run learned.

    run.json, metrics.jsonl, rate-zero/metrics.jsonl, the newest checkpoint  ->  `gather`  ->  `page`  ->  report.html

A part of the run that is missing costs its section alone, which then says why it is absent.
"""

import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from nestlearn.eval import sections
from nestlearn.eval.gather import Report, gather

FILE_NAME = "report.html"


def write_report(run: Path) -> Path:
    """Writes RUN/report.html, whole or not at all, and returns its path. UserError where RUN is no run."""
    path = Path(run) / FILE_NAME
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page(gather(Path(run))), encoding="utf-8", errors="replace")
    os.replace(partial, path)
    return path


def page(report: Report) -> str:
    """The HTML of a report; it refers to nothing outside itself."""
    return html_page(f"{report.record.name} · nestlearn report", [section(report) for section in sections.ALL])


def html_page(title: str, parts: Sequence[str]) -> str:
    """One page, complete in itself, of these sections of HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_asset("report.css")}</style>
</head>
<body>
<main>
{chr(10).join(parts)}
</main>
<div id="tip" hidden></div>
<script>{_asset("report.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return files("nestlearn.eval").joinpath(name).read_text(encoding="utf-8")
