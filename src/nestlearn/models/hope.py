"""HOPE (NL §8.3, Eq. 94–97): blocks of a token mixer and a continuum memory system.

    x ← x + mixer(norm(x))        self-modifying Titans; softmax attention in Hope-Attention
    x ← CMS(x)

The mixer is a choice of `MIXERS`; everything else is shared. Nothing here knows Hugging Face: see `hf.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestlearn.levels import Level
from nestlearn.memory.self_modifying import SelfModifyingConfig
from nestlearn.memory.state import State
from nestlearn.models.attention import CausalAttention
from nestlearn.models.continuum import Continuum
from nestlearn.models.memory_layer import GatedDeltaLayer, SelfModifyingLayer
from nestlearn.models.mlp import RMSNorm


class Shape(NamedTuple):
    """What a network is made from; `hf.HopeConfig` is where it is configured and checked."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    levels: tuple[Level, ...]
    connection: str
    mixer: str
    memory: SelfModifyingConfig
    conv_width: int
    rope_theta: float
    eps: float


MIXERS: dict[str, Callable[[Shape], nn.Module]] = {
    "self_modifying": lambda s: SelfModifyingLayer(s.hidden_size, s.memory, conv_width=s.conv_width, eps=s.eps),
    "attention": lambda s: CausalAttention(s.hidden_size, s.heads, rope_theta=s.rope_theta),
    "gated_delta": lambda s: GatedDeltaLayer(
        s.hidden_size, s.heads, chunk=s.memory.chunk, conv_width=s.conv_width, eps=s.eps
    ),
}


@dataclass(frozen=True)
class HopeState(State):
    """The states of all layers' mixers for one batch of streams."""

    layers: tuple[State, ...]


class HopeBlock(nn.Module):
    """One layer: mixer, then continuum memory system."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = RMSNorm(shape.hidden_size, shape.eps)
        self.mixer = MIXERS[shape.mixer](shape)
        self.cms = Continuum(shape.hidden_size, shape.intermediate_size, shape.levels, shape.connection, shape.eps)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x (B, T, width), state of the mixer. Returns (x, state)."""
        mixed, state = self.mixer(self.norm(x), state)
        return self.cms(x + mixed), state


