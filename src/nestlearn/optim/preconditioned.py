"""Preconditioned momentum as a ``torch.optim.Optimizer``; the mathematics is in ``rules/preconditioned.py``
(NL Eq. 46–47)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestlearn.ops.newton_schulz import orthogonal
from nestlearn.optim.base import Bucket, MemoryOptimizer
from nestlearn.optim.checks import check_choice, check_count, check_decay, check_number, check_product_dtype
from nestlearn.rules import preconditioned as rule
from nestlearn.rules.momentum import momentum


class PreconditionedMomentum(MemoryOptimizer):
    """Momentum of values: ``m ← α m − lr · P g;  W ← W + m``.

    params          matrices, or the groups of ``parameter_groups(model)`` for a whole model
    lr              learning rate, >= 0, a number or a 0-d tensor
    decay           α in [0, 1)
    preconditioner  "diagonal": P g = g / (√v̂ + ε). "kronecker": P g = (L̂ + ε λ_max I)^(−1/4) g (R̂ + ε λ_max I)^(−1/4),
                    λ_max the largest eigenvalue of each. "newton_schulz": P g = NS(g)
    beta            of the moving averages v, L, R, in [0, 1); ^ is Adam's bias correction
    eps             ε > 0; None: 1e-8 for "diagonal", 1e-6 for "kronecker"
    period          "kronecker": steps from one computation of the roots to the next, >= 1; the first is at step 1.
                    torch's ``eigh`` waits for an accelerator there, which nothing else in these optimizers does
    ns_steps        "newton_schulz": iterations, >= 1
    ns_dtype        in which it multiplies. None: bfloat16, as Muon does, float64 for parameters in float64
    weight_decay    >= 0, decoupled: W ← (1 − lr · weight_decay) W before the step

    The root of the mean square of P g is about 1 for "diagonal", (out · in)^(−1/4) for "kronecker" and
    max(out, in)^(−1/2) for "newton_schulz": each has its own range of learning rates.
    State per entry: m, and v; or per matrix L, R and their roots, 2 (out² + in²).
    Raises UserError for a hyperparameter outside its range, and see MemoryOptimizer.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *,
        decay: float = 0.9,
        preconditioner: str = "diagonal",
        beta: float = 0.999,
        eps: float | None = None,
        period: int = 10,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        own = {"decay": decay, "preconditioner": preconditioner, "beta": beta, "eps": eps, "period": period}
        shared = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, own | shared | {"ns_steps": ns_steps, "ns_dtype": ns_dtype})

    def _check(self, group: dict[str, Any], where: str) -> None:
        check_decay(where, "decay", group["decay"])
        check_choice(where, "preconditioner", group["preconditioner"], PRECONDITIONERS)
        check_decay(where, "beta", group["beta"])
        if group["eps"] is not None:
            check_number(where, "eps", group["eps"], above=0)
        check_count(where, "period", group["period"])
        check_count(where, "ns_steps", group["ns_steps"])
        check_product_dtype(where, "ns_dtype", group["ns_dtype"])

    def _initial(self, group: dict[str, Any], grad: Tensor) -> dict[str, Any]:
        state = {"momentum": torch.zeros_like(grad)}
        if group["preconditioner"] == "diagonal":
            state["variance"] = torch.zeros_like(grad)
        elif group["preconditioner"] == "kronecker":
            count, out, into = grad.shape
            for side, size in (("left", out), ("right", into)):
                state[side], state[f"{side}_root"] = grad.new_zeros(2, count, size, size)
        return state

    def _update(self, group: dict[str, Any], bucket: Bucket) -> Tensor:
        value = PRECONDITIONERS[group["preconditioner"]](group, bucket)
        bucket.state["momentum"] = new = momentum(bucket.state["momentum"], value, group["decay"], group["lr"])
        return new


def _diagonal(group: dict[str, Any], bucket: Bucket) -> Tensor:
    g, state, beta = bucket.grad, bucket.state, group["beta"]
    state["variance"] = rule.second_moment(state["variance"], g, beta)
    return rule.diagonal(g, state["variance"], bucket.correction(beta), group["eps"] or 1e-8)


def _kronecker(group: dict[str, Any], bucket: Bucket) -> Tensor:
    g, state, beta = bucket.grad, bucket.state, group["beta"]
    state["left"], state["right"] = rule.kronecker_factors(state["left"], state["right"], g, beta)
    if (state["step"] - 1) % group["period"] == 0:
        for side in ("left", "right"):
            corrected = state[side] / bucket.correction(beta)
            state[f"{side}_root"] = rule.inverse_fourth_root(corrected, group["eps"] or 1e-6)
    return state["left_root"] @ g @ state["right_root"]


def _newton_schulz(group: dict[str, Any], bucket: Bucket) -> Tensor:
    g = bucket.grad
    return orthogonal(g, group["ns_steps"], group["ns_dtype"]).to(g.dtype)


PRECONDITIONERS = {"diagonal": _diagonal, "kronecker": _kronecker, "newton_schulz": _newton_schulz}
