"""Sliding-window attention with persistent tokens, streaming at constant size (Titans, arXiv 2501.00663, §3.3 and §4).

A token sees the last ``window`` tokens, itself included, and P trained tokens (or none) that belong to no stream. With
recalled tokens (Titans' "memory as a context") each of the stream's tokens brings a second one, seen whenever it is.

Letters: B batch, T new tokens, H heads, d head width, P persistent tokens, n tokens that each position brings (1 or 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory.state import State
from nestlearn.models.attention import rotate


@dataclass(frozen=True)
class WindowState(State):
    """The last window − 1 positions: key, value (B, H, n, window − 1, d), zeros before the stream; seen (B,) tokens."""

    key: Tensor
    value: Tensor
    seen: Tensor


class WindowAttention(nn.Module):
    """See the module docstring. ``y, state = attention(x, state, recalled)``; a state of None starts new streams."""

    def __init__(self, width: int, heads: int, *, window: int, persistent: int, rope_theta: float) -> None:
        super().__init__()
        self.heads, self.window, self.rope_theta = heads, window, rope_theta
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.persistent = nn.Parameter(torch.empty(persistent, width)) if persistent else None
        self.reset_persistent()

    def reset_persistent(self) -> None:
        """Normal, of the size of a normalised token."""
        if self.persistent is not None:
            nn.init.normal_(self.persistent)

    def init_state(self, x: Tensor, sources: int) -> WindowState:
        """Before the first token of the streams that x (B, T, width) belongs to."""
        empty = x.new_zeros(len(x), self.heads, sources, self.window - 1, x.shape[-1] // self.heads)
        return WindowState(empty, empty, torch.zeros(len(x), dtype=torch.long, device=x.device))

    def forward(
        self, x: Tensor, state: WindowState | None = None, recalled: Tensor | None = None
    ) -> tuple[Tensor, WindowState]:
        """x, recalled (B, T, width). Returns (output (B, T, width), state). The cost is linear in T."""
        sources = x[:, None] if recalled is None else torch.stack([x, recalled], dim=1)
        state = self.init_state(x, sources.shape[1]) if state is None else state
        outputs = []
        for piece in sources.split(self.window, dim=2):
            y, state = self._piece(piece, state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def _piece(self, sources: Tensor, state: WindowState) -> tuple[Tensor, WindowState]:
        """At most ``window`` new tokens: sources (B, n, T, width)."""
        count, length, width = sources.shape[1:]
        positions = state.seen[:, None] + torch.arange(length, device=sources.device)
        asks, gives = self.project.weight.split([width, 2 * width])
        query = rotate(self._split(F.linear(sources[:, 0], asks)), positions, self.rope_theta)
        key, value = F.linear(sources, gives).unflatten(-1, (2, self.heads, -1)).permute(3, 0, 4, 1, 2, 5)
        key = rotate(key.flatten(1, 2), positions, self.rope_theta).unflatten(1, (self.heads, count))
        key, value = torch.cat([state.key, key], dim=3), torch.cat([state.value, value], dim=3)
        seen = key.flatten(2, 3), value.flatten(2, 3), self._visible(state.seen, length).repeat(1, 1, count)
        all_keys, all_values, mask = seen if self.persistent is None else self._with_persistent(*seen, gives)
        y = F.scaled_dot_product_attention(query, all_keys, all_values, attn_mask=mask[:, None])
        y = self.out(y.transpose(1, 2).flatten(-2))
        return y, WindowState(key[..., length:, :], value[..., length:, :], state.seen + length)

    def _with_persistent(self, keys: Tensor, values: Tensor, mask: Tensor, gives: Tensor) -> tuple[Tensor, ...]:
        """The persistent tokens, which all see, put before the others."""
        assert self.persistent is not None
        lasting = F.linear(self.persistent, gives).unflatten(-1, (2, self.heads, -1)).permute(1, 2, 0, 3)
        first_keys, first_values = lasting[:, None].expand(-1, len(keys), -1, -1, -1)
        joined = torch.cat([first_keys, keys], dim=2), torch.cat([first_values, values], dim=2)
        return *joined, F.pad(mask, (len(self.persistent), 0), value=True)

    def _split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _visible(self, seen: Tensor, new: int) -> Tensor:
        """(B, new, window − 1 + new): positions of the past, within the window, and not before the stream."""
        at = torch.arange(new, device=seen.device)[:, None]
        age = at + self.window - 1 - torch.arange(self.window - 1 + new, device=seen.device)
        return ((age >= 0) & (age < self.window)) & (age <= seen[:, None, None] + at)
