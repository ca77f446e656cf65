"""Documents that lie one after another in one row, each read as if it were alone.

Where one begins, `position_ids` is 0: what transformers' DataCollatorWithFlattening returns, without further arguments,
so that a Trainer needs nothing else. Documents are taken out, run as rows of a batch from new states, and their tokens
put back: nothing of one can reach another, whatever the mixer is. Documents of lengths within a factor of two run
together, padded behind, where nothing that is wanted reads it: less than twice the tokens in at most log2(T) runs. To
learn the states after the documents, only those of equal length run together, without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestlearn.errors import UserError

Run = Callable[[Tensor, Any], tuple[tuple[Tensor, ...], Any]]


class Document(NamedTuple):
    """Tokens [begin, begin + length) of a batch laid out row after row, and the row."""

    row: int
    begin: int
    length: int


def documents(position_ids: Tensor, x: Tensor) -> list[Document]:
    """The documents of x (B, T, width), in order. Waits for the device. UserError unless they count 0, 1, 2, … each."""
    if position_ids.shape[-1] != x.shape[1] or position_ids.numel() != x.shape[0] * x.shape[1]:
        raise UserError(
            f"position_ids has the shape {tuple(position_ids.shape)}, must be (batch, tokens) = {tuple(x.shape[:2])}"
        )
    ids = position_ids.reshape(x.shape[:2]).cpu()
    wrong = (ids[:, 1:] != 0) & (ids[:, 1:] != ids[:, :-1] + 1)
    if bool(wrong.any()) or bool((ids[:, 0] != 0).any()):
        raise UserError(
            "position_ids must begin with 0 and count on by 1, or begin again with 0 where a document begins; a stream "
            "is read in order, other positions have no meaning here: leave position_ids out"
        )
    begins = torch.nonzero(ids.flatten() == 0).flatten()
    lengths = begins.diff(append=torch.tensor([ids.numel()]))
    return [Document(b // x.shape[1], b, n) for b, n in zip(begins.tolist(), lengths.tolist(), strict=True)]


def run_packed(run: Run, x: Tensor, found: Sequence[Document], *, exact: bool) -> tuple[tuple[Tensor, ...], Any]:
    """``run(x, None)`` over each document alone.

    run    (b, t, width), None -> tensors (b, t, width), state after these tokens
    x      (B, T, width), made of the documents ``found``
    exact  the state after each row's last document is wanted; else the state that is returned is None

    Returns the tensors (B, T, width) and the state.
    """
    groups: dict[int, list[int]] = {}
    for number, document in enumerate(found):
        groups.setdefault(document.length if exact else document.length.bit_length(), []).append(number)
    flat, places, results, states = x.flatten(0, 1), [], [], []
    for numbers in groups.values():
        index, real = _block([found[n] for n in numbers], x.device)
        parts, state = run(flat[index], None)
        places.append(index[real])
        results.append([part[real] for part in parts])
        states.append(state)
    order = torch.argsort(torch.cat(places))
    outputs = tuple(torch.cat(pieces)[order].view_as(x) for pieces in zip(*results, strict=True))
    if not exact:
        return outputs, None
    last = {document.row: number for number, document in enumerate(found)}
    where = {number: place for place, number in enumerate(n for numbers in groups.values() for n in numbers)}
    chosen = torch.tensor([where[last[row]] for row in range(len(x))], device=x.device)
    return outputs, type(states[0]).cat(states)[chosen]


def _block(group: Sequence[Document], device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of the tokens of each document (D, longest), the last one repeated behind it; which of them are real."""
    begins, lengths = (
        torch.tensor(column, device=device)[:, None] for column in zip(*(d[1:] for d in group), strict=True)
    )
    steps = torch.arange(max(d.length for d in group), device=device)
    return begins + torch.minimum(steps, lengths - 1), steps < lengths
