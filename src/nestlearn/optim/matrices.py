"""Parameters as matrices, and back: views, stacks, and the whole of what is sharded.

0-D, 1-D  one row (AdamW only)      2-D (out, in)  as it is      3-D (heads, out, in)  that many matrices
4-D and more, a convolution (out, in, …): one matrix (out, everything else)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def matrices(t: Tensor) -> Tensor:
    """A parameter or its gradient as (count, out, in)."""
    if t.ndim < 2:
        return t.reshape(1, 1, -1)
    return t if t.ndim == 3 else t.flatten(1)[None]


def whole(t: Tensor) -> Tensor:
    """All of a tensor that ``fully_shard`` has spread over ranks (a collective); any other tensor as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def local(t: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory."""
    return t.to_local() if isinstance(t, DTensor) else t


def like_parameter(t: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor of the parameter's shape, sharded as the parameter is. Every rank has it: nothing is sent."""
    if not isinstance(parameter, DTensor):
        return t
    return distribute_tensor(t, parameter.device_mesh, parameter.placements, src_data_rank=None)


def stack(tensors: list[Tensor]) -> Tensor:
    """Tensors of one parameter shape as (n, out, in), in float32 at least."""
    joined = matrices(tensors[0]) if len(tensors) == 1 else torch.cat([matrices(t) for t in tensors])
    return joined.to(torch.promote_types(joined.dtype, torch.float32))


def pack(values: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """State of several parameters as one stack, (n, …); no copy where ``unpack`` has left them side by side."""
    rows = [_rows(whole(v), p) for v, p in zip(values, parameters, strict=True)]
    first = rows[0]
    if len(rows) == 1:
        return first
    size = first.numel() * first.element_size()
    side_by_side = all(
        row.is_contiguous()
        and row.data_ptr() == first.data_ptr() + i * size
        and row.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for i, row in enumerate(rows)
    )
    if side_by_side and size:
        return first.as_strided((len(rows) * len(first), *first.shape[1:]), first.stride())
    return torch.cat(rows)


def unpack(stacked: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The inverse of ``pack``: views, one for each parameter, of its own shape (and sharding) where they are matrices
    of its size, else (heads, …) for a stack of matrices and without the leading 1 for one matrix."""
    parts = stacked.contiguous().chunk(len(parameters))
    return [_own(part, p) for part, p in zip(parts, parameters, strict=True)]


def _rows(value: Tensor, parameter: Tensor) -> Tensor:
    if value.shape == parameter.shape:
        return matrices(value)
    return value if parameter.ndim == 3 else value[None]


def _own(part: Tensor, parameter: Tensor) -> Tensor:
    if part.shape == matrices(parameter).shape:
        return like_parameter(part.reshape(parameter.shape), parameter)
    return part if parameter.ndim == 3 else part[0]
