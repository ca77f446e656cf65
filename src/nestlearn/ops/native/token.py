"""One token of a self-modifying memory in C++: the twin of `memory/one_token.py` on CPUs, without gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestlearn.ops.inner_loop import LoopInputs, LoopState
from nestlearn.ops.native.call import address, ready, run, structure

MOST_MEMORIES = 6  # as in record.h
OBJECTIVES = ("dot", "l2", "mix")
NUMBERS = (
    "batch", "heads", "memories", "written", "width", "hidden", "key", "value", "rate", "retain", "query", "retention",
    "normalise", "dgd", "after", "objective",
)  # fmt: skip
POINTERS = (
    "x", "value", "query", "w1", "w2", "m1", "m2", "origin1", "origin2", "rate_weight", "rate_bias", "retain_weight",
    "retain_bias", "mix",
)  # fmt: skip
WORK = 2**19  # numbers of a state that are worth a thread

# As in token.h.
Spec = structure(
    "TokenSpec", dict.fromkeys(NUMBERS, ctypes.c_int64) | dict.fromkeys(("momentum", "rate_max"), ctypes.c_double)
)
Given = structure(
    "TokenGiven",
    dict.fromkeys(POINTERS, ctypes.c_void_p)
    | dict.fromkeys(("scales", "anchor1", "anchor2"), ctypes.c_void_p * MOST_MEMORIES),
)
After = structure("TokenAfter", dict.fromkeys(("y", "w1", "w2", "m1", "m2"), ctypes.c_void_p))


class TokenRule(NamedTuple):
    """Constants; ``names`` and ``written`` as in `LoopSpec`."""

    names: tuple[str, ...]
    written: int
    momentum: float
    rate_max: float
    objective: str
    normalise: bool
    retention: bool
    dgd: bool
    after: bool


class TokenTrained(NamedTuple):
    """Read-outs (H, d), (H,); λ (G, H) with "mix"; rate scales (H,) of each written memory, of which the absolute value
    counts; the weights (H, d, h), (H, h, d) that each forgets towards, or none."""

    rate_weight: Tensor
    rate_bias: Tensor
    retain_weight: Tensor
    retain_bias: Tensor
    mix: Tensor | None
    scales: Sequence[Tensor]
    anchors: Sequence[tuple[Tensor, Tensor]]

    def to(self, dtype: torch.dtype) -> TokenTrained:
        """All of it in ``dtype``."""
        reads = (self.rate_weight, self.rate_bias, self.retain_weight, self.retain_bias)
        rate_weight, rate_bias, retain_weight, retain_bias = (t.to(dtype) for t in reads)
        mix = None if self.mix is None else self.mix.to(dtype)
        pairs = [(w1.to(dtype), w2.to(dtype)) for w1, w2 in self.anchors]
        scales = [t.to(dtype) for t in self.scales]
        return TokenTrained(rate_weight, rate_bias, retain_weight, retain_bias, mix, scales, pairs)


def one_token(
    inputs: LoopInputs, state: LoopState, origin: tuple[Tensor, Tensor], trained: TokenTrained, rule: TokenRule
) -> tuple[Tensor, LoopState]:
    """y (B, H, d) and the state after; inputs (B, H, d); ``origin`` are the weights that errors are taken at.

    Without gradients: the caller has turned them off.
    """
    batch, heads, _ = inputs.x.shape
    spec = _spec(rule, *inputs.x.shape, state.w1.shape[-1])
    dtype, tensors = inputs.x.dtype, (*inputs, *state, *origin, *trained[:5])
    held = [t if t is None else ready(t, dtype) for t in tensors]
    memory = [[ready(t, dtype) for t in given] for given in (trained.scales, *zip(*trained.anchors, strict=True))]
    tables = [_table(given) for given in memory] + [_table([])] * (3 - len(memory))
    after = LoopState(*(torch.empty_like(t) for t in held[3:7] if t is not None))
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    given = Given(*map(address, held), *tables)
    results = After(*(t.data_ptr() for t in (y, *after)))
    threads = max(1, min(torch.get_num_threads(), state.w1.numel() // WORK))
    run("token", dtype, batch * heads, spec, given, results, threads=threads)
    return y, after


@lru_cache(64)
def _spec(rule: TokenRule, batch: int, heads: int, width: int, hidden: int) -> Any:
    place = {name: number for number, name in enumerate(rule.names)}
    return Spec(
        batch, heads, len(rule.names), rule.written, width, hidden,
        place["k"], place["v"], place["eta"], place["alpha"], place.get("q", -1),
        rule.retention, rule.normalise, rule.dgd, rule.after, OBJECTIVES.index(rule.objective),
        rule.momentum, rule.rate_max,
    )  # fmt: skip


def _table(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * MOST_MEMORIES)(*(t.data_ptr() for t in tensors))
