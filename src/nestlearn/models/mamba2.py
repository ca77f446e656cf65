"""Mamba 2 (arXiv 2405.21060): a selective state space, which is linear attention with a decay per head and token.

    [g, v, k, q] = W_in x              v, k, q pass a causal depthwise convolution with a bias, then SiLU
    Δ = softplus(w x + b)              α = exp(−A Δ)
    S ← α S + Δ v kᵀ                   y = S q + s v
    out = W_out norm(y ∘ silu(g))      one norm over all heads

In the paper's letters v is x, k is B, q is C and s is D. Keys and queries are shared by all heads (one group).

Letters: B batch, T tokens, H heads, n width of keys and queries, e = 2 D width of all values, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory.linear import LinearConfig, LinearMemory
from nestlearn.models.baselines import DecayGate
from nestlearn.models.memory_layer import CausalConv, LayerState
from nestlearn.models.mlp import RMSNorm

EXPAND = 2  # values are this many times as wide as the model: Mamba's own choice


class Mamba2Layer(nn.Module):
    """See the module docstring. ``y, state = layer(x, state)``; a state of None starts new streams."""

    def __init__(self, width: int, heads: int, key_width: int, *, chunk: int, conv_width: int, eps: float) -> None:
        super().__init__()
        inner = EXPAND * width
        self.heads, self.sizes = heads, [inner, key_width, key_width]
        self.project = nn.Linear(width, inner + sum(self.sizes), bias=False)
        self.conv = CausalConv(sum(self.sizes), conv_width)
        self.conv_bias = nn.Parameter(torch.empty(sum(self.sizes)))
        self.decay = DecayGate(heads, width)
        self.memory = LinearMemory(LinearConfig(key_width, inner // heads, heads, rule="hebbian", chunk=chunk))
        self.skip = nn.Parameter(torch.empty(heads))
        self.norm = RMSNorm(inner, eps)
        self.out = nn.Linear(inner, width, bias=False)
        self.reset_own_parameters()

    def reset_own_parameters(self) -> None:
        """Of the parameters that belong to no part: the convolution's bias 0, s = 1."""
        nn.init.zeros_(self.conv_bias)
        nn.init.ones_(self.skip)

    def forward(self, x: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """x (B, T, D). Returns (output (B, T, D), state)."""
        gate, inputs = self.project(x).split([self.sizes[0], sum(self.sizes)], dim=-1)
        before = self.conv.init_tail(len(x), x.dtype, x.device) if state is None else state.tail
        inputs, tail = self.conv(inputs, before)
        value, key, query = F.silu(inputs + self.conv_bias).split(self.sizes, dim=-1)
        value = value.unflatten(-1, (self.heads, -1))
        key, query = (t[:, :, None].expand(-1, -1, self.heads, -1) for t in (key, query))
        step, retain = self.decay.step_and_decay(x)
        y, memory = self.memory(key, value, step, retain, query, state and state.memory)
        y = (y + self.skip[:, None] * value).flatten(-2)
        return self.out(self.norm(y * F.silu(gate))), LayerState(tail, memory)
