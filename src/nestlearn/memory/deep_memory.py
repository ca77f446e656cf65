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
from nestlearn.memory.stream import FastState, Step, run_stream
from nestlearn.ops.dgd_chunk import chunk_decays
from nestlearn.ops.pointwise import l2norm
from nestlearn.ops.scan import Tensors

_LEAST = 1e-13  # a retention below this keeps nothing either, and its logarithm stays finite


@dataclass(frozen=True)
class Sizes:
    """Widths d, h, heads H and chunk in tokens, each at least 1."""

    head_width: int
    hidden_width: int
    heads: int = 1
    chunk: int = 64

    def __post_init__(self) -> None:
        for name in ("head_width", "hidden_width", "heads", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least 1")


@dataclass(frozen=True)
class DeepConfig(Sizes):
    """Sizes, and how to write: ``rule.target_norm`` "l2" normalises the given values first; ``rule.fused`` False allows
    higher derivatives."""

    rule: WriteRule = field(default_factory=lambda: WriteRule(target_norm="none"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule.objective == "mix":
            raise UserError('objective is "mix", which the self-modifying memory learns; choose "dot" or "l2" here')


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
        check_tokens(self.config, state, (key, value, query), rate=rate, retain=retain)
        return read_stream(
            self._step,
            self._initial(torch.promote_types(key.dtype, torch.float32)),
            (key, value, query),
            (rate, retain),
            state,
            chunk=self.config.chunk,
            recompute=self.config.rule.fused,
        )

    def _initial(self, dtype: torch.dtype) -> Weights:
        return Weights(self.initial.w1[None].to(dtype), self.initial.w2[None].to(dtype))

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


def read_stream(
    step: Step,
    initial: Weights,
    vectors: Tensors,
    scalars: Tensors,
    state: FastState | None,
    *,
    chunk: int,
    recompute: bool,
    constants: Tensors = (),
) -> tuple[Tensor, FastState]:
    """Fold ``step`` over the tokens of one memory per head: `run_stream` in the layout of layers.

    initial  weights (1, H, ·, ·) before the stream, in the dtype of the inner loop; first of the step's constants
    vectors  (B, T, H, d);  scalars (B, T, H);  the step sees them as (B, 1, H, C, ·)

    Returns (reads (B, T, H, d) in the vectors' dtype, state).
    """
    tokens = [t.transpose(1, 2)[:, None] for t in vectors] + [t.transpose(1, 2)[:, None, ..., None] for t in scalars]
    reads, end = run_stream(
        step,
        FastState.fresh(initial, len(vectors[0]), ("memory",)) if state is None else state,
        tuple(t.to(initial.w1.dtype) for t in tokens),
        (*initial, *constants),
        torch.tensor([chunk], device=vectors[0].device),
        chunk=chunk,
        fresh=state is None,
        recompute=recompute,
    )
    return reads.transpose(1, 2).to(vectors[0].dtype), end


def check_tokens(config: Sizes, state: FastState | None, vectors: Tensors, **scalars: Tensor) -> None:
    """UserError unless key, value and query are (B, T, H, d), the scalars (B, T, H), and the state is of B streams."""
    key = vectors[0]
    for name, t in zip(("key", "value", "query"), vectors, strict=True):
        if t.shape != key.shape or t.dim() != 4 or t.shape[2:] != (config.heads, config.head_width):
            raise UserError(
                f"{name} has the shape {tuple(t.shape)}, must be (B, T, {config.heads}, {config.head_width}), the same "
                "for key, value and query"
            )
    for name, t in scalars.items():
        if t.shape != key.shape[:3]:
            raise UserError(f"{name} has the shape {tuple(t.shape)}, must be (B, T, heads) = {tuple(key.shape[:3])}")
    if state is not None and len(state.w1) != len(key):
        raise UserError(f"state holds {len(state.w1)} streams but key has {len(key)} rows: pass their own state")
