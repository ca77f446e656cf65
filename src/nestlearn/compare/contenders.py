"""Who takes part: names to model settings, and the feed-forward width that makes all of them equally large.

    parameters(F) = a + b F        F = intermediate_size, the summed hidden width of the CMS or the one MLP

a and b are counted, not derived: a model is built without memory twice. What a mixer costs more, its MLP gets less.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nestlearn.errors import UserError, suggest
from nestlearn.models.hope import ALIASES, CONTINUUM_MIXERS, MIXER_NAMES, mixer_name
from nestlearn.train.build import build_model, hope_config
from nestlearn.train.config import TrainConfig

TOLERANCE = 0.02  # of the parameters asked for
# Of the optimizer, between two steps of each of HOPE's levels; one MLP elsewhere. In a short run slow levels step more
# often, so that each steps this many times: a level that hardly learned would say nothing of HOPE.
LEVEL_STEPS = {"fast": 1, "middle": 4, "slow": 16}
FEWEST_STEPS = 64
_DIVISIBLE = 2520  # by any number of levels up to ten


@dataclass(frozen=True)
class Contender:
    """A model that takes part. ``label`` as it was named; ``config`` is complete but for rate, tokens and seed."""

    label: str
    config: TrainConfig
    parameters: int

    @property
    def width(self) -> int:
        return self.config.model["intermediate_size"]


def known_names() -> list[str]:
    """hope and hope_attention, with three levels; transformer and every other mixer, with one."""
    return [*ALIASES, *(name for name in MIXER_NAMES if name not in CONTINUUM_MIXERS)]


def split_labels(words: Iterable[str]) -> tuple[str, ...]:
    """ "hope,titans" "hope:levels=[1],memory.momentum=0.9" -> three labels.

    Commas separate names, and the settings of a name; what has an "=" before any ":" belongs to the name before it.
    """
    labels: list[str] = []
    for word in words:
        for piece in (piece.strip() for piece in _split(word)):
            name = re.split(r"[:=]", piece, maxsplit=1)[0]
            if piece[len(name) : len(name) + 1] == "=" and labels:
                labels[-1] += ("," if ":" in labels[-1] else ":") + piece
            elif piece:
                labels.append(piece)
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"--models names {label} twice: name each model once")
    if not labels:
        raise UserError(f"--models names no model: known are {', '.join(known_names())}")
    return tuple(labels)


def enter(label: str, base: TrainConfig, params: int, vocab_size: int) -> Contender:
    """The model of that label at ``params`` parameters. UserError for unknown names and settings; where none fits."""
    return _sized(label, configured(label, base), params, vocab_size)


def configured(label: str, base: TrainConfig) -> TrainConfig:
    """The settings of the model of that label, but for its feed-forward width."""
    name, _, settings = label.partition(":")
    config = dataclasses.replace(base, name=label, model=named_model(name, base))
    given = [setting.strip() for setting in _split(settings)] if settings else []
    for setting in given:
        key, equals, _ = setting.partition("=")
        if not equals:
            raise UserError(f"--models {label}: {setting!r} has no '=': write NAME:key=value,key=value")
        if key in ("intermediate_size", "hidden_size", "num_hidden_layers"):
            raise UserError(f"--models {label}: {key} is the same for all or solved for --params, leave it out")
    return config.replace(f"model.{setting}" for setting in given)


def named_model(name: str, base: TrainConfig) -> dict[str, Any]:
    """Keyword arguments of HopeConfig: the shape of all, the mixer and the levels of this one.

    HOPE's memories have half as many hidden units as a head is wide, so that more is left for its MLPs.
    """
    mixer, known = mixer_name(name), known_names()
    if mixer not in MIXER_NAMES:
        raise UserError(f"--models names {name!r}{suggest(name, known)}: known are {', '.join(known)}")
    if mixer not in CONTINUUM_MIXERS:
        return base.model | {"mixer": mixer, "levels": [1]}
    hope: dict[str, Any] = {"levels": _levels(base)} | base.model | {"mixer": mixer}
    if mixer == "self_modifying":
        head_width = hope["hidden_size"] // hope["num_attention_heads"]
        hope["memory"] = {"hidden_width": max(1, head_width // 2)} | (hope.get("memory") or {})
    return hope


def _levels(base: TrainConfig) -> list[dict[str, Any]]:
    slowest = max(1, base.tokens // base.tokens_per_step // FEWEST_STEPS)
    return [{"name": name, "period": base.tokens_per_step * min(steps, slowest)} for name, steps in LEVEL_STEPS.items()]


def with_shape(labels: Iterable[str], base: TrainConfig, params: int, vocab_size: int) -> TrainConfig:
    """The base with depth and width for all models, where it has none of its own.

    L ≈ D / 64, heads of width 64, V D + 12 L D² ≈ ``params``, which is a Transformer whose MLP has 8/3 D hidden units;
    then the widest D up to there at which every model has room for an MLP of D / 4.
    """
    layers = _whole(base.model, "num_hidden_layers", max(2, round((params / (12 * 64**2)) ** (1 / 3))))
    width = (math.sqrt(vocab_size**2 + 48 * layers * params) - vocab_size) / (24 * layers)
    if "hidden_size" in base.model:
        return _shaped(base, layers, _whole(base.model, "hidden_size", 0))
    labels = list(labels)
    for hidden in reversed(_widths(width)):
        shaped = _shaped(base, layers, hidden)
        if all(_fits(configured(label, shaped), params, vocab_size) for label in labels):
            return shaped
    raise UserError(
        f"--params {params:,} is too few for {', '.join(labels)} even at width {_widths(width)[0]}: ask for more, or "
        "--set model.hidden_size and model.num_hidden_layers"
    )


def _fits(config: TrainConfig, params: int, vocab_size: int) -> bool:
    least = _least_width(config, vocab_size)
    width = least * math.ceil(config.model["hidden_size"] / 4 / least)
    return count(_with_width(config, width), vocab_size) <= params


def _whole(model: Mapping[str, Any], key: str, default: int) -> int:
    value = model.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"model.{key} is {value!r}: must be a whole number, at least 1")
    return value


def _shaped(base: TrainConfig, layers: int, hidden: int) -> TrainConfig:
    shape = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 64),
        "initializer_range": hidden**-0.5,
    }
    return dataclasses.replace(base, model=shape | base.model)


def _widths(nearest: float) -> list[int]:
    """Multiples of 64 and, below, of 16."""
    small = [width for width in (16, 32, 48) if width <= max(nearest, 16)]
    return small + [64 * n for n in range(1, max(1, round(nearest / 64)) + 1) if nearest >= 48]


def count(config: TrainConfig, vocab_size: int) -> int:
    """Parameters, shared ones once; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config, vocab_size).parameters())


