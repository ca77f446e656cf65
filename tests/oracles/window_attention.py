"""The truth for windowed attention: one query at a time over an explicit list of what it may see, float64."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """query (d,), keys and values of (d,) each."""
    weights = torch.softmax(torch.stack([k @ query for k in keys]) * len(query) ** -0.5, dim=0)
    return weights @ torch.stack(values)


def run(query: Tensor, brought: list[tuple[Tensor, Tensor]], persistent: tuple[Tensor, Tensor], window: int) -> Tensor:
    """query (T, d), rotated; brought: (keys, values) of each source, (T, d), keys rotated; persistent: (P, d) each."""
    outputs = []
    for t in range(len(query)):
        seen = [(k[s], v[s]) for k, v in brought for s in range(max(0, t - window + 1), t + 1)]
        seen += list(zip(*persistent, strict=True))
        outputs.append(attend(query[t], [k for k, _ in seen], [v for _, v in seen]))
    return torch.stack(outputs)
