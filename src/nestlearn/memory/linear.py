"""A matrix as a memory: M (out, in) maps keys to values and is written by any rule of `nestlearn.rules` (NL §5).

    rule "hebbian"      linear attention, RetNet          NL Eq. 64
         "delta"        DeltaNet, explicit step           NL Eq. 65
         "gated_delta"  Gated DeltaNet, explicit step     arXiv 2412.06464
         "oja"          Oja's rule, proximal step         NL Eq. 66–67
         "omega"        a window of tokens, ATLAS         NL Eq. 68
         "dgd"          gated delta rule, proximal step   NL Eq. 57, 88

The first three and the last are instances of one recurrence, M ← M (α I − decay · k kᵀ) + m with m ← μ m + step · v kᵀ,
and run chunk-parallel; the others run token by token. A stream may be cut anywhere. The rules differ in (decay, step):
(0, η), (η, η), (α η, η), and (gain, gain) for the last.

Reads come after the write by default, y_t = M_t q_t, as in the field: reading before the write with every query moved
one token later gives all of them but the last, which reads the final state.

Letters: B batch, T tokens, H heads, c window of the omega rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nestlearn import rules
from nestlearn.errors import UserError, suggest
from nestlearn.memory.state import State
from nestlearn.ops.dgd_chunk import chunk_decays, chunk_end, chunk_read, chunk_write, dgd_gain

CHUNKED = ("hebbian", "delta", "gated_delta", "dgd")
RULES = (*CHUNKED, "oja", "omega")
_LEAST = 1e-13  # a sigmoid in float32 can be 0, whose logarithm would make 0/0 of the ratios between tokens


@dataclass(frozen=True)
class LinearConfig:
    """Widths and rule of a matrix memory.

    key_width, value_width, heads   in, out, H, each at least 1
    rule               one of "hebbian", "delta", "gated_delta", "oja", "omega", "dgd"
    chunk              tokens solved at once by the chunk-parallel rules; changes the speed, not the result
    momentum           μ in [0, 1), for "dgd" only
    window             c, tokens seen by each write of "omega", at least 1; 1 for every other rule
    read_after_write   y_t includes token t's own write
    """

    key_width: int
    value_width: int
    heads: int = 1
    rule: str = "dgd"
    chunk: int = 64
    momentum: float = 0.0
    window: int = 1
    read_after_write: bool = True

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"rule is {self.rule!r}, must be one of {list(RULES)}{suggest(str(self.rule), RULES)}")
        for name in ("key_width", "value_width", "heads", "chunk", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least 1")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum is {self.momentum}, must be in [0, 1)")
        if self.momentum and self.rule != "dgd":
            raise UserError(
                f"momentum is {self.momentum} with rule {self.rule!r}: only rule 'dgd' has momentum, set it to 0"
            )
        if self.window > 1 and self.rule != "omega":
            raise UserError(
                f"window is {self.window} with rule {self.rule!r}: only rule 'omega' has a window, set it to 1"
            )


class Inputs(NamedTuple):
    """key, query (B, T, H, in); value (B, T, H, out); rate, retain (B, T, H)."""

    key: Tensor
    value: Tensor
    rate: Tensor
    retain: Tensor
    query: Tensor


@dataclass(frozen=True)
class LinearState(State):
    """Of a LinearMemory: weight and momentum (B, H, out, in); for omega the last c − 1 tokens (B, c − 1, H, ·)."""

    weight: Tensor
    momentum: Tensor
    keys: Tensor
    values: Tensor
    rates: Tensor


class LinearMemory(nn.Module):
    """See the module docstring. ``reads, state = memory(key, value, rate, retain, query, state)``; no parameters."""

    def __init__(self, config: LinearConfig) -> None:
        super().__init__()
        self.config = config

    def init_state(
        self, batch: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> LinearState:
        """An empty memory for ``batch`` streams."""
        c = self.config
        shapes = [(c.heads, c.value_width, c.key_width)] * 2
        shapes += [(c.window - 1, c.heads, *width) for width in ((c.key_width,), (c.value_width,), ())]
        return LinearState(*(torch.zeros(batch, *shape, dtype=dtype, device=device) for shape in shapes))

    def forward(
        self, key: Tensor, value: Tensor, rate: Tensor, retain: Tensor, query: Tensor, state: LinearState | None = None
    ) -> tuple[Tensor, LinearState]:
        """Write every pair, read every query.

        key, query    (B, T, H, in)
        value         (B, T, H, out)
        rate, retain  (B, T, H), η ≥ 0 and α in (0, 1]
        state         of these B streams; None starts new ones

        Returns (reads (B, T, H, out), state). Raises UserError where the shapes do not match the configuration.
        """
        self._check(key, value, rate, retain, query, state)
        if state is None:
            dtype = torch.promote_types(key.dtype, torch.float32)
            state = self.init_state(key.shape[0], dtype=dtype, device=key.device)
        run = self._chunks if self.config.rule in CHUNKED else self._tokens
        inputs = Inputs(*(t.to(state.weight.dtype) for t in (key, value, rate, retain, query)))
        if not self.config.read_after_write:
            reads, state = run(inputs, state)
            return reads.to(query.dtype), state
        later = nn.functional.pad(inputs.query[:, :-1], (0, 0, 0, 0, 1, 0))
        reads, end = run(inputs._replace(query=later), state)
        last = (end.weight @ inputs.query[:, -1, :, :, None]).squeeze(-1)
        return torch.cat([reads[:, 1:], last[:, None]], dim=1).to(query.dtype), end

    def _chunks(self, inputs: Inputs, state: LinearState) -> tuple[Tensor, LinearState]:
        """Chunk-parallel; reads come before the write."""
        mu, rule, chunk = self.config.momentum, self.config.rule, self.config.chunk
        key, value, rate, retain, query = (t.transpose(1, 2) for t in inputs)
        gain = dgd_gain(key, rate) if rule == "dgd" else rate
        decay = gain * retain if rule == "gated_delta" else gain
        given = (key, gain[..., None] * value, decay, retain.clamp_min(_LEAST).log(), query)
        pieces = (t.split(chunk, dim=2) for t in given)
        weight, momentum, reads = state.weight, state.momentum, []
        for x, update, d, log_retain, q in zip(*pieces, strict=True):
            decays = chunk_decays(log_retain, mu)
            moved, asked = (x @ momentum.mT, q @ momentum.mT) if mu else (None, None)
            write = chunk_write(x, update, d, x @ weight.mT, moved, decays, erase=rule != "hebbian")
            reads.append(chunk_read(write, q, q @ weight.mT, asked, decays))
            weight, momentum = chunk_end(write, weight, momentum, decays)
        return torch.cat(reads, dim=2).transpose(1, 2), replace(state, weight=weight, momentum=momentum)

    def _tokens(self, inputs: Inputs, state: LinearState) -> tuple[Tensor, LinearState]:
        """Token by token; reads come before the write."""
        weight, reads = state.weight, []
        keys = torch.cat([state.keys, inputs.key], dim=1)
        values = torch.cat([state.values, inputs.value], dim=1)
        rates = torch.cat([state.rates, inputs.rate], dim=1)
        length, window = inputs.key.shape[1], self.config.window
        for t in range(length):
            reads.append((weight @ inputs.query[:, t, :, :, None]).squeeze(-1))
            if self.config.rule == "omega":
                k, v, r = (s[:, t : t + window].transpose(1, 2) for s in (keys, values, rates))
                weight = rules.omega(weight, k, v, r, inputs.retain[:, t])
            else:
                weight = rules.oja(weight, keys[:, t], values[:, t], rates[:, t], inputs.retain[:, t])
        end = replace(state, weight=weight, keys=keys[:, length:], values=values[:, length:], rates=rates[:, length:])
        return torch.stack(reads, dim=1), end

    def _check(
        self, key: Tensor, value: Tensor, rate: Tensor, retain: Tensor, query: Tensor, state: LinearState | None
    ) -> None:
        c, lead = self.config, (*key.shape[:2], self.config.heads)
        named = {"key": (key, c.key_width), "value": (value, c.value_width), "query": (query, c.key_width)}
        expected = {name: (t, (*lead, width)) for name, (t, width) in named.items()}
        expected |= {"rate": (rate, lead), "retain": (retain, lead)}
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape or shape[1] < 1:
                raise UserError(
                    f"{name} has the shape {tuple(tensor.shape)}, must be {shape}: (B, T >= 1, heads, width)"
                )
        if state is not None and state.weight.shape[0] != key.shape[0]:
            held = state.weight.shape[0]
            raise UserError(f"state holds {held} streams but key has {lead[0]} rows: pass the state of these streams")
