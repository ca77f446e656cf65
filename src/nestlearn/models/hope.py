"""HOPE (NL §8.3; NL Eq. 94–97): blocks of a token mixer and a continuum memory system.

    x ← x + mixer(norm(x))        self-modifying Titans; softmax attention in Hope-Attention
    x ← CMS(x)

The mixer is a choice of `MIXERS`; everything else is shared. Nothing here knows Hugging Face: see `hf.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from nestlearn.levels import Level
from nestlearn.memory.self_modifying import SelfModifyingConfig
from nestlearn.memory.state import State
from nestlearn.memory.titans import TitansConfig
from nestlearn.models.attention import CausalAttention
from nestlearn.models.baselines import DeltaNetLayer, GatedDeltaNetLayer, RetNetLayer, TitansLayer, TTTLayer
from nestlearn.models.continuum import Continuum
from nestlearn.models.mamba2 import Mamba2Layer
from nestlearn.models.memory_layer import GatedDeltaLayer, SelfModifyingLayer
from nestlearn.models.mlp import RMSNorm
from nestlearn.models.titans_hybrids import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from nestlearn.models.window_attention import WindowAttention


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
    window: int
    persistent: int


def delta_rule(kind: Callable[..., nn.Module]) -> Callable[[Shape], nn.Module]:
    """A layer whose memory is a matrix, in HOPE's frame."""
    return lambda s: kind(s.hidden_size, s.heads, chunk=s.memory.chunk, conv_width=s.conv_width, eps=s.eps)


def deep_memory(s: Shape, *, inner_norm: bool = False) -> TitansConfig:
    """The baselines' MLP memory, of the sizes of HOPE's own; with a layer norm, of TTT-MLP, which forgets nothing."""
    m = s.memory
    sizes = (m.head_width, m.hidden_width, m.heads, m.memory_length)
    if inner_norm:
        return TitansConfig(*sizes, inner_norm=True, recompute=m.recompute)
    return TitansConfig(*sizes, retain_to=m.retain_to, bounded=True, recompute=m.recompute)


def window_attention(s: Shape, *, persistent: int = 0) -> WindowAttention:
    """Sliding-window attention."""
    return WindowAttention(s.hidden_size, s.heads, window=s.window, persistent=persistent, rope_theta=s.rope_theta)


def mamba2(s: Shape) -> Mamba2Layer:
    """A selective state space, its keys as wide as a head of the other mixers."""
    return Mamba2Layer(
        s.hidden_size, s.heads, s.memory.head_width, chunk=s.memory.chunk, conv_width=s.conv_width, eps=s.eps
    )


def titans_hybrid(kind: Callable[..., nn.Module]) -> Callable[[Shape], nn.Module]:
    """Titans' memory with sliding-window attention."""

    def build(s: Shape) -> nn.Module:
        attention = window_attention(s, persistent=s.persistent)
        return kind(attention, MIXERS["titans"](s), s.hidden_size, s.eps)

    return build


MIXERS: dict[str, Callable[[Shape], nn.Module]] = {
    "self_modifying": lambda s: SelfModifyingLayer(s.hidden_size, s.memory, conv_width=s.conv_width, eps=s.eps),
    "attention": lambda s: CausalAttention(s.hidden_size, s.heads, rope_theta=s.rope_theta),
    "transformer": lambda s: CausalAttention(s.hidden_size, s.heads, rope_theta=s.rope_theta),
    "gated_delta": delta_rule(GatedDeltaLayer),
    "retnet": lambda s: RetNetLayer(s.hidden_size, s.heads, chunk=s.memory.chunk, rope_theta=s.rope_theta, eps=s.eps),
    "deltanet": delta_rule(DeltaNetLayer),
    "gated_deltanet": delta_rule(GatedDeltaNetLayer),
    "titans": lambda s: TitansLayer(s.hidden_size, deep_memory(s), conv_width=s.conv_width, eps=s.eps),
    "ttt_mlp": lambda s: TTTLayer(s.hidden_size, deep_memory(s, inner_norm=True), conv_width=s.conv_width, eps=s.eps),
    "titans_mac": titans_hybrid(MemoryAsContext),
    "titans_mag": titans_hybrid(MemoryAsGate),
    "titans_mal": titans_hybrid(MemoryAsLayer),
    "mamba2": mamba2,
    "window_attention": window_attention,
}
# Models whose layers take turns.
TURNS = {"samba": ("mamba2", "window_attention")}
# What config.mixer may be, and other spellings of it; "-" is as good as "_".
MIXER_NAMES = (*MIXERS, *TURNS)
ALIASES = {"hope": "self_modifying", "hope_attention": "attention"}
# Mixers of HOPE: a continuum of several levels comes with them. The others are models of one MLP for each layer.
CONTINUUM_MIXERS = ("self_modifying", "attention")
# Mixers with rotary positions, which need an even head width.
ROTARY = (
    "attention", "transformer", "retnet", "titans_mac", "titans_mag", "titans_mal", "window_attention", "samba",
)  # fmt: skip