def _sized(label: str, config: TrainConfig, params: int, vocab_size: int) -> Contender:
    least = _least_width(config, vocab_size)
    fixed = count(_with_width(config, least), vocab_size)
    slope = (count(_with_width(config, 2 * least), vocab_size) - fixed) / least  # of one more hidden unit
    steps = round((params - fixed) / slope / least)
    if steps < 0:
        raise UserError(
            f"--models {label}: has {fixed:,} parameters at the least feed-forward width, more than --params "
            f"{params:,}: ask for more, or --set model.hidden_size below {config.model['hidden_size']}"
        )
    config = _with_width(config, least + steps * least)
    size = count(config, vocab_size)
    if abs(size / params - 1) > TOLERANCE:
        raise UserError(
            f"--models {label}: has {size:,} parameters at the nearest feed-forward width, not within {TOLERANCE:.0%} "
            f"of --params {params:,}: ask for more, or --set a smaller model.hidden_size or model.num_hidden_layers"
        )
    return Contender(label, config, size)


def _least_width(config: TrainConfig, vocab_size: int) -> int:
    """One hidden unit in each level; multiples of it serve levels that must be equal, too."""
    levels = config.model["levels"]
    if isinstance(levels, list) and any(isinstance(level, dict) and level.get("hidden_size") for level in levels):
        raise UserError("levels name a hidden_size, but the width is solved for --params: leave hidden_size out")
    return len(hope_config(_with_width(config, _DIVISIBLE), vocab_size).levels)


def _with_width(config: TrainConfig, width: int) -> TrainConfig:
    return dataclasses.replace(config, model=config.model | {"intermediate_size": width})


def _split(text: str) -> list[str]:
    """At commas outside brackets and quotes."""
    pieces, depth, quoted = [""], 0, False
    for letter in text:
        quoted ^= letter == '"'
        depth += 0 if quoted else (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0 and not quoted:
            pieces.append("")
        else:
            pieces[-1] += letter
    return pieces
