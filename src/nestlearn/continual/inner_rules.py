"""One change of a stream's weight by one of the library's rules: the same equations as the optimizers of `optim/`.

    rule(memory, g) → (what is added to Δ, memory)        g  the period's mean gradient, a Delta (B, out, in)

"sgd" has no memory and keeps factors as factors. The others write into memories of the whole matrix's shape, one for
each stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestlearn.continual.delta import Delta
from nestlearn.continual.online_level import OnlineLevel
from nestlearn.ops.newton_schulz import newton_schulz
from nestlearn.rules import m3
from nestlearn.rules.delta_momentum import delta_momentum, normalized
from nestlearn.rules.momentum import momentum

Memory = tuple[Tensor, ...]
# Of M3, as its optimizer has them: decays, weight of the slow memory, changes between its writes, ε and NS steps.
M3_BETAS, M3_SLOW_WEIGHT, M3_SLOW_PERIOD, M3_EPS, NS_STEPS = (0.95, 0.95, 0.9), 0.2, 16, 0.3, 5


def initial_memory(level: OnlineLevel, like: Delta) -> Memory:
    """Zeros of the shape that the rule needs; nothing for "sgd"."""
    count = {"sgd": 0, "momentum": 1, "delta_momentum": 1, "m3": 5}[level.rule]
    return tuple(torch.zeros_like(like.matrix()) for _ in range(count))


def change(
    level: OnlineLevel, memory: Memory, g: Delta, steps: int, rate: Tensor | None = None
) -> tuple[Delta, Memory]:
    """What is added to Δ, and the memory after. steps: changes of this level including this one, >= 1.

    rate  () in place of the level's lr
    """
    lr = level.lr if rate is None else rate
    if level.rule == "sgd":
        return g.scaled(-lr), memory
    grad = g.matrix()
    if level.rule == "momentum":
        m = momentum(memory[0], grad, level.decay, lr)
        return Delta(dense=m), (m,)
    if level.rule == "delta_momentum":
        m = delta_momentum(memory[0], normalized(grad), grad, level.decay, lr)
        return Delta(dense=m), (m,)
    return _m3(lr, memory, grad, steps)


def _m3(lr: float | Tensor, memory: Memory, g: Tensor, steps: int) -> tuple[Delta, Memory]:
    """The practical form of rules/m3.py: M1, V, M2, the sum of the open slow period, and O2."""
    (fast, variance, slow, total, held), (beta1, beta2, beta3) = memory, M3_BETAS
    fast, variance = m3.ema_fast(fast, variance, g, beta1, beta2)
    total = total + g
    if steps % M3_SLOW_PERIOD == 0:
        slow, total = m3.ema_slow(slow, total, beta3, M3_SLOW_PERIOD), torch.zeros_like(total)
        held = newton_schulz(slow, NS_STEPS)
    direction = newton_schulz(m3.nesterov(fast, g, beta1), NS_STEPS) + M3_SLOW_WEIGHT * held
    update = m3.ema_update(direction, variance, lr, M3_EPS)
    return Delta(dense=update), (fast, variance, slow, total, held)
