"""How a model's forward pass sees a stream's deltas: hooks on its linear modules that look at what is active now.

    y = module(x)  →  y + Σ_levels x Dᵀ          in this forward, and in this thread, only

The hooks hold nothing. What is active is either set around a forward (`active`), or travels in the cache: a model that
is given an `AdaptedCache` reads with the deltas in it, through any code that calls it, ``generate()`` included.
A module that no active delta names returns what it always returned, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nestlearn.continual.context import Context, write_cache
from nestlearn.continual.delta import Delta
from nestlearn.errors import UserError
from nestlearn.models.hf import CachedStream, HopeCache

Deltas = Mapping[str, tuple[Delta, ...]]  # by the path of a module: those of every level that writes there


@dataclass
class Active:
    """What the hooks of one forward see, and, if ``tape`` is not None, what they leave: inputs and outputs by path."""

    deltas: Deltas
    tape: dict[str, list[tuple[Tensor, Tensor]]] | None = None
    outer: Active | None = field(default=None, repr=False)


_NOW: ContextVar[Active | None] = ContextVar("nestlearn_active_deltas", default=None)


def attach(model: nn.Module, paths: Iterable[str]) -> None:
    """Puts the hooks where they are missing. They stay: without active deltas they do nothing."""
    for path in paths:
        module = model.get_submodule(path)
        if not _hooked(module._forward_hooks, _after_linear):
            module.register_forward_hook(partial(_after_linear, path))
    if not _hooked(model._forward_hooks, _after_model):
        model.register_forward_pre_hook(partial(_before_model), with_kwargs=True)
        model.register_forward_hook(partial(_after_model), with_kwargs=True, always_call=True)


def _hooked(hooks: Mapping[int, Any], function: Any) -> bool:
    """A copied model has copied hooks: so the module is asked, not a table of models."""
    return any(getattr(hook, "func", None) is function for hook in hooks.values())


@contextmanager
def active(deltas: Deltas, tape: dict[str, list[tuple[Tensor, Tensor]]] | None = None) -> Iterator[None]:
    """Every forward inside sees these deltas; a tape collects (input, output) of the modules that it has keys for."""
    token = _NOW.set(Active(deltas, tape))
    try:
        yield
    finally:
        _NOW.reset(token)


def _after_linear(path: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    now = _NOW.get()
    if now is None:
        return None
    x, y = args[0], output
    for delta in now.deltas.get(path, ()):
        if not delta.is_zero:
            y = y + delta.apply(_streams(path, x, delta)).reshape(y.shape).to(y.dtype)
    if now.tape is not None and path in now.tape:
        y = y if y.requires_grad else y.detach().requires_grad_()
        now.tape[path].append((x.detach(), y))
    return y


def _streams(path: str, x: Tensor, delta: Delta) -> Tensor:
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


def cast(deltas: Deltas, dtypes: Mapping[str, torch.dtype]) -> Deltas:
    """The deltas in the dtype that each module computes in, once instead of in every forward; without the zeros."""
    kept = {path: tuple(d for d in ds if not d.is_zero) for path, ds in deltas.items()}
    return {path: tuple(d.to(dtype=dtypes[path]) for d in ds) for path, ds in kept.items() if ds}


def gradients(loss: Tensor, tape: dict[str, list[tuple[Tensor, Tensor]]]) -> dict[str, Delta]:
    """The gradient of each taped weight, a Delta (B, out, in) for B streams; one backward pass, as deep as needed.

    loss (B,), of independent rows. The gradients of the model's own weights are not computed.
    """
    outputs = [y for pairs in tape.values() for _, y in pairs]
    found = iter(torch.autograd.grad(loss.sum(), outputs, allow_unused=True))
    return {path: _outer(pairs, [next(found) for _ in pairs], len(loss)) for path, pairs in tape.items()}


def _outer(pairs: list[tuple[Tensor, Tensor]], grads: list[Tensor | None], rows: int) -> Delta:
    """GᵀX of what one module read, in float32 at least."""
    wide = torch.promote_types(pairs[0][0].dtype, torch.float32)
    xs = [x.reshape(rows, -1, x.shape[-1]) for x, _ in pairs]
    gs = [torch.zeros_like(y) if g is None else g for (_, y), g in zip(pairs, grads, strict=True)]
    left = torch.cat([g.reshape(rows, -1, g.shape[-1]) for g in gs], dim=1)
    return Delta.outer(left.to(wide), torch.cat(xs, dim=1).to(wide))
