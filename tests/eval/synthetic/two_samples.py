"""Are two samples from one distribution? A chi-square test of homogeneity on counts by category."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy.stats import chi2_contingency

LEAST = 1e-4  # a p-value below this says: not the same


def same_distribution(first: Iterable, second: Iterable, rare: int = 10) -> float:
    """p-value; categories with fewer than ``rare`` counts in all are one."""
    counts = [Counter(first), Counter(second)]
    total = counts[0] + counts[1]
    common = [c for c in total if total[c] >= rare]
    table = np.array(
        [[count[c] for c in common] + [sum(count[c] for c in total if total[c] < rare)] for count in counts]
    )
    table = table[:, table.sum(0) > 0]
    return 1.0 if table.shape[1] < 2 else float(chi2_contingency(table)[1])


def data_folder(name: str) -> Path:
    """Where the files are, present or not."""
    shared = os.environ.get("NESTLEARN_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data"
    return Path(shared) / name
