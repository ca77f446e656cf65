"""Causal softmax attention with rotary positions, streaming: the mixer of Hope-Attention (NL §8.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory.state import State


@dataclass(frozen=True)
class AttentionState(State):
    """Everything read so far: key, value (B, H, L, d), the newest last; seen (B,) tokens of each row, <= L.

    The one state that grows with the stream. A row that has seen fewer than L tokens is padded in front.
    """

    key: Tensor
    value: Tensor
    seen: Tensor

    @classmethod
    def _join(cls, states: Sequence[Any]) -> Any:
        """Rows of several states, padded in front to the longest."""
        longest = max(s.key.shape[2] for s in states)
        key, value = (
            torch.cat([F.pad(t, (0, 0, longest - t.shape[2], 0)) for t in tensors])
            for tensors in ([s.key for s in states], [s.value for s in states])
        )
        return cls(key, value, torch.cat([s.seen for s in states]))


class CausalAttention(nn.Module):
    """Multi-head attention over the stream; rotary embedding of base ``rope_theta`` on every head."""

    def __init__(self, width: int, heads: int, *, rope_theta: float = 10_000.0) -> None:
        super().__init__()
        self.heads, self.rope_theta = heads, rope_theta
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state: AttentionState | None = None) -> tuple[Tensor, AttentionState]:
        """x (B, T, width). Returns (output, state)."""
        batch, length, width = x.shape
        seen = torch.zeros(batch, dtype=torch.long, device=x.device) if state is None else state.seen
        query, key, value = self.project(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        positions = seen[:, None] + torch.arange(length, device=x.device)
        query, key = (rotate(t, positions, self.rope_theta) for t in (query, key))
        if state is None:
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            key, value = torch.cat([state.key, key], dim=2), torch.cat([state.value, value], dim=2)
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=_visible(seen, length, key.shape[2]))
        y = self.out(y.transpose(1, 2).reshape(batch, length, width))
        return y, AttentionState(key, value, seen + length)


def _visible(seen: Tensor, new: int, total: int) -> Tensor:
    """(B, 1, new, total): row b sees its own ``seen`` newest old tokens and no future ones."""
    slot = torch.arange(total, device=seen.device)
    old = total - new
    real = slot >= (old - seen)[:, None]
    past = slot <= old + torch.arange(new, device=seen.device)[:, None]
    return real[:, None, None, :] & past[None, None]


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding, halves convention: x (B, H, T, d), d even; positions (B, T)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angle = positions[:, None, :, None].float() * frequency  # in float32: a bfloat16 angle is off by whole turns
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
