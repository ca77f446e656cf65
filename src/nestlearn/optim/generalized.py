"""Generalized gradient descent and momentum: objective, value and retention are arguments (NL Eq. 58–60)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.optim.base import Bucket, MemoryOptimizer
from nestlearn.optim.checks import check_choice, check_count, check_decay, check_number
from nestlearn.optim.dgd import InputOptimizer, each, processes, proximal_of_all, total
from nestlearn.optim.functions import Functions
from nestlearn.rules.dgd_batch import proximal
from nestlearn.rules.generalized import ENERGIES, LOSSES, VALUES, anchor, descended, near, solved, unit_key

Function = Callable[..., Tensor]


class GeneralizedGD(InputOptimizer):
    """``W⁺ = argmin_P  η s Σ_b ℓ(P x_b, v_b) + Ret(P, history)`` on the weights of ``nn.Linear`` layers, η = lr.

    objective  ℓ: "dot", "l2", or a function (predicted (…, N, out), value (…, N, out)) -> losses (…, N)
    value      v: "error" (−u), "step" (W x − u), or a function (u, W x) of tensors (…, N, out) -> (…, N, out)
    retention  Ret: "near" (½ ‖P − mean(history)‖²), or a function (P (…, out, in), history of them) -> scalar
    history    c >= 1: how many of the last weights, newest first; before the first step all of them are W
    solve      "exact": in closed form, for the ready-made ℓ and Ret. "gradient": ``inner_steps`` gradient steps of size
               ``inner_lr`` from W, for any; one step of size 1 from near a ready-made Ret is W − η ∇ℓ
    reduction  "mean": the loss is a mean, s = 1/N, N the rows that the layer saw; "sum": s = 1

    ("dot", "error") is gradient descent and needs no captured inputs; ("l2", "error") is ``DGD``; both read their
    errors off ``.grad``. All others need capture_inputs(model, errors=True), and ("l2", "step") among them is implicit
    gradient descent. "gradient" needs all samples in one process. State: c − 1 copies of W.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *,
        objective: str | Function = "l2",
        value: str | Function = "error",
        retention: str | Function = "near",
        history: int = 1,
        solve: str = "exact",
        inner_steps: int = 1,
        inner_lr: float = 1.0,
        reduction: str = "mean",
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        ready = {"near": partial(near, decay=1)}
        self._functions = Functions({"objective": LOSSES, "value": VALUES, "retention": ready})
        options = {"objective": objective, "value": value, "retention": retention, "history": history}
        options |= {"solve": solve, "inner_steps": inner_steps, "inner_lr": inner_lr, "reduction": reduction}
        super().__init__(params, options | {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})

    def _check(self, group: dict[str, Any], where: str) -> None:
        check_choice(where, "reduction", group["reduction"], ("mean", "sum"))
        _check_generalized(self._functions, group, where, ("objective", "value", "retention"))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_functions": self._functions}

    def _needs_inputs(self, group: dict[str, Any]) -> bool:
        return super()._needs_inputs(group) and (self._needs_errors(group) or group["objective"] == "l2")

    def _needs_errors(self, group: dict[str, Any]) -> bool:
        return group["solve"] == "gradient" or group["value"] != "error"

    def _initial(self, group: dict[str, Any], grad: Tensor) -> dict[str, Any]:
        return _empty_history(group, grad)

    def _update(self, group: dict[str, Any], bucket: Bucket) -> Tensor:
        weight = bucket.weight
        if bucket.state["step"] == 1:
            bucket.state |= {f"previous_{i}": weight.clone() for i in range(1, group["history"])}
        history = _history(weight, group, bucket)
        pieces = each(bucket.parameters, bucket.grad, *history)
        change = torch.cat([self._change(group, p, grad, list(past)) for p, grad, *past in pieces])
        _remember(weight, group, bucket)
        return change

    def _change(self, group: dict[str, Any], p: Tensor, grad: Tensor, history: list[Tensor]) -> Tensor:
        w, rate, pull = history[0], group["lr"], -group["lr"] * grad
        if self._needs_errors(group):
            inputs, value = self._pairs(group, p, w)
            if group["solve"] == "gradient":
                return self._descend(group, inputs, value, history)
            pull = rate * self._share(group, inputs) * total(value.mT @ inputs)
        if group["objective"] == "dot":
            return solved(w, anchor(history, 1), pull, None)
        return solved(w, anchor(history, 1), pull, proximal_of_all(self._seen(p, w)[0], rate, group["reduction"]))

    def _share(self, group: dict[str, Any], inputs: Tensor) -> Tensor | float:
        """s, of the samples of all processes."""
        return 1 / total(inputs.new_tensor(inputs.shape[1])) if group["reduction"] == "mean" else 1.0

    def _pairs(self, group: dict[str, Any], p: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs x of this process and their values v. Autograd's errors hold the s of this process's own loss."""
        inputs, errors = self._seen(p, w)
        assert errors is not None
        own = inputs.shape[1] if group["reduction"] == "mean" else 1
        errors = errors * (-own if group["maximize"] else own)
        return inputs, self._functions("value", group["value"])(errors, inputs @ w.mT)

    def _descend(self, group: dict[str, Any], inputs: Tensor, value: Tensor, history: list[Tensor]) -> Tensor:
        if processes() > 1:
            raise UserError('solve="gradient" needs all samples in one process: use solve="exact"')
        loss, keep = (self._functions(option, group[option]) for option in ("objective", "retention"))
        weight = group["lr"] * self._share(group, inputs)

        def energy(w: Tensor) -> Tensor:
            return weight * loss(inputs @ w.mT, value).sum() + keep(w, history)

        return descended(history[0], energy, group["inner_steps"], group["inner_lr"])


class GeneralizedMomentum(MemoryOptimizer):
    """``m⁺ = argmin_m ℓ(m; k, v) + Ret(m, history)``, ``W ← W + m⁺``, with v = lr P(g) and k the key of g.

    objective  ℓ: "dot" (⟨m, v⟩), "l2" (⟨m, v⟩ + ½ ‖m kᵀ‖²), or a function (m, k, v), each (n, out, in) -> losses (n,)
    key        k: "normalized" (g/‖g‖_F), "literal" (g), or a function (n, out, in) -> (n, rows, in)
    values     P: None (P(g) = g), or a function of g (n, out, in) -> (n, out, in)
    retention  Ret: "near" (½ ‖m − α mean(history)‖², α = decay in [0, 1)), or a function (m, history) -> scalar
    history    c >= 1: how many of the last momenta, newest first; before the first step all of them are 0
    solve      "gradient": ``inner_steps`` gradient steps of size ``inner_lr`` from m (1 and 1 are the paper's letter);
               "exact": in closed form, for the ready-made ℓ and Ret; bounded where the letter with "l2" is not

    Functions see the n matrices of one bucket and must not mix them. With the defaults of ``solve``, "dot" is momentum
    (and preconditioned momentum, with P), "l2" is ``DeltaMomentum``. State: c copies of the gradient's size.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *,
        decay: float = 0.9,
        objective: str | Function = "l2",
        key: str | Function = "normalized",
        values: Function | None = None,
        retention: str | Function = "near",
        history: int = 1,
        solve: str = "gradient",
        inner_steps: int = 1,
        inner_lr: float = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        keys, ready = {"normalized": unit_key, "literal": _same}, {"near": near}
        self._functions = Functions({"objective": ENERGIES, "key": keys, "values": {"none": _same}, "retention": ready})
        options = {"decay": decay, "objective": objective, "key": key, "values": values, "retention": retention}
        options |= {"history": history, "solve": solve, "inner_steps": inner_steps, "inner_lr": inner_lr}
        super().__init__(params, options | {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})

    def _check(self, group: dict[str, Any], where: str) -> None:
        check_decay(where, "decay", group["decay"])
        group["values"] = "none" if group["values"] is None else group["values"]
        _check_generalized(self._functions, group, where, ("objective", "key", "values", "retention"))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_functions": self._functions}

    def _initial(self, group: dict[str, Any], grad: Tensor) -> dict[str, Any]:
        return {"momentum": torch.zeros_like(grad)} | _empty_history(group, grad)

    def _update(self, group: dict[str, Any], bucket: Bucket) -> Tensor:
        m, grad = bucket.state["momentum"], bucket.grad
        loss, key, values, keep = (
            self._functions(option, group[option]) for option in ("objective", "key", "values", "retention")
        )
        history, k, v = _history(m, group, bucket), key(grad), group["lr"] * values(grad)
        if keep is near:
            keep = partial(near, decay=group["decay"])
        if group["solve"] == "exact":
            d = None if group["objective"] == "dot" else proximal(k, 1.0)
            new = m + solved(m, anchor(history, group["decay"]), -v, d)
        else:
            new = m + descended(
                m, lambda s: loss(s, k, v).sum() + keep(s, history), group["inner_steps"], group["inner_lr"]
            )
        _remember(m, group, bucket)
        bucket.state["momentum"] = new
        return new


def _same(grad: Tensor) -> Tensor:
    return grad


def _check_generalized(functions: Functions, group: dict[str, Any], where: str, options: tuple[str, ...]) -> None:
    for option in options:
        group[option] = functions.name(where, option, group[option])
    check_choice(where, "solve", group["solve"], ("exact", "gradient"))
    for option in ("history", "inner_steps"):
        check_count(where, option, group[option])
    check_number(where, "inner_lr", group["inner_lr"], above=0)
    for option in ("objective", "retention"):
        if group["solve"] == "exact" and functions.is_given(option, group[option]):
            raise UserError(f'{where}: a given {option} has no closed form: use solve="gradient" and inner_steps=...')


# The c − 1 states before the present one, newest first: previous_1 … previous_{c−1}, each shaped like the parameter.


def _empty_history(group: dict[str, Any], grad: Tensor) -> dict[str, Any]:
    return {f"previous_{i}": torch.zeros_like(grad) for i in range(1, group["history"])}


def _history(present: Tensor, group: dict[str, Any], bucket: Bucket) -> list[Tensor]:
    return [present] + [bucket.state[f"previous_{i}"] for i in range(1, group["history"])]


def _remember(present: Tensor, group: dict[str, Any], bucket: Bucket) -> None:
    for i, state in enumerate(_history(present, group, bucket)[:-1], 1):
        bucket.state[f"previous_{i}"] = state.clone() if i == 1 else state
