"""The inverse of a unit lower triangular matrix, (I + N)⁻¹, for batches of chunk-sized matrices.

Diagonal blocks of 8 by substitution, all blocks of the batch side by side, then pairs of blocks by

    [A 0; B D]⁻¹ = [A⁻¹ 0; −D⁻¹ B A⁻¹  D⁻¹],

matrix products alone. A library's triangular solver walks the batch one small system after another; with the inverse at
hand a solve and the transposed solve of its backward pass are one batched product each. N's entries are bounded by 1
where it comes from DGD, so is what substitution makes of them: no accuracy is lost for any keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 8


def invert_unit_lower(strict: Tensor) -> Tensor:
    """(I + N)⁻¹ for strictly lower N (batch, C, C), any C >= 1; entries on and above the diagonal must be 0."""
    size = strict.shape[-1]
    padded = _BLOCK * 2 ** max(0, (-(-size // _BLOCK) - 1).bit_length())
    if padded > size:
        strict = torch.nn.functional.pad(strict, (0, padded - size, 0, padded - size))
    inverse = torch.zeros_like(strict)
    _diagonal(inverse, _BLOCK).copy_(_substitute(_diagonal(strict, _BLOCK)))
    width = _BLOCK
    while width < padded:
        pair = _diagonal(inverse, 2 * width)
        first, second = (pair[..., :width, :width], pair[..., width:, width:])
        below = _diagonal(strict, 2 * width)[..., width:, :width]
        pair[..., width:, :width] = (second @ (below @ first)).neg_()
        width *= 2
    return inverse[..., :size, :size]


def _diagonal(matrix: Tensor, width: int) -> Tensor:
    """The diagonal blocks of (batch, C, C) as a view (batch, C / width, width, width)."""
    batch, size, _ = matrix.shape
    step = matrix.stride()
    return matrix.as_strided(
        (batch, size // width, width, width), (step[0], width * (step[1] + step[2]), step[1], step[2])
    )


def _substitute(blocks: Tensor) -> Tensor:
    """Row by row, over all blocks at once: row_i = e_i − Σ_{j<i} N_ij row_j."""
    strict = blocks.flatten(0, 1).permute(1, 2, 0).contiguous()  # (8, 8, blocks)
    rows = torch.zeros_like(strict)
    for i in range(len(strict)):
        if i:
            rows[i, :i] = (strict[i, :i, None] * rows[:i, :i]).sum(0).neg_()
        rows[i, i] = 1
    return rows.permute(2, 0, 1).unflatten(0, blocks.shape[:2])
