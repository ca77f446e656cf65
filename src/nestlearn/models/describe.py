"""The table of levels: every component of a model with its period, objective, context, parameters and rule."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

from nestlearn.memory import LinearMemory, TitansMemory
from nestlearn.models.hope import HopeBackbone, mixers_in_turn
from nestlearn.models.memory_layer import SelfModifyingLayer

_BASELINES = {  # component, inner objective and rule of the mixers with one memory and nothing that generates for it
    "gated_delta": ("matrix memory", "½‖S k − v‖²", "gated delta rule"),
    "retnet": ("matrix memory", "−⟨S k, v⟩", "Hebbian rule, fixed retention"),
    "deltanet": ("matrix memory", "½‖S k − v‖²", "delta rule"),
    "gated_deltanet": ("matrix memory", "½‖S k − v‖²", "gated delta rule"),
    "titans": ("memory", "½‖M(k) − v‖²", "gradient descent, gated momentum"),
    "ttt_mlp": ("memory", "½‖M(k) − v‖²", "gradient descent"),
    "mamba2": ("state space", "−⟨S k, v⟩", "Hebbian rule, selective retention"),
}

_MEMORY_OBJECTIVES = {"dot": "−⟨M(k), v̂⟩", "l2": "½‖M(k) − v̂‖²", "mix": "½ λ ‖M(k)‖² − ⟨M(k), v̂⟩"}


class LevelRow(NamedTuple):
    """One line of the table of levels: what changes, how often (tokens), by which objective, from which context."""

    component: str
    period: float
    objective: str
    context: str
    parameters: int
    rule: str


def level_table(model: nn.Module, backbone: HopeBackbone) -> list[LevelRow]:
    """Every component of a model, fastest first; parameters are counted over all layers and add up to the whole.

    A period of NaN means every optimizer step, whose length in tokens the model does not know.
    """
    fast, slow = _mixer_rows(backbone), _cms_rows(backbone)
    rest = count(model) - sum(row.parameters for row in (*fast, *slow))
    other = LevelRow("projections, embedding, norms", math.nan, "next-token loss", "training tokens", rest, "gradient")
    return [*fast, other, *slow]


def count(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def _mixer_rows(backbone: HopeBackbone) -> list[LevelRow]:
    if backbone.shape.mixer == "self_modifying":
        return _memory_rows(backbone)
    return [row for mixer in mixers_in_turn(backbone.shape.mixer) for row in _baseline_rows(backbone, mixer)]


def _baseline_rows(backbone: HopeBackbone, mixer: str) -> list[LevelRow]:
    window = _attention_row(f"the last {backbone.shape.window} tokens")
    if mixer in ("attention", "transformer"):
        return [_attention_row("all tokens so far")]
    if mixer == "window_attention":
        return [window]
    kind, _, hybrid = mixer.partition("titans_")
    component, objective, rule = _BASELINES[kind or "titans"]
    size = sum(count(module) for module in backbone.modules() if isinstance(module, LinearMemory | TitansMemory))
    row = LevelRow(component, 1, objective, "tokens of the stream", size, rule)
    return [row, window] if hybrid else [row]


def _attention_row(context: str) -> LevelRow:
    return LevelRow("attention (non-parametric)", 1, "Nadaraya–Watson regression", context, 0, "softmax")


def _memory_rows(backbone: HopeBackbone) -> list[LevelRow]:
    c = backbone.shape.memory
    objective = _MEMORY_OBJECTIVES[c.objective]
    rule = ("DGD" if c.dgd else "gradient descent") + (f", momentum {c.momentum}" if c.momentum else "")
    mixers = [block.mixer for block in backbone.layers if isinstance(block.mixer, SelfModifyingLayer)]
    rows = []
    for name in reversed(c.names):
        label, period = ("memory", 1) if name == "memory" else (f"M_{name}", c.chunk)
        size = sum(count(mixer.memory.initial[name]) for mixer in mixers)
        if name in c.written:
            rows.append(LevelRow(label, period, objective, "tokens of the stream", size, rule))
        else:
            rows.append(LevelRow(label, math.inf, "none in context", "none", size, "static"))
    return rows


def _cms_rows(backbone: HopeBackbone) -> list[LevelRow]:
    sizes = dict.fromkeys(backbone.shape.levels, 0)
    for block in backbone.layers:
        for level, mlp in block.cms.by_level():
            sizes[level] += count(mlp)
    return [
        LevelRow(f"CMS {level.name}", level.period, "next-token loss", "training tokens", size, "gradient")
        for level, size in sizes.items()
    ]
