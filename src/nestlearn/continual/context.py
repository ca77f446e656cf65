"""What a stream's model remembers besides its levels: the cache that Hugging Face passes around, as an immutable state.

A cache is built anew from the state for every forward, and read back after it, so that no forward changes a state that
somebody else holds. It is a matter of references: no key or value is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from nestlearn.errors import UserError
from nestlearn.memory.state import State
from nestlearn.models.hf import CachedStream, HopeCache


@dataclass(frozen=True)
class KeysValues(State):
    """Attention's keys and values (B, H, T, d) of every layer, and how many tokens each layer has seen."""

    keys: tuple[Tensor | None, ...]
    values: tuple[Tensor | None, ...]
    lengths: tuple[int, ...]


Context = CachedStream | KeysValues


def read_cache(cache: Any) -> Context:
    """The state in a cache. UserError for a kind that cannot be held without copying."""
    if isinstance(cache, HopeCache):
        return CachedStream(cache.state, cache.seen)
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, DynamicCache) or not all(
        type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers or ()
    ):
        kinds = sorted({type(x).__name__ for x in layers or ()})
        raise UserError(
            f"the model keeps its stream in a {type(cache).__name__} {kinds}: OnlineLearner knows HopeCache and a "
            "DynamicCache of attention layers"
        )  # fmt: skip
    known = cast(list[DynamicLayer], cache.layers)
    lengths = tuple(int(x.get_seq_length()) for x in known)
    return KeysValues(tuple(x.keys for x in known), tuple(x.values for x in known), lengths)


def write_cache(context: Context | None, model: nn.Module, kind: Any = None) -> Any:
    """A cache that continues from the context; None: at the start. ``kind``: the class of a DynamicCache."""
    if isinstance(context, CachedStream):
        return HopeCache(context.state, context.columns)
    if context is None:
        return None
    cache = (kind or DynamicCache)(config=cast(Any, model.config))
    layers = cast(list[Any], cache.layers)
    for layer, keys, values, length in zip(layers, context.keys, context.values, context.lengths, strict=True):
        if keys is None or values is None:
            continue
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = length
    return cache


def tokens_in(context: Context | None) -> int:
    """Tokens that went into it."""
    if context is None:
        return 0
    return context.columns if isinstance(context, CachedStream) else max(context.lengths, default=0)


def repair(new: Context, old: Context | None, finite: Tensor) -> Context:
    """The new context, but in the rows where ``finite`` (B,) is false without what is not finite.

    A recurrent state of such a row goes back to the old one; keys and values that are not finite become zero.
    """
    if isinstance(new, CachedStream) and old is not None:
        before = list(old.tensors())
        if [t.shape for t in before] == [t.shape for t in new.tensors()]:
            left = iter(before)
            return new.map(lambda t: torch.where(_rows(finite, t), t, next(left)))
    return new.map(lambda t: torch.where(_rows(finite, t), t, torch.nan_to_num(t, 0.0, 0.0, 0.0)))


def finite_rows(context: Context) -> Tensor:
    """Which rows (B,) hold nothing that is not finite."""
    return torch.stack([torch.isfinite(t).reshape(len(t), -1).all(dim=1) for t in context.tensors()]).all(dim=0)


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.dim() - 1))
