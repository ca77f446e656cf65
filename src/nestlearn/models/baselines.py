"""What HOPE is compared with: other papers' memories as token mixers in `MemoryFrame`; docs/baselines.md is the guide.

    retnet          M ← γ M + v kᵀ                         γ fixed per head, k and q rotated    arXiv 2307.08621
    deltanet        M ← M (I − η k kᵀ) + η v kᵀ            η = sigmoid(w_η x)                   arXiv 2406.06484
    gated_deltanet  M ← α M (I − η k kᵀ) + η v kᵀ          α = exp(−A softplus(w_α x + b))      arXiv 2412.06464
    titans          M an MLP, by gradient descent with momentum and forgetting: `memory/titans.py`      arXiv 2501.00663
    ttt_mlp         the same without either, a layer norm in the memory                      arXiv 2407.04620

All of them read after the write, the matrices y = M q / √d. The Transformer is no class of its own: it is
Hope-Attention's mixer over one level of period 1. Samba's two layers are in `mamba2.py` and `window_attention.py`.

Letters: B batch, T tokens, H heads, d head width, D = H d model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory.linear import LinearConfig, LinearMemory, LinearState
from nestlearn.memory.read_out import ReadOut
from nestlearn.memory.self_modifying import inner_dtype
from nestlearn.memory.state import State
from nestlearn.memory.titans import TitansConfig, TitansMemory
from nestlearn.models.attention import rotate
from nestlearn.models.memory_layer import MemoryFrame
from nestlearn.ops.pointwise import l2norm

RETAIN_START = {"zero": 0.9999, "initial": (0.9999, 0.99)}  # Titans' α, by what it pulls to; spread over the heads


@dataclass(frozen=True)
class RotatedState(State):
    """memory, of keys rotated by their position; seen (B,) tokens of each row."""

    memory: LinearState
    seen: Tensor


class RetNetLayer(MemoryFrame):
    """Retention: linear attention with one fixed decay per head, γ = 1 − 2^(−5 − head); no convolution."""

    def __init__(self, width: int, heads: int, *, chunk: int, rope_theta: float, eps: float) -> None:
        super().__init__(width, heads, conv_width=0, eps=eps)
        self.memory, self.rope_theta = matrix_memory(self, "hebbian", chunk), rope_theta

    def _memorise(
        self, x: Tensor, key: Tensor, value: Tensor, query: Tensor, state: RotatedState | None
    ) -> tuple[Tensor, State]:
        seen = torch.zeros(len(x), dtype=torch.long, device=x.device) if state is None else state.seen
        positions = seen[:, None] + torch.arange(x.shape[1], device=x.device)
        key, query = (rotate(t.transpose(1, 2), positions, self.rope_theta).transpose(1, 2) for t in (key, query))
        retain = 1 - 2.0 ** -(5 + torch.arange(self.heads, dtype=inner_dtype(x.dtype), device=x.device))
        retain = retain.expand(key.shape[:3])
        query = query * self.head_width**-0.5
        y, memory = self.memory(key, value, torch.ones_like(retain), retain, query, state and state.memory)
        return y, RotatedState(memory, seen + x.shape[1])


class DeltaNetLayer(MemoryFrame):
    """The delta rule with a learned rate; keys and queries on the unit sphere."""

    def __init__(self, width: int, heads: int, *, chunk: int, conv_width: int, eps: float) -> None:
        super().__init__(width, heads, conv_width=conv_width, eps=eps)
        self.memory = matrix_memory(self, "gated_delta", chunk)
        self.rate_read = ReadOut(heads, width, 0.5)

    def _memorise(self, x: Tensor, key: Tensor, value: Tensor, query: Tensor, state: Any) -> tuple[Tensor, State]:
        key, value, query = (F.silu(t) for t in (key, value, query))
        rate = gate(self.rate_read, x)
        return self.memory(l2norm(key), value, rate, self._retain(x), l2norm(query) * self.head_width**-0.5, state)

    def _retain(self, x: Tensor) -> Tensor:
        """α (B, T, H): 1, nothing is forgotten but what is overwritten."""
        return x.new_ones(*x.shape[:2], self.heads)


class GatedDeltaNetLayer(DeltaNetLayer):
    """The same with forgetting."""

    def __init__(self, width: int, heads: int, *, chunk: int, conv_width: int, eps: float) -> None:
        super().__init__(width, heads, chunk=chunk, conv_width=conv_width, eps=eps)
        self.decay = DecayGate(heads, width)

    def _retain(self, x: Tensor) -> Tensor:
        return self.decay(x)


class TitansLayer(MemoryFrame):
    """Titans' neural memory (LMM): θ, α and μ are sigmoids of the token; the frame takes the query off, as in HOPE.

    The step is explicit, a chunk sums its tokens' gradients, and momentum adds them up again: θ is at most
    (1 − μ)/chunk, so that the largest step grows with neither, and bounded by the curvature (`TitansConfig.bounded`).
    Retention to zero takes both layers where neither has a gradient: α starts near 1. Retention to the initial weights
    takes nothing away that was trained: the heads start with memories of many time scales.
    """

    def __init__(self, width: int, config: TitansConfig, *, conv_width: int, eps: float) -> None:
        super().__init__(width, config.heads, conv_width=conv_width, eps=eps)
        self.memory = TitansMemory(config)
        self.rate_read = ReadOut(config.heads, width, 0.5)
        self.retain_read = ReadOut(config.heads, width, RETAIN_START[config.retain_to])
        self.momentum_read = ReadOut(config.heads, width, 0.5)

    def _memorise(self, x: Tensor, key: Tensor, value: Tensor, query: Tensor, state: Any) -> tuple[Tensor, State]:
        key, value, query = l2norm(F.silu(key)), F.silu(value), l2norm(F.silu(query))
        rate, retain, momentum = (gate(read, x) for read in (self.rate_read, self.retain_read, self.momentum_read))
        rate = (1 - momentum) * rate / self.memory.config.chunk
        y, end = self.memory(key, value, rate, retain, momentum, query, state)
        return y - query, end


class TTTLayer(MemoryFrame):
    """TTT-MLP: mini-batches of ``chunk`` tokens, a learned step per token, nothing forgotten."""

    def __init__(self, width: int, config: TitansConfig, *, conv_width: int, eps: float) -> None:
        super().__init__(width, config.heads, conv_width=conv_width, eps=eps)
        self.memory = TitansMemory(config)
        self.rate_read = ReadOut(config.heads, width, 0.5)

    def _memorise(self, x: Tensor, key: Tensor, value: Tensor, query: Tensor, state: Any) -> tuple[Tensor, State]:
        key, query = l2norm(key), l2norm(query)
        rate = gate(self.rate_read, x)
        y, end = self.memory(
            key, value, rate / self.memory.config.chunk, torch.ones_like(rate), torch.zeros_like(rate), query, state
        )
        return y - query, end


def gate(read: ReadOut, x: Tensor) -> Tensor:
    """sigmoid of a read-out of x (B, T, D): (B, T, H), in float32 at least, where values near 1 keep their digits."""
    dtype = inner_dtype(x.dtype)
    return torch.sigmoid(F.linear(x.to(dtype), read.weight.to(dtype), read.bias.to(dtype)))


class DecayGate(nn.Module):
    """α = exp(−A softplus(w x + b)) as in Mamba 2: weight (H, D), bias (H,), A = exp(log_speed) (H,)."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width))
        self.bias = nn.Parameter(torch.empty(heads))
        self.log_speed = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform in [1, 16], softplus(b) log-uniform in [0.001, 0.1]: memories of many time scales."""
        nn.init.normal_(self.weight, std=0.1 * self.weight.shape[-1] ** -0.5)
        nn.init.uniform_(self.log_speed, 1, 16)
        nn.init.uniform_(self.bias, math.log(1e-3), math.log(0.1))
        with torch.no_grad():
            self.log_speed.log_()
            self.bias.copy_(self.bias.exp().expm1().log())

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) to α (B, T, H), in float32 at least: an α near 1 is rounded to 1 in bfloat16."""
        return self.step_and_decay(x)[1]

    def step_and_decay(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(softplus(w x + b), α): in Mamba 2 the first is how much a token writes."""
        dtype = inner_dtype(x.dtype)
        weight, bias, log_speed = (t.to(dtype) for t in (self.weight, self.bias, self.log_speed))
        step = F.softplus(F.linear(x.to(dtype), weight, bias))
        return step, (-log_speed.exp() * step).exp()


def matrix_memory(frame: MemoryFrame, rule: str, chunk: int) -> LinearMemory:
    """One matrix (d, d) per head of the frame."""
    return LinearMemory(LinearConfig(frame.head_width, frame.head_width, frame.heads, rule=rule, chunk=chunk))
