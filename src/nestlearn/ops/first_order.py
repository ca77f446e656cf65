"""A guard for hand-written backward passes: they have first derivatives only, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates ``backward(ctx, *grads)`` of an autograd function; raises RuntimeError under ``create_graph=True``."""

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True asks for a second derivative, but this fast path has only the first: build the "
                "memory with recompute=False (SelfModifyingConfig) or fused=False (WriteRule)"
            )
        return backward(ctx, *grads)

    return guarded
