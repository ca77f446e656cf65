"""What a stream has added to a linear weight: its own matrix for each row of a batch.

    y = x Wᵀ + x Dᵀ           D = Lᵀ R  while that is smaller, else dense

    x (B, T, in)    D (B, out, in)    L (B, r, out)    R (B, r, in)    r  rank: tokens written, at most

The gradient of C tokens is GᵀX, G (B, C, out) their output gradients and X (B, C, in) their inputs: a Delta of rank C,
exactly. Sums of Deltas stay factors until these would hold as many numbers as the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestlearn.memory.state import State


@dataclass(frozen=True)
class Delta(State):
    """Either ``dense`` (B, out, in), or ``left`` (B, r, out) and ``right`` (B, r, in)."""

    dense: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    @classmethod
    def zero(cls, rows: int, out: int, into: int, dtype: torch.dtype, device: torch.device | None = None) -> Delta:
        """Rank 0: it costs nothing."""
        shape = {"dtype": dtype, "device": device}
        return cls(left=torch.zeros(rows, 0, out, **shape), right=torch.zeros(rows, 0, into, **shape))

    @classmethod
    def outer(cls, left: Tensor, right: Tensor) -> Delta:
        """Σ over the rank of l rᵀ; dense where that holds fewer numbers."""
        (rank, out), into = left.shape[-2:], right.shape[-1]
        if rank * (out + into) < out * into:
            return cls(left=left, right=right)
        return cls(dense=left.mT @ right)

    @property
    def is_zero(self) -> bool:
        """Known to be zero without looking at a number: nothing was ever written."""
        return self.left is not None and self.left.shape[-2] == 0

    def matrix(self) -> Tensor:
        """D (B, out, in)."""
        if self.dense is not None:
            return self.dense
        left, right = self._factors()
        return left.mT @ right

    def apply(self, x: Tensor) -> Tensor:
        """x Dᵀ for x (B, T, in), in the dtype of x."""
        if self.dense is not None:
            return x @ self.dense.mT.to(x.dtype)
        left, right = self._factors()
        return (x @ right.mT.to(x.dtype)) @ left.to(x.dtype)

    def add(self, other: Delta) -> Delta:
        """The sum."""
        if self.is_zero or other.is_zero:
            return self if other.is_zero else other
        if self.dense is None and other.dense is None:
            (l1, r1), (l2, r2) = self._factors(), other._factors()
            return Delta.outer(torch.cat([l1, l2], dim=-2), torch.cat([r1, r2], dim=-2))
        return Delta(dense=self.matrix() + other.matrix())

    def scaled(self, factor: Tensor | float) -> Delta:
        """Times a number, or one per row (B,)."""
        by = factor[:, None, None] if isinstance(factor, Tensor) and factor.dim() else factor
        if self.dense is not None:
            return Delta(dense=self.dense * by)
        left, right = self._factors()
        return Delta(left=left * by, right=right)

    def where(self, keep: Tensor) -> Delta:
        """Zero in the rows where ``keep`` (B,) is false, whatever they held."""
        return self.map(lambda t: t.masked_fill(~keep[:, None, None], 0))

    def norm(self) -> Tensor:
        """‖D‖_F of each row (B,), of factors through their Gram matrices: ‖LᵀR‖² = Σ (LLᵀ ∘ RRᵀ)."""
        if self.dense is not None:
            return torch.linalg.matrix_norm(self.dense)
        left, right = self._factors()
        if left.shape[-2] > min(left.shape[-1], right.shape[-1]):
            return torch.linalg.matrix_norm(left.mT @ right)
        return ((left @ left.mT) * (right @ right.mT)).sum((-2, -1)).clamp(min=0).sqrt()

    def _factors(self) -> tuple[Tensor, Tensor]:
        assert self.left is not None and self.right is not None
        return self.left, self.right

    @classmethod
    def _join(cls, states: list[Delta]) -> Delta:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One batch: factors of different rank are filled up with zeros."""
        if any(s.dense is not None for s in states):
            return cls(dense=torch.cat([s.matrix() for s in states]))
        rank = max(s._factors()[0].shape[-2] for s in states)

        def padded(t: Tensor) -> Tensor:
            return torch.nn.functional.pad(t, (0, 0, 0, rank - t.shape[-2]))

        return cls(
            left=torch.cat([padded(s._factors()[0]) for s in states]),
            right=torch.cat([padded(s._factors()[1]) for s in states]),
        )
