"""Token ids to batches: a pure function of (seed, state), so that a resumed run sees the very next batch.

The ids are cut into windows of T + 1 that overlap by one token (the last target of one is the first input of the next),
so within the windows every token but the first is a target once. An epoch is one permutation of the windows.

    B  sequences in a batch        T  tokens in a sequence        N  tokens of text        W = (N − 1) // T windows

`Streams` cuts the text into B long stretches instead and reads each in order, for models that carry their state on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from nestlearn.errors import UserError


@dataclass(frozen=True)
class BatchState:
    """Where a run stands: ``index`` windows of ``epoch`` are used, 0 <= index < W. ``dataclasses.asdict`` is JSON.

    Of `Streams`: ``index`` windows of every stretch.
    """

    epoch: int
    index: int


class Batch(NamedTuple):
    """``targets`` are ``inputs`` one token later; both (B, T) int64.

    positions  (B, T) int64, each token's place in its document, where documents are to be read apart
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor | None = None


class Batches:
    """Batches of equal shape; the one that ends an epoch takes its remaining rows from the next epoch.

    separator  the id that begins each document, for batches with ``positions``
    """

    def __init__(
        self, tokens: np.ndarray, batch_size: int, sequence_length: int, seed: int, separator: int | None = None
    ) -> None:
        _check_sizes(batch_size, sequence_length)
        if seed < 0:
            raise UserError(f"seed is {seed}, must be 0 or more")
        self.windows = (len(tokens) - 1) // sequence_length
        if self.windows < 1:
            raise UserError(
                f"the text has {len(tokens):,} tokens, less than one sequence of {sequence_length:,} and its target: "
                f"give more text or a sequence length of at most {max(1, len(tokens) - 1):,}"
            )
        self.tokens, self.batch_size, self.sequence_length, self.seed = tokens, batch_size, sequence_length, seed
        self.separator = separator

    def initial(self) -> BatchState:
        return BatchState(epoch=0, index=0)

    def begins(self, state: BatchState) -> bool:
        """Whether the batch at ``state`` has nothing to do with the one before it: always."""
        return True

    def next(self, state: BatchState) -> tuple[Batch, BatchState]:
        """The batch at ``state``, and the state after it. Raises UserError for a state that other text has left."""
        _check_place(state, self.windows)
        rows = []
        for _ in range(self.batch_size):
            rows.append(self._window(state))
            state = self._after(state)
        batch = _batch(rows)
        if self.separator is not None:
            batch = batch._replace(positions=positions(batch.inputs, self.separator))
        return batch, state

    def _window(self, state: BatchState) -> np.ndarray:
        start = int(_permutation(self.seed, state.epoch, self.windows)[state.index]) * self.sequence_length
        return self.tokens[start : start + self.sequence_length + 1]

    def _after(self, state: BatchState) -> BatchState:
        return _after(state, self.windows)


class Streams:
    """Row b of every batch goes on where row b of the batch before it ended.

    The text is cut into B stretches of W' = (N − 1) // (B T) windows, row b reads the b-th. After W' batches every row
    begins its stretch anew: that is an epoch. What is left at the end of the text, less than B T tokens, is not read.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, sequence_length: int) -> None:
        _check_sizes(batch_size, sequence_length)
        self.windows = (len(tokens) - 1) // (batch_size * sequence_length)
        if self.windows < 1:
            raise UserError(
                f"the text has {len(tokens):,} tokens, less than {batch_size} streams of one sequence of "
                f"{sequence_length:,} and a target: give more text, a smaller batch_size or a shorter sequence_length"
            )
        self.tokens, self.batch_size, self.sequence_length = tokens, batch_size, sequence_length

    def initial(self) -> BatchState:
        return BatchState(epoch=0, index=0)

    def begins(self, state: BatchState) -> bool:
        """Whether the rows of the batch at ``state`` begin their stretches."""
        return state.index == 0

    def next(self, state: BatchState) -> tuple[Batch, BatchState]:
        """The batch at ``state``, and the state after it. Raises UserError for a state that other text has left."""
        _check_place(state, self.windows)
        length = self.sequence_length
        starts = [(row * self.windows + state.index) * length for row in range(self.batch_size)]
        return _batch([self.tokens[start : start + length + 1] for start in starts]), _after(state, self.windows)


def positions(inputs: torch.Tensor, separator: int) -> torch.Tensor:
    """The place of each token of inputs (B, T) in its document, whose first token is ``separator`` or a row's first."""
    steps = torch.arange(inputs.shape[1])
    return steps - torch.where(inputs == separator, steps, 0).cummax(1).values


def _check_sizes(batch_size: int, sequence_length: int) -> None:
    if batch_size < 1 or sequence_length < 1:
        raise UserError(f"batch_size {batch_size}, sequence_length {sequence_length}: both must be at least 1")


def _check_place(state: BatchState, windows: int) -> None:
    if not (state.epoch >= 0 and 0 <= state.index < windows):
        raise UserError(f"{state} is not a place in {windows:,} windows: resume with the text it was saved with")


def _batch(rows: list[np.ndarray]) -> Batch:
    block = torch.from_numpy(np.stack(rows).astype(np.int64))
    return Batch(block[:, :-1].contiguous(), block[:, 1:].contiguous())


def _after(state: BatchState, windows: int) -> BatchState:
    last = state.index + 1 == windows
    return BatchState(state.epoch + 1, 0) if last else BatchState(state.epoch, state.index + 1)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, windows: int) -> np.ndarray:
    """(W,) the order of the windows in an epoch; cached because a batch asks once per row."""
    return np.random.default_rng([seed, epoch]).permutation(windows)
