"""Rows of unequal length in one batch: each runs without its padding, so that padding never enters a state.

A mask says which columns of a row are real: `zeros, ones, zeros`, the ones in one piece. Rows with the same place for
their ones run together; what they give is put back into its columns, zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestlearn.errors import UserError

Span = tuple[int, int]
Run = Callable[[Tensor, Any], tuple[tuple[Tensor, ...], Any]]


def real_spans(mask: Tensor) -> list[Span]:
    """Of each row of mask (B, T), the columns [begin, end) that are real; (0, 0) for none. Waits for the device."""
    real = mask != 0
    if bool(real.all()):
        return [(0, mask.shape[1])] * len(mask)
    counts, begins = real.sum(1).tolist(), real.int().argmax(1).tolist()
    ends = (mask.shape[1] - real.flip(1).int().argmax(1)).tolist()
    spans = [(begin, end) if count else (0, 0) for begin, end, count in zip(begins, ends, counts, strict=True)]
    for row, ((begin, end), count) in enumerate(zip(spans, counts, strict=True)):
        if end - begin != count:
            raise UserError(
                f"attention_mask of row {row} has {end - begin - count} zeros among its columns {begin} to {end}, "
                "but a stream has no holes; pad on the left or on the right only"
            )
    return spans


def run_unpadded(run: Run, x: Tensor, state: Any, spans: Sequence[Span]) -> tuple[tuple[Tensor, ...], Any]:
    """``run(x, state)`` over each row's span alone.

    run    (b, t, width), state of b rows or None -> tensors (b, t, width), state after these tokens
    x      (B, T, width)

    Returns the tensors (B, T, width) with zeros at padding, and the state of all rows in order. A row without real
    columns keeps its state; UserError where it has none yet.
    """
    groups: dict[Span, list[int]] = {}
    for row, span in enumerate(spans):
        groups.setdefault(span, []).append(row)
    if list(groups) == [(0, x.shape[1])]:
        return run(x, state)
    outputs: tuple[Tensor, ...] = ()
    states = []
    for (begin, end), rows in groups.items():
        index = torch.tensor(rows, device=x.device)
        after = None if state is None else state[index]
        if end > begin:
            parts, after = run(x[index, begin:end], after)
            outputs = outputs or tuple(torch.zeros_like(x) for _ in parts)
            for output, part in zip(outputs, parts, strict=True):
                output[index, begin:end] = part
        if after is None:
            raise UserError(f"attention_mask of row {rows[0]} has only zeros: a new stream needs at least one token")
        states.append(after)
    if not outputs:
        raise UserError("attention_mask has no one in the new columns: give at least one row a token to read")
    order = torch.argsort(torch.tensor([row for rows in groups.values() for row in rows], device=x.device))
    return outputs, type(states[0]).cat(states)[order]
