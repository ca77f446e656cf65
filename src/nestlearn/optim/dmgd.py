"""DMGD: one MLP for all matrices of one row size is the momentum, and learns on their gradients (NL Eq. 50–52)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nestlearn.optim.base import MemoryOptimizer, _apply, has_gradient
from nestlearn.optim.checks import check_choice, check_count, check_decay, check_number
from nestlearn.optim.functions import Functions
from nestlearn.optim.matrices import stack, whole
from nestlearn.rules.dmgd import FEATURE_MAPS, OBJECTIVES, OUTPUTS, Memory, learn, literal_step, recall, unit_rows
from nestlearn.rules.dmgd import unit_step as normalised_step

STEP_RMS = 0.2  # of an AdamW step, so that its learning rates carry over


class DMGD(MemoryOptimizer):
    """Deep momentum gradient descent, ``W ← (1 − lr λ) W + lr σ(m(φ(u)))``; ``rules/dmgd.py`` has m and its update.

    lr           step size, >= 0
    decay        α in [0, 1), of the memory towards its initial weights (``scale="literal"``: towards zero)
    memory_lr    η >= 0, of the memory; with the objective "l2" keep it below 2
    hidden       width of the memory, >= 1. It costs 12 · hidden operations per parameter and step
    objective    "l2" (m learns to reproduce −u) or "dot" (m aligns with −u)
    output       σ: "none", "tanh" or "newton_schulz" (``ns_steps`` iterations)
    feature_map  φ of the keys: None, "unit", "signed_sqrt", or a function of rows (rows, in) -> (rows, keys)
    scale        "rms": u is the gradient over the root mean square length of its matrix' rows, and every matrix' step
                 has the root mean square 0.2 lr of an AdamW step (about that for the two non-linear outputs).
                 "literal": u = g, the step is lr σ(m(u)), the objective a sum over rows; nothing is bounded
    seed         of the memory's initial w2 ~ N(0, 1); w1 starts at 0. The global generator is not touched

    State: the first parameter of its row size that has a gradient holds the memory for all of them, whole on every
    rank: ``w1`` (in, hidden), ``w2`` (hidden, keys), and ``w2_start``. All others hold a step count only.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *,
        decay: float = 0.9,
        memory_lr: float = 1.0,
        hidden: int = 64,
        objective: str = "l2",
        output: str = "none",
        feature_map: str | Callable[[Tensor], Tensor] | None = None,
        scale: str = "rms",
        ns_steps: int = 5,
        seed: int = 0,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        self._functions = Functions({"feature_map": {"none": _same} | FEATURE_MAPS})
        options = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "seed": seed, "scale": scale}
        options |= {"decay": decay, "memory_lr": memory_lr, "hidden": hidden, "objective": objective}
        super().__init__(params, options | {"output": output, "ns_steps": ns_steps, "feature_map": feature_map})

    def _check(self, group: dict[str, Any], where: str) -> None:
        check_decay(where, "decay", group["decay"])
        check_number(where, "memory_lr", group["memory_lr"], low=0)
        check_choice(where, "objective", group["objective"], OBJECTIVES)
        check_choice(where, "output", group["output"], OUTPUTS)
        check_choice(where, "scale", group["scale"], ("rms", "literal"))
        check_count(where, "hidden", group["hidden"])
        check_count(where, "ns_steps", group["ns_steps"])
        chosen = group["feature_map"]
        group["feature_map"] = self._functions.name(where, "feature_map", "none" if chosen is None else chosen)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_functions": self._functions}

    def _buckets(self, group: dict[str, Any]) -> Iterator[list[Tensor]]:
        """All parameters of one row size together: they share a memory."""
        if group["rule"] != "memory":
            yield from super()._buckets(group)
            return
        classes: dict[tuple, list[Tensor]] = {}
        for p in filter(has_gradient, group["params"]):
            classes.setdefault(_row_class(p), []).append(p)
        yield from classes.values()

    @torch.compiler.disable(recursive=False)
    def _step_bucket(
        self, group: dict[str, Any], parameters: list[Tensor], finite: Tensor | None, tokens: int | None
    ) -> None:
        if group["rule"] != "memory":
            super()._step_bucket(group, parameters, finite, tokens)
            return
        alike = _by_shape(parameters)
        grads = [_gradients(own, group["maximize"]) for own in alike]
        units = [unit_rows(g) if group["scale"] == "rms" else g for g in grads]
        rows = torch.cat([u.flatten(0, 1) for u in units])
        keys = self._functions("feature_map", group["feature_map"])(rows)
        memory = self._learn(group, parameters, keys, rows, finite)
        recalled = recall(memory, keys).split([u.shape[0] * u.shape[1] for u in units])
        for own, unit, part in zip(alike, units, recalled, strict=True):
            update = _step(group, part.reshape(unit.shape))
            _apply(group, own, update if finite is None else torch.where(finite, update, 0), finite)

    def _learn(
        self, group: dict[str, Any], parameters: list[Tensor], keys: Tensor, rows: Tensor, finite: Tensor | None
    ) -> Memory:
        owner = self._owner(group, parameters)
        state = self.state[owner] if "w1" in self.state[owner] else _initial_memory(group, keys, rows)
        before = Memory(state["w1"], state["w2"])
        start = Memory(torch.zeros_like(before.w1), state.get("w2_start", torch.zeros_like(before.w2)))
        share = 1.0 if group["scale"] == "literal" else 1 / (len(rows) * group["hidden"])
        how: Any = {"rate": group["memory_lr"], "decay": group["decay"], "objective": group["objective"]}
        after = learn(before, keys, rows, share=share, start=start, **how)
        if finite is not None:
            after = Memory(*(torch.where(finite, new, old) for new, old in zip(after, before, strict=True)))
        # New dicts: a state_dict() that somebody holds stays what it was.
        self.state[owner] = self.state[owner] | state | after._asdict()
        for p in parameters:
            self.state[p] = self.state[p] | {"step": self.state[p].get("step", 0) + 1}
        return after

    @torch.compiler.disable()
    def _owner(self, group: dict[str, Any], parameters: list[Tensor]) -> Tensor:
        """The parameter in whose state the memory of this row size is; the first of these where there is none yet."""
        kind = _row_class(parameters[0])
        held = (p for p in group["params"] if p in self.state and "w1" in self.state[p] and _row_class(p) == kind)
        return next(held, parameters[0])


