"""How a model's forward pass sees a stream's deltas: its linear modules look at what is active now.

    y = module(x)  →  x (W + Σ_levels D)ᵀ + b          in this forward, and in this thread, only

`attach` puts a function before a module's own ``forward``. It holds nothing: what is active is either set around a
forward (`active`), or travels in the cache: a model that is given an `AdaptedCache` reads with the deltas in it, by any
code that calls it, ``generate()`` included. A module that no active delta names runs its own forward, bit for bit.
The sum W + D is made once for a segment, so that a stream costs what the model costs; weights in half precision or
quantised, where a small D would be lost in the sum, run their own forward and add x Dᵀ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from nestlearn.continual.context import Context, write_cache
from nestlearn.continual.delta import Delta
from nestlearn.continual.online_level import is_conv1d, linear_matrix
from nestlearn.errors import UserError
from nestlearn.memory.state import State
from nestlearn.models.hf import CachedStream, HopeCache


@dataclass(frozen=True)
class Whole(State):
    """W + Σ D (B, out, in): the weight of each stream."""

    weight: Tensor


# By the path of a module, what each stream uses there: the deltas of every level that writes to it, or their Whole.
Deltas = Mapping[str, tuple[Delta | Whole, ...]]


@dataclass
class Active:
    """What the hooks of one forward see, and, if ``tape`` is not None, what they leave: inputs and outputs by path."""

    deltas: Deltas
    tape: dict[str, list[tuple[Tensor, Tensor]]] | None = None
    outer: Active | None = field(default=None, repr=False)


_NOW: ContextVar[Active | None] = ContextVar("nestlearn_active_deltas", default=None)


def attach(model: nn.Module, paths: Iterable[str]) -> None:
    """Makes the model ready. It stays so: without active deltas nothing changes."""
    for path in paths:
        module = model.get_submodule(path)
        if getattr(module.forward, "func", None) is not _forward:
            module.forward = partial(_forward, path, module, type(module).forward)
    if not any(getattr(hook, "func", None) is _after_model for hook in model._forward_hooks.values()):
        model.register_forward_pre_hook(partial(_before_model), with_kwargs=True)
        model.register_forward_hook(partial(_after_model), with_kwargs=True, always_call=True)


@contextmanager
def active(deltas: Deltas, tape: dict[str, list[tuple[Tensor, Tensor]]] | None = None) -> Iterator[None]:
    """Every forward inside sees these deltas; a tape collects (input, output) of the modules that it has keys for."""
    token = _NOW.set(Active(deltas, tape))
    try:
        yield
    finally:
        _NOW.reset(token)


def _forward(path: str, module: nn.Module, own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of a linear module's forward, which is ``own``."""
    now = _NOW.get()
    if now is None:
        return own(module, x, *args, **kwargs)
    used = now.deltas.get(path, ())
    if used and isinstance(used[0], Whole):
        y = _linear(_streams(path, x, used[0]), used[0].weight, cast(Any, module.bias)).reshape(*x.shape[:-1], -1)
    else:
        y = own(module, x, *args, **kwargs)
        for delta in used:
            y = y + cast(Delta, delta).apply(_streams(path, x, delta)).reshape(y.shape).to(y.dtype)
    if now.tape is not None and path in now.tape:
        y = y if y.requires_grad else y.detach().requires_grad_()
        now.tape[path].append((x.detach(), y))
    return y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, T, in), weight (B, out, in)."""
    if len(weight) == 1:
        return F.linear(x, weight[0], bias)
    y = x @ weight.mT
    return y if bias is None else y + bias


def _streams(path: str, x: Tensor, delta: Delta | Whole) -> Tensor:
    """x as (B, T, in), one row for each stream; some models flatten (B, T) to one dimension."""
    rows = next(delta.tensors()).shape[0]
    if x.shape[0] % rows or (x.dim() > 2 and x.shape[0] != rows):
        raise UserError(
            f"module {path!r} reads {x.shape[0]} rows, but {rows} streams are active: give each stream its own row"
        )
    return x.reshape(rows, -1, x.shape[-1])


class AdaptedCache:
    """A cache that carries the deltas of its streams; rows of both move together (beams, repeated rows)."""

    deltas: Deltas

    def _carry(self, change: Any) -> None:
        self.deltas = {path: tuple(d.map(change) for d in ds) for path, ds in self.deltas.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # pyright: ignore
        self._carry(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # pyright: ignore
        self._carry(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # pyright: ignore
        self._carry(lambda t: t.repeat_interleave(repeats, dim=0))


class AdaptedHopeCache(AdaptedCache, HopeCache):
    """HopeForCausalLM's cache with deltas."""

    def __init__(self, state: Any, seen: int, deltas: Deltas) -> None:
        super().__init__(state, seen)
        self.deltas = deltas

    def fork(self) -> AdaptedHopeCache:
        return AdaptedHopeCache(self.state, self.seen, self.deltas)

    def save(self, path: Any) -> None:
        """Refused: half of it would be lost."""
        raise UserError(f"{path}: this cache carries a stream's deltas: save learner.state, which holds both")


