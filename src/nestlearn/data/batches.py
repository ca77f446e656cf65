"""Token ids to batches: a pure function of (seed, state), so that a resumed run sees the very next batch.

The ids are cut into windows of T + 1 that overlap by one token (the last target of one is the first input of the next),
so within the windows every token but the first is a target once. An epoch is one permutation of the windows.

    B  sequences in a batch        T  tokens in a sequence        N  tokens of text        W = (N − 1) // T windows
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
    """Where a run stands: ``index`` windows of ``epoch`` are used, 0 <= index < W. ``dataclasses.asdict`` is JSON."""

    epoch: int
    index: int


class Batch(NamedTuple):
    """``targets`` are ``inputs`` one token later; both (B, T) int64."""

    inputs: torch.Tensor
    targets: torch.Tensor


class Batches:
    """Batches of equal shape; the one that ends an epoch takes its remaining rows from the next epoch."""

    def __init__(self, tokens: np.ndarray, batch_size: int, sequence_length: int, seed: int) -> None:
        if batch_size < 1 or sequence_length < 1:
            raise UserError(f"batch_size {batch_size}, sequence_length {sequence_length}: both must be at least 1")
        if seed < 0:
            raise UserError(f"seed is {seed}, must be 0 or more")
        self.windows = (len(tokens) - 1) // sequence_length
        if self.windows < 1:
            raise UserError(
                f"the text has {len(tokens):,} tokens, less than one sequence of {sequence_length:,} and its target: "
                f"give more text or a sequence length of at most {max(1, len(tokens) - 1):,}"
            )
        self.tokens, self.batch_size, self.sequence_length, self.seed = tokens, batch_size, sequence_length, seed

    def initial(self) -> BatchState:
        return BatchState(epoch=0, index=0)

    def next(self, state: BatchState) -> tuple[Batch, BatchState]:
        """The batch at ``state``, and the state after it. Raises UserError for a state that other text has left."""
        if not (state.epoch >= 0 and 0 <= state.index < self.windows):
            raise UserError(
                f"{state} is not a place in {self.windows:,} windows: resume with the text it was saved with"
            )
        rows = []
        for _ in range(self.batch_size):
            rows.append(self._window(state))
            state = self._after(state)
        block = torch.from_numpy(np.stack(rows).astype(np.int64))
        return Batch(block[:, :-1].contiguous(), block[:, 1:].contiguous()), state

    def _window(self, state: BatchState) -> np.ndarray:
        start = int(_permutation(self.seed, state.epoch, self.windows)[state.index]) * self.sequence_length
        return self.tokens[start : start + self.sequence_length + 1]

    def _after(self, state: BatchState) -> BatchState:
        last = state.index + 1 == self.windows
        return BatchState(state.epoch + 1, 0) if last else BatchState(state.epoch, state.index + 1)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, windows: int) -> np.ndarray:
    """(W,) the order of the windows in an epoch; cached because a batch asks once per row."""
    return np.random.default_rng([seed, epoch]).permutation(windows)
