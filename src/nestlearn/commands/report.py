"""``nestlearn report``."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional


def report(run: Positional[Path]) -> None:
    """Write RUN/report.html again.

    Args:
        run: The folder of a run.
    """
    from nestlearn.eval.report import write_report

    print(write_report(run))
