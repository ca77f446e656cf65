"""Levels for a pretrained model, without training it anew (NL §7.3): `stack_levels`, `unstack`, `load_stacked`.

by="depth"   the MLP blocks are dealt out to the levels: those next to the output are the fastest, those next to the
             input the slowest. No parameter is added, nothing is moved: a level is a pace.
by="chain"   every MLP becomes a chain of all levels (`level_chain.py`), which starts as the MLP itself, bit for bit.

Between steps the paces are `nestlearn.optim.Leveled`'s affair, which reads them from the model:

    stack_levels(model, periods=[512, 2048, 8192, math.inf])
    optimizer = Leveled(partial(torch.optim.AdamW, lr=1e-4), parameter_groups(model))

The levels stand in ``model.config.nested_levels``, so that ``save_pretrained`` keeps them. It writes the weights under
the names that they have in the model, which Hugging Face's loader takes too, not in the format of the first release.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import nn

from nestlearn.errors import UserError, suggest
from nestlearn.levels import Level, parse_levels
from nestlearn.models.level_chain import LevelChain
from nestlearn.models.mlp_blocks import MLPBlock, chain_in, chain_out, find_mlps
from nestlearn.optim.groups import HEADS

DEFAULT_PERIODS = (512, 2048, 8192, math.inf)
BY = ("depth", "chain")
_KEY = "nested_levels"  # in the model's config
_METHODS = ("parameter_periods", "parameter_lr_scales")
_GIVEN = (*_METHODS, "save_pretrained")
Model = TypeVar("Model", bound=nn.Module)


def stack_levels(
    model: Model,
    periods: Iterable[Level | Mapping[str, Any] | tuple | float] = DEFAULT_PERIODS,
    by: str = "depth",
    *,
    rest: float = math.inf,
    shares: Sequence[int] | None = None,
) -> Model:
    """Gives the MLP blocks of a Hugging Face model levels; returns the model itself, changed in place.

    periods  tokens between two changes of a level, or whole levels as `Level`, fastest first; inf never changes
    by       "depth" or "chain", as above
    rest     period of everything outside the MLP blocks, tokens; inf: the levels are all that learns. The head of a
             classifier, which no pretrained model brings, has the period 1

    shares   by depth only: how many MLP blocks each level gets, fastest first, their sum all blocks; None: equal shares

    A parameter that does not require a gradient never changes, whatever its level. Stack after adapters (PEFT) are put
    in, as these freeze what they find. Raises UserError for a model without MLP blocks that are known, with fewer
    blocks than levels, or that has levels already.
    """
    if by not in BY:
        raise UserError(f"by is {by!r}: must be 'depth' or 'chain'{suggest(str(by), BY)}")
    if any(hasattr(model, name) for name in _METHODS):
        raise UserError(f"{type(model).__name__} has levels already: unstack(model) first, if stack_levels gave them")
    levels = parse_levels(periods)
    outside = Level("rest", rest).period
    blocks = find_mlps(model)
    settings: dict[str, Any] = {"by": by, "levels": [level.to_dict() for level in levels], "rest": _plain(outside)}
    if by == "depth":
        settings["shares"] = _shares(len(blocks), len(levels), shares)
    elif shares is None:
        _chain(blocks, levels)
    else:
        raise UserError(
            f'shares is {list(shares)}: a chain has every level in every block, leave it out or use by="depth"'
        )
    setattr(_config(model), _KEY, settings)
    cast(Any, model).parameter_periods = MethodType(_periods, model)
    cast(Any, model).parameter_lr_scales = MethodType(_lr_scales, model)
    cast(Any, model).save_pretrained = MethodType(_save, model)
    return model


def unstack(model: Model) -> Model:
    """The model without levels, changed in place. A chain gives its pretrained MLP back, whatever its levels learned.

    By depth nothing was added, so what the levels learned stays. Raises UserError for a model without levels.
    """
    if _settings(model)["by"] == "chain":
        for block in find_mlps(model):
            chain_out(block, cast(LevelChain, block.modules[0]).give_back())
    delattr(_config(model), _KEY)
    for name in _GIVEN:
        delattr(model, name)
    return model


def load_stacked(model_class: Any, folder: str | Path) -> Any:
    """What ``save_pretrained`` wrote of a stacked model, with its levels, in evaluation mode.

    model_class  its class, or an Auto class such as ``AutoModelForCausalLM``
    Raises UserError for a folder whose config has no levels, or whose weights are not those of the model.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    settings = getattr(config, _KEY, None)
    if settings is None:
        raise UserError(f"{folder}: its config.json has no {_KEY}: save a model after stack_levels(model)")
    build = getattr(model_class, "from_config", None) or model_class._from_config
    delattr(config, _KEY)
    model = build(config, dtype=config.dtype or torch.float32)
    stack_levels(model, settings["levels"], settings["by"], rest=settings["rest"], shares=settings.get("shares"))
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        weights |= load_file(file)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    _refuse_other_weights(folder, [*unexpected, *_untied(model, missing)])
    return model.eval()