def mixer_name(name: Any) -> Any:
    """The name that is saved for a mixer: "hope" is "self_modifying", "ttt-mlp" is "ttt_mlp"; unknown ones as given."""
    if not isinstance(name, str):
        return name
    known = name.replace("-", "_")
    known = ALIASES.get(known, known)
    return known if known in MIXER_NAMES else name


def mixers_in_turn(name: str) -> tuple[str, ...]:
    """The mixers of the first layers; further layers start again with the first."""
    return TURNS.get(name, (name,))


def levels_of_layer(shape: Shape, number: int) -> tuple[tuple[Level, ...], int]:
    """The levels that a layer, counted from 0, has, and their summed hidden width."""
    here = {level for level in shape.levels if number >= shape.layers - math.ceil(level.layers * shape.layers)}
    absent = [level.hidden_size or 0 for level in shape.levels if level not in here]
    return tuple(level for level in shape.levels if level in here), shape.intermediate_size - sum(absent)


@dataclass(frozen=True)
class HopeState(State):
    """The states of all layers' mixers for one batch of streams."""

    layers: tuple[State, ...]


class HopeBlock(nn.Module):
    """One layer: mixer, then continuum memory system."""

    def __init__(self, shape: Shape, number: int) -> None:
        """The number counts the layers from 0."""
        super().__init__()
        turns = mixers_in_turn(shape.mixer)
        self.norm = RMSNorm(shape.hidden_size, shape.eps)
        self.mixer = MIXERS[turns[number % len(turns)]](shape)
        levels, hidden = levels_of_layer(shape, number)
        self.cms = Continuum(shape.hidden_size, hidden, levels, shape.connection, shape.eps)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x (B, T, width), state of the mixer. Returns (x, state)."""
        mixed, after = self.mixer(self.norm(x), state)
        return self.cms(x + mixed), after


class HopeBackbone(nn.Module):
    """The stack of blocks between embedding and head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(HopeBlock(shape, number) for number in range(shape.layers))
        self.norm = RMSNorm(shape.hidden_size, shape.eps)

    @property
    def layers(self) -> list[HopeBlock]:
        """The blocks, typed."""
        return cast(list[HopeBlock], list(self.blocks))

    def forward(
        self,
        x: Tensor,
        state: HopeState | None = None,
        *,
        checkpoint: Callable[..., Any] | None = None,
        inputs: list[Tensor] | None = None,
    ) -> tuple[Tensor, HopeState]:
        """x (B, T, width) to the normalised output and the state after it.

        checkpoint  calls a block so that the backward pass recomputes it: `torch.utils.checkpoint.checkpoint`
        inputs      a list to collect what each block reads
        """
        states: list[State] = []
        for number, block in enumerate(self.layers):
            if inputs is not None:
                inputs.append(x)
            before = None if state is None else state.layers[number]
            x, after = block(x, before) if checkpoint is None else checkpoint(block, x, before)
            states.append(after)
        return self.norm(x), HopeState(tuple(states))

    def renewed(self, state: HopeState) -> HopeState:
        """``state`` to read on from after a training step: what is not a state of the stream is as it is now."""
        pairs = zip(self.layers, state.layers, strict=True)
        return HopeState(
            tuple(b.mixer.renewed(s) if isinstance(b.mixer, SelfModifyingLayer) else s for b, s in pairs)  # pyright: ignore[reportArgumentType]
        )

    def restart(self, fired: set[float]) -> None:
        """See `Continuum.restart`."""
        for block in self.layers:
            block.cms.restart(fired)

    def parameter_levels(self) -> dict[nn.Parameter, Level]:
        """The level of every parameter that belongs to one."""
        return {
            parameter: level
            for block in self.layers
            for level, mlp in block.cms.by_level()
            for parameter in mlp.parameters()
        }
