"""Which parameter goes to which optimizer, level and weight decay. Nothing is skipped: every parameter has a group.

kind       what it is                                                  rule      decays
matrix     linear and convolution weights                              memory    yes
head       the output layer, where it is not tied to the embedding     adamw     yes
filter     depthwise and one-dimensional convolutions                  adamw     yes
embedding  tokens and positions (a tied head is one)                   adamw     no
state      a fast weight's initial state, (heads, out, in)             memory *  no
gate       read-outs of the rate and the retention, rate scales        adamw     no
vector     norms, biases, scalars: whatever else is not a matrix       adamw     no

rule: "memory" is the optimizer's own, for whatever it is a memory of gradients as matrices; "adamw" is AdamW, which
every optimizer of `nestlearn.optim` has on board (and which torch's optimizers, who ignore the key, do not need).
* as a batch of matrices; ``states="adamw"`` gives them to AdamW. A filter is no matrix: its rows are a few numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from nestlearn.errors import UserError, suggest

KINDS = ("matrix", "head", "filter", "embedding", "state", "gate", "vector")
DECAYING = frozenset({"matrix", "head", "filter"})
MEMORIES = frozenset({"matrix", "state"})
HEADS = frozenset({"head", "lm_head", "classifier", "score", "qa_outputs"})  # what output layers are called
_GATES = frozenset({"rate_read", "retain_read", "rate_scale"})  # attribute names in memory/self_modifying.py


def parameter_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    adamw_lr: float | None = None,
    states: str = "memory",
    heads: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Groups for any optimizer of `nestlearn.optim`, ``Leveled`` or torch: one for each (period, kind, lr scale).

    lr            learning rate at scale 1, > 0; None leaves it to the optimizer
    weight_decay  of the kinds that decay, >= 0; None leaves it to the optimizer. The other kinds get 0
    adamw_lr      learning rate of the groups with the rule "adamw", > 0; None: ``lr``
    states        rule of the fast weights' initial states: "memory" (a batch of matrices) or "adamw"
    heads         modules, by their names in the model, whose weights are output layers, besides the model's
                  ``get_output_embeddings()`` and those that are called head, lm_head, classifier, score or qa_outputs

    Periods (tokens) and scales come from the model's ``parameter_periods()`` and ``parameter_lr_scales()``, where it
    has them; elsewhere they are 1. A parameter with ``requires_grad=False`` has the period inf. A tied parameter is
    there once, under its first name. Each group holds params, param_names, kind, rule, period, lr_scale, and lr and
    weight_decay unless left to the optimizer.

    Raises UserError for a parameter that the model's own tables forget, for scales without an lr to scale, for a head
    that the model does not have, and for a rule of states that does not exist.
    """
    if states not in ("memory", "adamw"):
        raise UserError(f"states is {states!r}: must be 'memory' or 'adamw'{suggest(str(states), ('memory', 'adamw'))}")
    periods, scales = _table(model, "parameter_periods"), _table(model, "parameter_lr_scales")
    kinds = _kinds(model, _known_heads(model, heads))
    groups: dict[tuple[float, int, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        period, kind = periods[name] if parameter.requires_grad else math.inf, kinds[name]
        key = (period, KINDS.index(kind), scales[name])
        if key not in groups:
            rule = "adamw" if kind not in MEMORIES or (kind == "state" and states == "adamw") else "memory"
            rate = adamw_lr if rule == "adamw" and adamw_lr is not None else lr
            groups[key] = _new_group(period, kind, rule, scales[name], rate, weight_decay)
        groups[key]["params"].append(parameter)
        groups[key]["param_names"].append(name)
    return [groups[key] for key in sorted(groups)]


def parameter_table(groups: Iterable[dict[str, Any]]) -> str:
    """The groups as a table to print: one line each, and the total."""
    rows = [("period", "kind", "rule", "lr ×", "decay", "tensors", "parameters", "for example")]
    total = 0
    for group in groups:
        count = sum(p.numel() for p in group["params"])
        total += count
        decay = group.get("weight_decay", "optimizer's")
        period = "never" if group["period"] == math.inf else f"{group['period']:,.0f}"
        rows.append((period, group["kind"], group["rule"], f"{group['lr_scale']:g}", f"{decay}",
                     f"{len(group['params'])}", f"{count:,}", group["param_names"][0]))  # fmt: skip
    rows.append(("", "total", "", "", "", "", f"{total:,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _new_group(
    period: float, kind: str, rule: str, scale: float, lr: float | None, decay: float | None
) -> dict[str, Any]:
    group: dict[str, Any] = {"params": [], "param_names": [], "kind": kind, "rule": rule, "period": period}
    group["lr_scale"] = scale
    if lr is not None:
        group["lr"] = lr * scale
    elif scale != 1:
        raise UserError(f"a level has the learning-rate scale {scale}, but there is no rate to scale: give lr=...")
    if kind not in DECAYING:
        group["weight_decay"] = 0.0
    elif decay is not None:
        group["weight_decay"] = decay
    return group


def _table(model: nn.Module, method: str) -> dict[str, float]:
    """The model's own table of one number per parameter, checked to be complete; ones where it has none."""
    names = [name for name, _ in model.named_parameters()]
    if not hasattr(model, method):
        return dict.fromkeys(names, 1.0)
    bound = getattr(model, method)
    owner, table = getattr(bound, "__self__", model), bound()
    if owner is not model:  # a wrapper, PEFT's for example, passes on what the model within says under its own names
        theirs = {id(p): table[name] for name, p in owner.named_parameters() if name in table}
        table = {name: theirs[id(p)] for name, p in model.named_parameters() if id(p) in theirs}
    forgotten = [name for name in names if name not in table]
    if forgotten:
        raise UserError(f"{type(model).__name__}.{method}() lacks {forgotten[0]!r}: it must name every parameter")
    return table


def _known_heads(model: nn.Module, heads: Iterable[str]) -> set[int]:
    """The ids of the parameters of all output layers."""
    modules = dict(model.named_modules())
    for head in heads:
        if head not in modules:
            raise UserError(f"heads names {head!r}, which the model does not have{suggest(head, list(modules))}")
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    found = [modules[head] for head in heads] + ([] if embeddings is None else [embeddings])
    found += [module for name, module in modules.items() if name.rpartition(".")[2] in HEADS]
    return {id(p) for module in found for p in module.parameters(recurse=False)}


def _kinds(model: nn.Module, heads: set[int]) -> dict[str, str]:
    """The kind of every parameter. What a module is decides; what a parameter is called, where a module does not say.

    A parameter that several modules share is in ``named_parameters`` once, so a table by id may see it several times.
    """
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
                  for p in m.parameters(recurse=False)}  # fmt: skip
    kinds = {}
    for name, parameter in model.named_parameters():
        own = id(parameter)
        if own in embeddings:
            kinds[name] = "embedding"
        elif own in heads and parameter.ndim >= 2:
            kinds[name] = "head"
        else:
            kinds[name] = _kind(name.split("."), parameter, owners[own])
    return kinds


def _kind(parts: list[str], parameter: nn.Parameter, owner: nn.Module) -> str:
    if "initial" in parts:
        return "state"
    if not _GATES.isdisjoint(parts):
        return "gate"
    if parameter.ndim < 2 or "bias" in parts[-1] or "Norm" in type(owner).__name__:
        return "vector"
    if any(word in parts[-1] for word in ("embed", "token", "position")):  # cls_token, pos_embed, position_embeddings
        return "embedding"
    return "filter" if _is_filter(parts, parameter, owner) else "matrix"


def _is_filter(parts: list[str], parameter: nn.Parameter, owner: nn.Module) -> bool:
    """Depthwise or one-dimensional, torch's own or a module called conv, as `models/memory_layer.py` has one."""
    if isinstance(owner, _ConvNd):
        return parameter.ndim == 3 or parameter.shape[1] == 1 < owner.groups
    return parts[-2:-1] == ["conv"] and parameter.ndim < 4
