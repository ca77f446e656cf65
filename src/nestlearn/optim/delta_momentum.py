"""Delta momentum as a ``torch.optim.Optimizer``; the mathematics is in ``rules/delta_momentum.py`` (NL Eq. 48–49)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.optim.base import Bucket, MemoryOptimizer
from nestlearn.optim.checks import check_choice, check_decay, check_number, check_product_dtype
from nestlearn.rules.delta_momentum import delta_momentum, normalized
from nestlearn.rules.preconditioned import diagonal, second_moment


class DeltaMomentum(MemoryOptimizer):
    """Momentum whose decay depends on the gradient: ``m ← m (α I − kᵀ k) − lr · P g;  W ← W + m``.

    params        matrices, or the groups of ``parameter_groups(model)`` for a whole model
    lr            learning rate, >= 0, a number or a 0-d tensor
    decay         α in [0, 1)
    key           "normalized": k = g / ‖g‖_F; "literal": k = g, stable only while ‖g‖² < 1 + α (largest singular value)
    values        P: None, the identity; "diagonal", g / (√v̂ + ε) with the second moment v and Adam's bias
                  correction; a tensor: of shape (out, out) a matrix, P g, of any other shape that broadcasts to
                  (…, out, in) entry by entry, P ∘ g; or a function from g (n, out, in) to a tensor of that shape
    beta, eps     of "diagonal": decay of v in [0, 1); ε > 0
    matmul_dtype  in which the two products of m kᵀ k are computed. None: float32 at least; torch.bfloat16 costs some
                  three digits of that term and is several times faster
    weight_decay  >= 0, decoupled: W ← (1 − lr · weight_decay) W before the step

    State per entry of a matrix: m, and v with "diagonal". A function is not part of ``state_dict()``.
    Raises UserError for a hyperparameter outside its range, and see MemoryOptimizer.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *,
        decay: float = 0.9,
        key: str = "normalized",
        values: str | Tensor | Callable[[Tensor], Tensor] | None = None,
        beta: float = 0.999,
        eps: float = 1e-8,
        matmul_dtype: torch.dtype | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        own = {"decay": decay, "key": key, "values": values, "beta": beta, "eps": eps, "matmul_dtype": matmul_dtype}
        super().__init__(params, own | {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})

    def _check(self, group: dict[str, Any], where: str) -> None:
        check_decay(where, "decay", group["decay"])
        check_choice(where, "key", group["key"], ("normalized", "literal"))
        check_decay(where, "beta", group["beta"])
        check_number(where, "eps", group["eps"], above=0)
        check_product_dtype(where, "matmul_dtype", group["matmul_dtype"])
        values = group["values"]
        if isinstance(values, str):
            check_choice(where, "values", values, ("diagonal",))
        elif values is not None and not isinstance(values, Tensor) and not callable(values):
            raise UserError(f"{where}: values is {values!r}, must be None, 'diagonal', a tensor or a function of g")

    def _initial(self, group: dict[str, Any], grad: Tensor) -> dict[str, Any]:
        names = ["momentum", "variance"] if _is_diagonal(group) else ["momentum"]
        return {name: torch.zeros_like(grad) for name in names}

    def _update(self, group: dict[str, Any], bucket: Bucket) -> Tensor:
        g = bucket.grad
        key = normalized(g) if group["key"] == "normalized" else g
        value = self._value(group, bucket)
        new = delta_momentum(bucket.state["momentum"], key, value, group["decay"], group["lr"], group["matmul_dtype"])
        bucket.state["momentum"] = new
        return new

    def _value(self, group: dict[str, Any], bucket: Bucket) -> Tensor:
        """P g."""
        g, values, state = bucket.grad, group["values"], bucket.state
        if values is None:
            return g
        if _is_diagonal(group):
            state["variance"] = second_moment(state["variance"], g, group["beta"])
            return diagonal(g, state["variance"], bucket.correction(group["beta"]), group["eps"])
        if not isinstance(values, Tensor):
            value = values(g)
        else:
            p = values.to(g)
            value = p @ g if p.shape[-2:] == (g.shape[-2], g.shape[-2]) else p * g
        if value.shape != g.shape:
            name, got, right = self.name_of(bucket.parameters[0]), tuple(value.shape), tuple(g.shape)
            raise UserError(f"parameter {name}: values give a P g of shape {got}, must be {right}")
        return value


def _is_diagonal(group: dict[str, Any]) -> bool:
    return isinstance(group["values"], str)
