"""The matrix that solves DGD's triangular systems, for the rates and without dividing by them.

For strictly lower N (batch, C, C) and D = diag(gain):

    Q = (I + N D)⁻¹ N           (I + N D)⁻¹ = I − Q D           (I + D N)⁻¹ = I − D Q

so that one matrix serves a solve, x = r − Q (D r), and the transposed solve of its backward pass, w = e − Qᵀ (D e), at
any gain, 0 included. Diagonal blocks of 16 by elimination, all blocks of the batch side by side; then pairs by

    Q₂₁ = (I − Q₂₂ D₂) N₂₁ (I − D₁ Q₁₁),

matrix products alone. A library's triangular solver walks the batch one small system after another.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 16


def resolvent(strict: Tensor, gain: Tensor) -> Tensor:
    """Q for N (batch, C, C), whose entries on and above the diagonal are 0, and gain (batch, C, 1); any C >= 1.

    N is overwritten where no copy of it is needed: each of its blocks is read once, before Q's takes its place.
    """
    strict = strict.contiguous()  # a gram of one head may be spread over the maps without a copy
    size = strict.shape[-1]
    padded = _BLOCK * 2 ** max(0, (-(-size // _BLOCK) - 1).bit_length())
    if padded > size:
        strict = torch.nn.functional.pad(strict, (0, padded - size, 0, padded - size))
        gain = torch.nn.functional.pad(gain, (0, 0, 0, padded - size))
    _eliminate(strict, gain)
    width = _BLOCK
    while width < padded:
        for begin in range(0, padded, 2 * width):
            _join(strict, gain, begin, width)
        width *= 2
    return strict[..., :size, :size]


def _join(mixed: Tensor, gain: Tensor, begin: int, width: int) -> None:
    """Q₂₁ in N₂₁'s place, for the pair of blocks of ``width`` at ``begin``, whose Q₁₁ and Q₂₂ stand there already."""
    first, second = slice(begin, begin + width), slice(begin + width, begin + 2 * width)
    below = mixed[:, second, first]
    right = torch.baddbmm(below, below, gain[:, first] * mixed[:, first, first], alpha=-1)
    below.copy_(torch.baddbmm(right, mixed[:, second, second], gain[:, second] * right, alpha=-1))


def _eliminate(strict: Tensor, gain: Tensor) -> None:
    """Q in the place of N's diagonal blocks: row_i ← row_i − N_ij gain_j row_j for j < i."""
    batch, size, _ = strict.shape
    count = size // _BLOCK
    step = (size * size, _BLOCK * (size + 1), size, 1)
    blocks = strict.as_strided((batch, count, _BLOCK, _BLOCK), step)
    rows = blocks.permute(2, 3, 0, 1).contiguous().flatten(2)  # (16, 16, blocks)
    factor = gain.reshape(batch * count, _BLOCK).t().contiguous()
    for j in range(1, _BLOCK - 1):
        multiplier = rows[j + 1 :, j] * factor[j]
        rows[j + 1 :, :j].addcmul_(multiplier[:, None], rows[j, :j], value=-1)
    blocks.copy_(rows.permute(2, 0, 1).unflatten(0, (batch, count)))
