"""Which parameter goes to which optimizer, level and weight decay. Nothing is skipped: every parameter has a group.

kind       what it is                                              decays
matrix     linear and convolution weights                          yes
head       the output embedding, where it is not tied              yes
embedding  the input embedding (tied or not)                       no
state      a fast weight's initial state, (heads, out, in)         no
gate       read-outs of the rate and the retention, rate scales    no
vector     norms, biases, scalars: anything below two dimensions   no
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from nestlearn.errors import UserError

KINDS = ("matrix", "head", "embedding", "state", "gate", "vector")
DECAYING = frozenset({"matrix", "head"})
_GATES = frozenset({"rate_read", "retain_read", "rate_scale"})  # attribute names in memory/self_modifying.py


def parameter_groups(
    model: nn.Module, *, lr: float | None = None, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Groups for ``Leveled`` or any torch optimizer: one for each (period, kind, learning-rate scale).

    lr            learning rate at scale 1, > 0; None leaves it to the optimizer
    weight_decay  of the kinds that decay, >= 0; None leaves it to the optimizer. The other kinds get 0

    Periods (tokens) and scales come from the model's ``parameter_periods()`` and ``parameter_lr_scales()``, where it
    has them; elsewhere they are 1. A parameter with ``requires_grad=False`` has the period inf.
    Each group holds params, param_names, kind, period, lr_scale, and lr and weight_decay unless left to the optimizer.

    Raises UserError for a parameter that the model's own tables forget, and for scales without an lr to scale.
    """
    periods, scales = _table(model, "parameter_periods"), _table(model, "parameter_lr_scales")
    kinds = _kinds(model)
    groups: dict[tuple[float, int, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        period = periods[name] if parameter.requires_grad else math.inf
        key = (period, KINDS.index(kinds[name]), scales[name])
        if key not in groups:
            groups[key] = _new_group(period, kinds[name], scales[name], lr, weight_decay)
        groups[key]["params"].append(parameter)
        groups[key]["param_names"].append(name)
    return [groups[key] for key in sorted(groups)]


def parameter_table(groups: Iterable[dict[str, Any]]) -> str:
    """The groups as a table to print: one line each, and the total."""
    rows = [("period", "kind", "lr ×", "decay", "tensors", "parameters", "for example")]
    total = 0
    for group in groups:
        count = sum(p.numel() for p in group["params"])
        total += count
        decay = group.get("weight_decay", "optimizer's")
        period = "never" if group["period"] == math.inf else f"{group['period']:,.0f}"
        rows.append((period, group["kind"], f"{group['lr_scale']:g}", f"{decay}", f"{len(group['params'])}",
                     f"{count:,}", group["param_names"][0]))  # fmt: skip
    rows.append(("", "total", "", "", "", f"{total:,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _new_group(period: float, kind: str, scale: float, lr: float | None, decay: float | None) -> dict[str, Any]:
    group: dict[str, Any] = {"params": [], "param_names": [], "kind": kind, "period": period, "lr_scale": scale}
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
    table = getattr(model, method)()
    forgotten = [name for name in names if name not in table]
    if forgotten:
        raise UserError(f"{type(model).__name__}.{method}() lacks {forgotten[0]!r}: it must name every parameter")
    return table


def _kinds(model: nn.Module) -> dict[str, str]:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head_id = None if head is None else id(head.weight)
    kinds = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if id(parameter) in embeddings:
            kinds[name] = "embedding"
        elif id(parameter) == head_id:
            kinds[name] = "head"
        elif "initial" in parts:
            kinds[name] = "state"
        elif not _GATES.isdisjoint(parts):
            kinds[name] = "gate"
        else:
            kinds[name] = "matrix" if parameter.ndim >= 2 else "vector"
    return kinds
