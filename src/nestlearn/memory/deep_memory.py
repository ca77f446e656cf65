"""An MLP as a memory, M(z) = z + w1 σ(w2 z) (NL Eq. 89), for keys, values and rates that somebody else provides.

The layer between the matrix memory (`linear.py`) and the self-modifying one: the write is that of `deep.py` (NL Eq. 57
on both layers, gradients from the start of each chunk, NL Eq. 90), but the target is the given value. Its initial
weights are trained through the writes.

Letters: B batch, T tokens, H heads, d head width, h hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nestlearn.errors import UserError
from nestlearn.memory.deep import Fast, InitialWeights, Weights, WriteRule, deep_chunk
from nestlearn.memory.stream import FastState, run_stream
from nestlearn.ops.dgd_chunk import chunk_decays
from nestlearn.ops.pointwise import l2norm
from nestlearn.ops.scan import Tensors

_LEAST = 1e-13  # a retention below this keeps nothing either, and its logarithm stays finite


@dataclass(frozen=True)
class DeepConfig:
    """Widths d, h, heads H and chunk in tokens, each at least 1, and how to write.

    ``rule.target_norm`` "l2" normalises the given values first; ``rule.fused`` False allows higher derivatives.
    """

    head_width: int
    hidden_width: int
    heads: int = 1
    chunk: int = 64
    rule: WriteRule = field(default_factory=lambda: WriteRule(target_norm="none"))

    def __post_init__(self) -> None:
        for name in ("head_width", "hidden_width", "heads", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least 1")


class DeepMemory(nn.Module):
    """See the module docstring. ``reads, state = memory(key, value, rate, retain, query, state)``."""

    def __init__(self, config: DeepConfig) -> None:
        super().__init__()
        self.config = config
        self.initial = InitialWeights(config.heads, config.head_width, config.hidden_width)

    def init_state(self, batch: int) -> FastState:
        """The state before the first token of ``batch`` streams."""
        return FastState.fresh(self._initial(self.initial.w1.dtype), batch, ("memory",))

    def forward(
        self, key: Tensor, value: Tensor, rate: Tensor, retain: Tensor, query: Tensor, state: FastState | None = None
    ) -> tuple[Tensor, FastState]:
        """Write every pair, read every query before its own token's write.

        key, value, query  (B, T, H, d), key normalised by the caller;  rate, retain (B, T, H), η >= 0 and α in (0, 1]
        state              of these B streams; None starts new ones

        Returns (reads (B, T, H, d), state). The inner loop runs in float32 at least.
        """
        self._check(key, value, query, rate, retain)
        if state is not None and len(state.w1) != len(key):
            raise UserError(f"state holds {len(state.w1)} streams but key has {len(key)} rows: pass their own state")
        dtype = torch.promote_types(key.dtype, torch.float32)
        initial = self._initial(dtype)
        vectors = (t.transpose(1, 2)[:, None] for t in (key, value, query))
        scalars = (t.transpose(1, 2)[:, None, ..., None] for t in (rate, retain))
        reads, end = run_stream(
            self._step,
            FastState.fresh(initial, len(key), ("memory",)) if state is None else state,
            tuple(t.to(dtype) for t in (*vectors, *scalars)),
            initial,
            torch.tensor([self.config.chunk], device=key.device),
            chunk=self.config.chunk,
            fresh=state is None,
            recompute=self.config.rule.fused,
        )
        return reads.transpose(1, 2).to(query.dtype), end

    def _initial(self, dtype: torch.dtype) -> Weights:
        return Weights(self.initial.w1[None].to(dtype), self.initial.w2[None].to(dtype))

    def _check(self, key: Tensor, value: Tensor, query: Tensor, rate: Tensor, retain: Tensor) -> None:
        c, scalar = self.config, key.shape[:3]
        for name, t in (("key", key), ("value", value), ("query", query)):
            if t.shape != key.shape or t.dim() != 4 or t.shape[2:] != (c.heads, c.head_width):
                raise UserError(
                    f"{name} has the shape {tuple(t.shape)}, must be (B, T, {c.heads}, {c.head_width}), the same for "
                    "key, value and query"
                )
        for name, t in (("rate", rate), ("retain", retain)):
            if t.shape != scalar:
                raise UserError(f"{name} has the shape {tuple(t.shape)}, must be (B, T, heads) = {tuple(scalar)}")

    def _step(
        self, live: Fast, start: Weights | None, inputs: Tensors, constants: Tensors, offset: int | None
    ) -> tuple[Tensor, Fast, Weights]:
        """One piece of one chunk."""
        key, value, query, rate, retain = inputs
        rule = self.config.rule
        target = l2norm(value) if rule.target_norm == "l2" else value
        decays = chunk_decays(retain.squeeze(-1).clamp_min(_LEAST).log(), rule.momentum)
        reads, end = deep_chunk(
            start, live, key, target, rate.squeeze(-1), decays, rule, initial=Weights(*constants), query=query
        )
        assert reads is not None
        return reads, end, live.weights if start is None else start