class AdaptedDynamicCache(AdaptedCache, DynamicCache):
    """Attention's cache with deltas."""


def adapted_cache(context: Context | None, model: nn.Module, deltas: Deltas) -> Any:
    """What the ordinary ``generate()`` takes as ``past_key_values``. UserError where nothing was read yet."""
    if isinstance(context, CachedStream):
        return AdaptedHopeCache(context.state, context.columns, deltas)
    if context is None:
        raise UserError("the stream has no context yet: read at least two tokens, or give adapted() a prompt")
    cache = write_cache(context, model, AdaptedDynamicCache)
    cache.deltas = deltas
    return cache


def _before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, AdaptedCache):
        _NOW.set(Active(cache.deltas, outer=_NOW.get()))


def _after_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, AdaptedCache):
        return
    now = _NOW.get()
    _NOW.set(None if now is None else now.outer)
    after = getattr(output, "past_key_values", None)
    if isinstance(after, HopeCache) and not isinstance(after, AdaptedCache):
        output.past_key_values = AdaptedHopeCache(after.state, after.seen, cache.deltas)


@torch.no_grad()
def usable(module: nn.Module, deltas: tuple[Delta, ...], dtype: torch.dtype) -> tuple[Delta | Whole, ...]:
    """The deltas of one module in the form in which a forward is cheapest; nothing where all are zero.

    dtype  in which the module computes
    """
    kept = [delta for delta in deltas if not delta.is_zero]
    plain = type(module) is nn.Linear or is_conv1d(module)
    if not kept or not plain or dtype not in (torch.float32, torch.float64):
        return tuple(delta.to(dtype=dtype) for delta in kept)
    weight = linear_matrix(module)
    for delta in kept:
        weight = weight + delta.matrix()
    return (Whole(weight),)


def gradients(loss: Tensor, tape: dict[str, list[tuple[Tensor, Tensor]]]) -> dict[str, Delta]:
    """The gradient of each taped weight, a Delta (B, out, in) for B streams; one backward pass, as deep as needed.

    loss (B,), of independent rows. The gradients of the model's own weights are not computed.
    """
    for path, pairs in tape.items():
        if not pairs:
            raise UserError(
                f"module {path!r} was not called, though the model was: where its weight is read by itself, or modules "
                "are chosen among, no stream can hold a change of it; leave it out of the levels"
            )
    outputs = [y for pairs in tape.values() for _, y in pairs]
    found = iter(torch.autograd.grad(loss.sum(), outputs, allow_unused=True))
    return {path: _outer(pairs, [next(found) for _ in pairs], len(loss)) for path, pairs in tape.items()}


def _outer(pairs: list[tuple[Tensor, Tensor]], grads: list[Tensor | None], rows: int) -> Delta:
    """GᵀX of what one module read, in float32 at least."""
    wide = torch.promote_types(pairs[0][0].dtype, torch.float32)
    xs = [x.reshape(rows, -1, x.shape[-1]) for x, _ in pairs]
    gs = [torch.zeros_like(y) if g is None else g for (_, y), g in zip(pairs, grads, strict=True)]
    ls = [g.reshape(rows, -1, g.shape[-1]) for g in gs]
    left, right = (ts[0] if len(ts) == 1 else torch.cat(ts, dim=1) for ts in (ls, xs))
    return Delta.outer(left.to(wide), right.to(wide))
