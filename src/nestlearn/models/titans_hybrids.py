"""Titans with attention (arXiv 2501.00663, §4): the memory as a context, as a gate, as a layer; ∘ is entry by entry.

    MAC   h = M_start(q)   y = attention([persistent, h, x])   o = norm(y) ∘ sigmoid(norm(M(y)))   M learns from y
    MAG   y = attention([persistent, x])                       o = norm(y) ∘ sigmoid(norm(M(x)))   M learns from x
    MAL   m = M(x)         y = attention([persistent, norm(x + m)])                    o = m + y   M learns from x

Attention is over a sliding window, M is the whole layer of `baselines.TitansLayer`, read after each token. In MAC a
chunk of the memory is the paper's segment: h comes from the weights at the segment's start. The paper's o reads M after
the whole segment, where a token would see its own future.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from nestlearn.memory.deep import Weights, deep_forward
from nestlearn.memory.self_modifying import inner_dtype
from nestlearn.memory.state import State
from nestlearn.memory.stream import FastState
from nestlearn.models.baselines import TitansLayer
from nestlearn.models.memory_layer import LayerState
from nestlearn.models.mlp import RMSNorm
from nestlearn.models.window_attention import WindowAttention, WindowState
from nestlearn.ops.pointwise import l2norm


@dataclass(frozen=True)
class HybridState(State):
    """The window of the attention and the layer state of the memory."""

    attention: WindowState
    memory: LayerState


class MemoryAsGate(nn.Module):
    """MAG: attention and memory read the same tokens, the memory gates."""

    def __init__(self, attention: WindowAttention, titans: TitansLayer, width: int, eps: float) -> None:
        super().__init__()
        self.attention, self.titans = attention, titans
        self.norm, self.gate_norm = RMSNorm(width, eps), RMSNorm(width, eps)

    def forward(self, x: Tensor, state: HybridState | None = None) -> tuple[Tensor, HybridState]:
        """x (B, T, width); state None starts new streams. Returns (output, state)."""
        y, window = self.attention(x, state and state.attention)
        m, memory = self.titans(x, state and state.memory)
        return self._gate(y, m), HybridState(window, memory)

    def _gate(self, y: Tensor, m: Tensor) -> Tensor:
        return self.norm(y) * torch.sigmoid(self.gate_norm(m))


class MemoryAsLayer(nn.Module):
    """MAL: first the memory, then attention on its output, each with a residual."""

    def __init__(self, attention: WindowAttention, titans: TitansLayer, width: int, eps: float) -> None:
        super().__init__()
        self.attention, self.titans, self.norm = attention, titans, RMSNorm(width, eps)

    def forward(self, x: Tensor, state: HybridState | None = None) -> tuple[Tensor, HybridState]:
        """As `MemoryAsGate.forward`."""
        m, memory = self.titans(x, state and state.memory)
        y, window = self.attention(self.norm(x + m), state and state.attention)
        return m + y, HybridState(window, memory)


class MemoryAsContext(MemoryAsGate):
    """MAC: attention sees what the memory recalls, segment by segment."""

    def __init__(self, attention: WindowAttention, titans: TitansLayer, width: int, eps: float) -> None:
        super().__init__(attention, titans, width, eps)
        self.ask = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state: HybridState | None = None) -> tuple[Tensor, HybridState]:
        """As `MemoryAsGate.forward`."""
        segment, place = self.titans.memory.config.chunk, 0
        if state is not None:
            places = state.attention.seen % segment
            if len(places.unique()) > 1:
                return by_place(self.forward, x, state, places)
            place = int(places[0])
        outputs = []
        cuts = tuple(range((segment - place) % segment, x.shape[1], segment))
        for piece in x.tensor_split(cuts, dim=1):
            if piece.shape[1]:
                output, state = self._segment(piece, state)
                outputs.append(output)
        return torch.cat(outputs, dim=1), cast(HybridState, state)

    def _segment(self, x: Tensor, state: HybridState | None) -> tuple[Tensor, HybridState]:
        """Tokens of one segment."""
        y, window = self.attention(x, state and state.attention, self._recall(x, state))
        m, memory = self.titans(y, state and state.memory)
        return self._gate(y, m), HybridState(window, memory)

    def _recall(self, x: Tensor, state: HybridState | None) -> Tensor:
        """M_start(q) − q (B, T, width), from the weights at the start of the segment."""
        memory = self.titans.memory
        new = memory.init_state(len(x)).to(inner_dtype(x.dtype))
        fast = new if state is None else cast(FastState, state.memory.memory)
        begins = (fast.seen % memory.config.chunk == 0)[:, None, None, None, None]
        pairs = ((fast.w1, fast.start1), (fast.w2, fast.start2))
        start = Weights(*(torch.where(begins, live, old)[:, 0] for live, old in pairs))
        query = l2norm(self.ask(x).unflatten(-1, (memory.config.heads, -1))).transpose(1, 2).to(fast.w1.dtype)
        recalled = deep_forward(start, query) - query
        return recalled.transpose(1, 2).flatten(-2).to(x.dtype)


def by_place(
    run: Callable[[Tensor, HybridState], tuple[Tensor, HybridState]], x: Tensor, state: HybridState, places: Tensor
) -> tuple[Tensor, HybridState]:
    """``run`` for the rows of each place in turn, results put back in order."""
    rows = [torch.nonzero(places == place).flatten() for place in places.unique()]
    results = [run(x[r], state[r]) for r in rows]
    order = torch.argsort(torch.cat(rows))
    return torch.cat([y for y, _ in results])[order], State.cat([end for _, end in results])[order]