@torch.compiler.disable()
def _initial_memory(group: dict[str, Any], keys: Tensor, rows: Tensor) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(group["seed"])
    drawn = torch.randn(group["hidden"], keys.shape[1], generator=generator, dtype=torch.float64).to(rows)
    memory = {"w1": rows.new_zeros(rows.shape[1], group["hidden"]), "w2": drawn}
    return memory | ({} if group["scale"] == "literal" else {"w2_start": drawn.clone()})


def _same(rows: Tensor) -> Tensor:
    return rows


def _row_class(p: Tensor) -> tuple:
    columns = p.shape[-1] if p.ndim <= 3 else p.shape[1:].numel()
    return (columns, torch.promote_types(p.dtype, torch.float32), p.device)


def _by_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    alike: dict[tuple, list[Tensor]] = {}
    for p in parameters:
        alike.setdefault((p.shape, p.dtype), []).append(p)
    return list(alike.values())


@torch.compiler.disable()
def _gradients(parameters: list[Tensor], maximize: bool) -> Tensor:
    grad = stack([whole(p.grad) for p in parameters if p.grad is not None])
    return -grad if maximize else grad


def _step(group: dict[str, Any], recalled: Tensor) -> Tensor:
    if group["scale"] == "literal":
        return literal_step(recalled, group["output"], group["ns_steps"]) * group["lr"]
    return normalised_step(recalled, group["output"], group["ns_steps"]) * (STEP_RMS * group["lr"])