class HopeBackbone(nn.Module):
    """The stack of blocks between embedding and head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(HopeBlock(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden_size, shape.eps)

    def forward(
        self, x: Tensor, state: HopeState | None = None, *, checkpointing: bool = False
    ) -> tuple[Tensor, HopeState]:
        """x (B, T, width). ``checkpointing`` recomputes each block in the backward pass."""
        states = []
        for number, block in enumerate(self.blocks):
            before = None if state is None else state.layers[number]
            if checkpointing:
                x, after = checkpoint(block, x, before, use_reentrant=False)  # pyright: ignore[reportGeneralTypeIssues]
            else:
                x, after = block(x, before)
            states.append(after)
        return self.norm(x), HopeState(tuple(states))

    def restart(self, fired: set[float]) -> None:
        """See `Continuum.restart`."""
        for block in self.blocks:
            block.cms.restart(fired)


class LevelRow(NamedTuple):
    """One line of the table of levels: what changes, how often, by which objective, from which context."""

    component: str
    period: float
    objective: str
    context: str
    parameters: int
    rule: str


def level_table(model: nn.Module, backbone: HopeBackbone) -> list[LevelRow]:
    """Every component of a model, fastest first; parameters are counted over all layers and add up to the whole."""
    shape, rows = backbone.shape, []
    if shape.mixer == "self_modifying":
        rows += _memory_rows(backbone)
    elif shape.mixer == "attention":
        rows.append(
            LevelRow("attention (non-parametric)", 1, "Nadaraya–Watson regression", "all tokens so far", 0, "softmax")
        )
    else:
        rows.append(LevelRow("matrix memory", 1, "‖S k − v‖²", "tokens of the stream", 0, "gated delta rule"))
    slow = [
        LevelRow(
            f"CMS {level.name}",
            level.period,
            "next-token loss",
            "training tokens",
            _level_size(backbone, i),
            "gradient",
        )
        for i, level in enumerate(shape.levels)
    ]
    whole = sum(p.numel() for p in model.parameters())
    rest = whole - sum(row.parameters for row in (*rows, *slow))
    rows.append(
        LevelRow("projections, embedding, norms", math.nan, "next-token loss", "training tokens", rest, "gradient")
    )
    return rows + slow


def _memory_rows(backbone: HopeBackbone) -> list[LevelRow]:
    c = backbone.shape.memory
    objective = "−⟨M(k), v̂⟩" if c.objective == "dot" else "½‖M(k) − v̂‖²"
    rule = ("DGD" if c.dgd else "gradient descent") + (f", momentum {c.momentum}" if c.momentum else "")
    size = (
        sum(p.numel() for p in backbone.blocks[0].mixer.memory.initial["memory"].parameters()) * backbone.shape.layers
    )  # pyright: ignore
    rows = [LevelRow("memory", 1, objective, "tokens of the stream", size, rule)]
    for name in reversed(c.names[:-1]):
        period = c.chunk if name in c.adaptive else math.inf
        rows.append(LevelRow(f"M_{name}", period, objective, "tokens of the stream", size, rule))
    return rows


def _level_size(backbone: HopeBackbone, number: int) -> int:
    blocks = (list(block.cms.blocks.values())[number] for block in backbone.blocks)  # pyright: ignore
    return sum(p.numel() for block in blocks for p in block.parameters())


class MemorySignal(NamedTuple):
    """What one component did over a passage: per token (T,), or None where it has no such thing; norm per chunk."""

    component: str
    period: float
    surprise: Tensor
    rate: Tensor | None
    retain: Tensor | None
    norm: Tensor | None


class Trace(NamedTuple):
    """loss (T − 1,) of each next token in nats; signals of every memory and every level of every layer."""

    loss: Tensor
    signals: list[MemorySignal]


def trace(backbone: HopeBackbone, embedded: Tensor, score: Callable[[Tensor], Tensor]) -> Trace:
    """Read a passage (1, T, width) and record every level's surprise; ``score`` maps hidden states to losses (T − 1,).

    The surprise of a CMS level is the norm of the loss's gradient at its output, its local surprise signal.
    """
    x, signals, added = embedded.detach().requires_grad_(), [], []
    for number, block in enumerate(backbone.blocks):
        normed = block.norm(x)  # pyright: ignore[reportCallIssue]
        if isinstance(block.mixer, SelfModifyingLayer):
            signals += _memory_signals(f"layer {number}", block.mixer, normed)
        *outputs, x = block.cms.run(x + block.mixer(normed, None)[0])  # pyright: ignore
        added += [
            (f"layer {number} / CMS {level.name}", level.period, y) for level, y in zip(block.cms.levels, outputs)
        ]  # pyright: ignore
    loss = score(backbone.norm(x))
    grads = torch.autograd.grad(loss.sum(), [y for _, _, y in added])
    for (component, period, _), grad in zip(added, grads, strict=True):
        signals.append(MemorySignal(component, period, grad[0].norm(dim=-1).float().cpu(), None, None, None))
    return Trace(loss.detach().float().cpu(), signals)


def _memory_signals(where: str, layer: SelfModifyingLayer, x: Tensor) -> list[MemorySignal]:
    seen = layer.observe(x)
    config = layer.memory.config
    lengths = torch.tensor(seen.lengths, device=x.device)
    signals = []
    for i, name in enumerate(seen.names):
        surprise, rate, norm = (t[0, i].mean(0).float().cpu() for t in (seen.surprise, seen.rate, seen.norm))
        retain = seen.retain[0, 0].mean(0).float().cpu()
        period = 1 if name == "memory" else config.chunk
        label = f"{where} / {'memory' if name == 'memory' else 'M_' + name}"
        signals.append(MemorySignal(label, period, surprise, rate, retain, norm.repeat_interleave(lengths.cpu())))
    return signals


def parameter_levels(backbone: HopeBackbone) -> dict[Any, Level]:
    """The level of every parameter that belongs to one, by parameter."""
    return {
        parameter: level
        for block in backbone.blocks
        for level, mlp in zip(block.cms.levels, block.cms.blocks.values(), strict=True)  # pyright: ignore
        for parameter in mlp.parameters()
    }
