"""What a sequence of tasks did to a learner, each a pure function of the accuracy matrix.

    R[i, j]   accuracy on task j after learning task i, in [0, 1]; (T, T) float, NaN where it was not measured

    average accuracy      (1/T) Σ_j R[T, j]                   backward transfer   1/(T−1) Σ_{j<T} R[T, j] − R[j, j]
    forgetting            1/(T−1) Σ_{j<T} max_{j≤i<T} R[i, j] − R[T, j]
    forward transfer      1/(T−1) Σ_{j>1} R[j−1, j] − b[j]          b the accuracy before any task
    learning curve        A_i = (1/i) Σ_{j≤i} R[i, j]               area under it        (1/T) Σ_i A_i

(Lopez-Paz and Ranzato, 2017, arXiv 1706.08840; Chaudhry et al., 2018, arXiv 1801.10112.) One task has nothing to
forget or transfer to: those are then NaN, as is whatever needs a number that was not measured.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestlearn.errors import UserError

Array = NDArray[np.float64]


def average_accuracy(accuracies: ArrayLike) -> float:
    """Mean accuracy over all tasks after the last."""
    return float(_matrix(accuracies)[-1].mean())


def backward_transfer(accuracies: ArrayLike) -> float:
    """How much later tasks changed the earlier ones, on average; negative is forgetting."""
    r = _matrix(accuracies)
    return _mean(r[-1, :-1] - np.diagonal(r)[:-1])


def forgetting(accuracies: ArrayLike) -> float:
    """How far each earlier task is below its best so far, on average."""
    r = _matrix(accuracies)
    best = np.array([r[j:-1, j].max() for j in range(len(r) - 1)])
    return _mean(best - r[-1, :-1])


def forward_transfer(accuracies: ArrayLike, before: ArrayLike) -> float:
    """How much earlier tasks helped a task before it was learned; ``before`` (T,): accuracies before any task."""
    r, b = _matrix(accuracies), np.asarray(before, dtype=np.float64)
    if b.shape != (len(r),):
        raise UserError(f"before has the shape {b.shape}: must be one accuracy for each of the {len(r)} tasks")
    return _mean(np.diagonal(r, 1) - b[1:])


def learning_curve(accuracies: ArrayLike) -> Array:
    """Mean accuracy over the tasks seen so far, after each task, (T,)."""
    r = _matrix(accuracies)
    return np.array([r[i, : i + 1].mean() for i in range(len(r))])


def area_under_curve(accuracies: ArrayLike) -> float:
    """Mean of the learning curve."""
    return float(learning_curve(accuracies).mean())


def summary(accuracies: ArrayLike) -> dict[str, float]:
    """All of them that need no other number than the matrix."""
    measures = (average_accuracy, backward_transfer, forgetting, area_under_curve)
    return {measure.__name__: measure(accuracies) for measure in measures}


def _matrix(accuracies: ArrayLike) -> Array:
    r = np.asarray(accuracies, dtype=np.float64)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or not len(r):
        raise UserError(f"the accuracy matrix has the shape {r.shape}: must be (tasks, tasks)")
    known = r[np.isfinite(r)]
    if known.size and (known.min() < 0 or known.max() > 1):
        raise UserError(f"the accuracy matrix spans {known.min():g} to {known.max():g}: must lie within 0 and 1")
    return r


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")
