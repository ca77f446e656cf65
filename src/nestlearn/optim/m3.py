"""M3 as a ``torch.optim.Optimizer``; the mathematics is in ``rules/m3.py`` (NL Eq. 75, Algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.levels import fires
from nestlearn.ops.newton_schulz import orthogonal, product_dtype
from nestlearn.optim.base import Bucket, MemoryOptimizer
from nestlearn.optim.checks import check_betas, check_choice, check_count, check_number, check_product_dtype
from nestlearn.rules import m3 as rule

EPS = {"ema": 0.3, "paper": 1e-8}


class M3(MemoryOptimizer):
    """Multi-scale momentum Muon: a fast and a slow memory of gradients, both orthogonalised.

    params        matrices, or the groups of ``parameter_groups(model)`` for a whole model
    lr            learning rate, >= 0, a number or a 0-d tensor; with "ema" one to three times that of AdamW
    betas         (β1, β2, β3) of the fast memory, the second moment and the slow memory. "ema": decays in [0, 1);
                  "paper": weights of what is added, >= 0
    slow_weight   a, >= 0, the slow memory's part in the step; 0 leaves the fast memory alone
    slow_period   f, >= 1, from one write of the slow memory to the next: in steps, or in tokens with
                  ``slow_period_unit="tokens"``; then a step's tokens are told by ``step(tokens=...)`` or, for all
                  steps, by ``tokens_per_step``. It writes at the first step at or after each multiple of f, and that
                  step already uses what it wrote; before the first write O2 is zero
    ns_steps      iterations of Newton–Schulz, >= 1
    ns_dtype      in which Newton–Schulz multiplies. None: bfloat16, as Muon does, float64 for parameters in float64
    eps           ε > 0 beside √V. "ema": relative to the root mean square of √V, 0.3 by default; a large one switches
                  the division by √V off. "paper": absolute, 1e-8 by default
    weight_decay  >= 0, decoupled: W ← (1 − lr · weight_decay) W before the step
    style         "ema", the practical form, or "paper", Algorithm 1 to the letter

    The two forms are written out in ``rules/m3.py``; that is their definition. Newton–Schulz is the quintic
    (3.4445, −4.7750, 2.0315) on X / (‖X‖_F + 1e-7). Steps and tokens are counted per parameter: one that had no
    gradient in a step has not lived through it. A step whose gradient was not finite is refused, see MemoryOptimizer.

    State per entry of a matrix: M1, V, M2, the sum of the open period's gradients (float32 at least) and O2 (ns_dtype).
    Raises UserError for a hyperparameter outside its range, and see MemoryOptimizer.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *,
        betas: tuple[float, float, float] = (0.95, 0.95, 0.9),
        slow_weight: float = 0.2,
        slow_period: int = 16,
        slow_period_unit: str = "steps",
        tokens_per_step: int | None = None,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        eps: float | None = None,
        weight_decay: float = 0.0,
        style: str = "ema",
        maximize: bool = False,
    ) -> None:
        own = {"betas": betas, "slow_weight": slow_weight, "slow_period": slow_period, "ns_steps": ns_steps}
        clock = {"slow_period_unit": slow_period_unit, "tokens_per_step": tokens_per_step}
        shared = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, own | clock | shared | {"ns_dtype": ns_dtype, "style": style})

    def _check(self, group: dict[str, Any], where: str) -> None:
        check_choice(where, "style", group["style"], ("ema", "paper"))
        check_betas(where, "betas", group["betas"], count=3, decays=group["style"] == "ema")
        check_number(where, "slow_weight", group["slow_weight"], low=0)
        check_count(where, "slow_period", group["slow_period"])
        check_choice(where, "slow_period_unit", group["slow_period_unit"], ("steps", "tokens"))
        if group["tokens_per_step"] is not None:
            check_count(where, "tokens_per_step", group["tokens_per_step"])
        check_count(where, "ns_steps", group["ns_steps"])
        check_product_dtype(where, "ns_dtype", group["ns_dtype"])
        check_number(where, "eps", _eps(group), above=0)

    def _initial(self, group: dict[str, Any], grad: Tensor) -> dict[str, Any]:
        memories = {name: torch.zeros_like(grad) for name in ("fast", "variance", "slow", "slow_sum")}
        held = torch.zeros_like(grad, dtype=product_dtype(grad, group["ns_dtype"]))
        return memories | {"slow_direction": held, "slow_steps": 0, "clock": 0}

    def _update(self, group: dict[str, Any], bucket: Bucket) -> Tensor:
        state, g, (beta1, beta2, _) = bucket.state, bucket.grad, group["betas"]
        ema = group["style"] == "ema"
        fast = rule.ema_fast if ema else rule.paper_fast
        state["fast"], state["variance"] = fast(state["fast"], state["variance"], g, beta1, beta2)
        self._write_slow(group, bucket)
        ahead = rule.nesterov(state["fast"], g, beta1) if ema else state["fast"]
        direction = orthogonal(ahead, group["ns_steps"], group["ns_dtype"])
        direction = direction.contiguous().to(g.dtype).add_(state["slow_direction"], alpha=group["slow_weight"])
        if ema:
            return rule.ema_update(direction, state["variance"], group["lr"], _eps(group))
        return rule.paper_update(direction, state["variance"], group["lr"], _eps(group))

    def _write_slow(self, group: dict[str, Any], bucket: Bucket) -> None:
        state, beta3 = bucket.state, group["betas"][2]
        state["slow_sum"], state["slow_steps"] = state["slow_sum"] + bucket.grad, state["slow_steps"] + 1
        before, state["clock"] = state["clock"], state["clock"] + _passed(group, bucket)
        if not fires(group["slow_period"], before, state["clock"]):
            return
        if group["style"] == "ema":
            state["slow"] = rule.ema_slow(state["slow"], state["slow_sum"], beta3, state["slow_steps"])
        else:
            state["slow"] = rule.paper_slow(state["slow"], state["slow_sum"], beta3)
        state["slow_direction"] = orthogonal(state["slow"], group["ns_steps"], group["ns_dtype"])
        state["slow_sum"], state["slow_steps"] = torch.zeros_like(state["slow_sum"]), 0


def _eps(group: dict[str, Any]) -> float:
    return EPS[group["style"]] if group["eps"] is None else group["eps"]


def _passed(group: dict[str, Any], bucket: Bucket) -> int:
    """By how much this step moves the clock of the slow memory."""
    if group["slow_period_unit"] == "steps":
        return 1
    tokens = group["tokens_per_step"] if bucket.tokens is None else bucket.tokens
    if tokens is None:
        raise UserError("the slow_period of M3 is in tokens: call step(tokens=...) or set tokens_per_step")
    return tokens
