"""Layers around a memory: static maps, causal convolution, heads, output norm, gate and projection.

    [x_k, x_v, q, g] = W_in x          x_k feeds the keys and gates, x_v the values; x_k, x_v and q pass a causal
                                       depthwise convolution
    y = memory(x_k, l2norm(q), x_v)    heads of width d
    out = W_out (norm(y − q) ∘ silu(g))

`MemoryFrame` is this frame; what stands inside is a self-modifying memory or, for comparison, a gated delta rule
(whose y has no q in it) or one of `baselines.py`. Two choices are ours, with numbers in LOG.md. A deep memory returns
M(q) = q + w1 σ(w2 q); what it knows is the second term, and the norm would weigh it against the query, so the query is
taken off first. And the query is convolved like keys and values: else a layer whose memory never writes sees no token
but the current one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory.linear import LinearConfig, LinearMemory
from nestlearn.memory.read_out import ReadOut
from nestlearn.memory.self_modifying import SelfModifyingConfig, SelfModifyingMemory, Signals
from nestlearn.memory.state import State
from nestlearn.memory.stream import FastState
from nestlearn.models.mlp import RMSNorm
from nestlearn.ops.causal_conv import causal_conv
from nestlearn.ops.pointwise import gated, l2norm


@dataclass(frozen=True)
class LayerState(State):
    """tail (B, width − 1, channels), the convolution's last inputs, None without one; memory, the inner state."""

    tail: Tensor | None
    memory: State


class CausalConv(nn.Module):
    """Depthwise causal convolution over time, streaming: (B, T, channels), its state the last width − 1 inputs."""

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Near the identity: the current token passes, older ones start small."""
        nn.init.normal_(self.weight, std=0.3)
        with torch.no_grad():
            self.weight[-1] += 1

    def init_tail(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros: nothing came before."""
        return torch.zeros(batch, len(self.weight) - 1, self.weight.shape[1], dtype=dtype, device=device)

    def forward(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (output (B, T, channels), tail after the last token)."""
        padded = torch.cat([tail, x], dim=1)
        after = padded[:, x.shape[1] :]
        return causal_conv(padded, self.weight), after if x.shape[1] == 1 else after.clone()  # not all of a long x


class MemoryFrame(nn.Module):
    """Everything of a memory layer but the memory: subclasses provide `_memorise`. conv_width 0: no convolution."""

    def __init__(self, width: int, heads: int, *, conv_width: int = 4, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.project = nn.Linear(width, 4 * width, bias=False)
        self.conv = CausalConv(3 * width, conv_width) if conv_width else None
        self.norm = RMSNorm(self.head_width, eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """x (B, T, width); state None starts new streams. Returns (output, state)."""
        key_value, query, gate, tail = self._inputs(x, state)
        key, value = (self._split(t) for t in key_value.chunk(2, dim=-1))
        y, memory = self._memorise(x, key, value, query, None if state is None else state.memory)
        return self.out(gated(gate, self.norm(y).flatten(-2))), LayerState(tail, memory)

    def _inputs(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        width, tail = x.shape[-1], None if state is None else state.tail
        inputs, gate = self.project(x).split([3 * width, width], dim=-1)
        if self.conv is not None:
            gate = gate.contiguous()  # of its own: a view would keep what is convolved, too
            inputs, tail = self.conv(inputs, self.conv.init_tail(len(x), x.dtype, x.device) if tail is None else tail)
        key_value, query = inputs.split([2 * width, width], dim=-1)
        return key_value, self._split(query), gate, tail

    def _split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, self.head_width))

    def _memorise(self, x: Tensor, key: Tensor, value: Tensor, query: Tensor, state: Any) -> tuple[Tensor, State]:
        """x (B, T, width); key, value, query (B, T, H, d), convolved; state of the memory. Returns (y, state)."""
        raise NotImplementedError


class SelfModifyingLayer(MemoryFrame):
    """Self-modifying Titans (NL §8.1)."""

    def __init__(self, width: int, memory: SelfModifyingConfig, *, conv_width: int = 4, eps: float = 1e-6) -> None:
        super().__init__(width, memory.heads, conv_width=conv_width, eps=eps)
        self.memory = SelfModifyingMemory(memory)

    def _memorise(self, x: Tensor, key: Tensor, value: Tensor, query: Tensor, state: Any) -> tuple[Tensor, State]:
        query = l2norm(query)
        read, end = self.memory(key, query, state, value)
        return read - query, end

    def renewed(self, state: LayerState) -> LayerState:
        """See `SelfModifyingMemory.renewed`."""
        assert isinstance(state.memory, FastState)
        return LayerState(state.tail, self.memory.renewed(state.memory))

    @torch.no_grad()
    def observe(self, x: Tensor) -> Signals:
        """What the memory does while reading x (B, T, width) from a new stream: see `SelfModifyingMemory.observe`."""
        key_value, query, _, _ = self._inputs(x, None)
        key, value = (self._split(t) for t in key_value.chunk(2, dim=-1))
        return self.memory.observe(key, l2norm(query), None, value)


class GatedDeltaLayer(MemoryFrame):
    """The gated delta rule in the same frame, for comparison: static k, v, rate, retention; its memory is a matrix."""

    def __init__(self, width: int, heads: int, *, chunk: int = 64, conv_width: int = 4, eps: float = 1e-6) -> None:
        super().__init__(width, heads, conv_width=conv_width, eps=eps)
        self.memory = LinearMemory(LinearConfig(self.head_width, self.head_width, heads, rule="delta", chunk=chunk))
        self.rate_read = ReadOut(heads, self.head_width, 0.5)
        self.retain_read = ReadOut(heads, self.head_width, 0.9999)

    def _memorise(self, x: Tensor, key: Tensor, value: Tensor, query: Tensor, state: Any) -> tuple[Tensor, State]:
        rate, retain = (
            torch.sigmoid((key * read.weight).sum(-1) + read.bias) for read in (self.rate_read, self.retain_read)
        )
        return self.memory(l2norm(F.silu(key)), F.silu(value), rate, retain, l2norm(query), state)