def stacked_levels(model: nn.Module) -> dict[Level, list[str]]:
    """Each level, fastest first, with the names of its parameters in the model: by="chain", those of its Δ."""
    settings, blocks = _settings(model), find_mlps(model)
    levels = parse_levels(settings["levels"])
    if settings["by"] == "depth":
        return {level: [name for block in own for name in block.parameter_names()]
                for level, own in zip(levels, _deal(blocks, settings["shares"]), strict=True)}  # fmt: skip
    names = [name for block in blocks for name in block.parameter_names()]
    return {level: [name for name in names if f".deltas.{level.name}." in name] for level in levels}


def _shares(count: int, levels: int, shares: Sequence[int] | None) -> list[int]:
    """How many of ``count`` blocks each level gets: equal shares, what is over to the slowest, unless given."""
    if shares is None:
        if count < levels:
            raise UserError(f"the model has {count} MLP blocks, fewer than the {levels} levels: give at most {count}")
        return [count // levels + (i >= levels - count % levels) for i in range(levels)]
    if len(shares) != levels or sum(shares) != count or min(shares) < 1:
        raise UserError(
            f"shares is {list(shares)}: must be {levels} whole numbers, one for each level, at least 1, that sum to "
            f"the model's {count} MLP blocks"
        )
    return list(shares)


def _deal(blocks: list[MLPBlock], shares: Sequence[int]) -> list[list[MLPBlock]]:
    """The blocks of each level, fastest first: from the output down."""
    ends = [len(blocks) - sum(shares[:i]) for i in range(len(shares) + 1)]
    return [blocks[low:high] for high, low in pairwise(ends)]


def _chain(blocks: list[MLPBlock], levels: tuple[Level, ...]) -> None:
    done: list[MLPBlock] = []
    try:
        for block in blocks:
            chain_in(block, lambda mlp: LevelChain(mlp, levels))
            done.append(block)
    except UserError:
        for block in done:
            chain_out(block, cast(LevelChain, block.modules[0]).give_back())
        raise


def _save(model: Any, *args: Any, **options: Any) -> Any:
    """The model's own save_pretrained."""
    return type(model).save_pretrained(model, *args, **{"save_original_format": False, **options})


def _periods(model: nn.Module) -> dict[str, float]:
    """Period in tokens of every parameter (`parameter_groups` and `Leveled` read it)."""
    rest, heads = float(_settings(model)["rest"]), _class_heads(model)
    table = {name: 1.0 if id(p) in heads else rest for name, p in model.named_parameters()}
    if _settings(model)["by"] == "chain":
        table |= dict.fromkeys((name for block in find_mlps(model) for name in block.parameter_names()), math.inf)
    return table | {name: level.period for level, names in stacked_levels(model).items() for name in names}


def _lr_scales(model: nn.Module) -> dict[str, float]:
    """Learning-rate scale of every parameter: 1 outside the levels."""
    table = {name: 1.0 for name, _ in model.named_parameters()}
    return table | {name: level.lr_scale for level, names in stacked_levels(model).items() for name in names}


def _class_heads(model: nn.Module) -> set[int]:
    """The parameters of output layers that are not the vocabulary's."""
    words = getattr(model, "get_output_embeddings", lambda: None)()
    heads = [m for n, m in model.named_modules() if n.rpartition(".")[2] in HEADS and m is not words]
    return {id(p) for head in heads for p in head.parameters()}


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise UserError(f"{type(model).__name__} has no config to keep the levels in: give a Hugging Face model")
    return config


def _settings(model: nn.Module) -> dict[str, Any]:
    settings = getattr(getattr(model, "config", None), _KEY, None)
    if settings is None:
        raise UserError(f"{type(model).__name__} has no levels: give them with stack_levels(model)")
    return settings


def _untied(model: nn.Module, missing: list[str]) -> list[str]:
    """Those of the missing names that no present name is tied to."""
    table = dict(model.named_parameters(remove_duplicate=False))
    present = {id(p) for name, p in table.items() if name not in missing}
    return [name for name in missing if name not in table or id(table[name]) not in present]


def _refuse_other_weights(folder: str | Path, names: list[str]) -> None:
    if names:
        raise UserError(
            f"{folder}: {len(names)} weights are not those of the model, for example {names[0]}: "
            "load it with the class that it was saved from"
        )


def _plain(period: float) -> float | str:
    return "inf" if period == math.inf else int(period)
