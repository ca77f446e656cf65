"""Deep momentum (DMGD): the momentum is an MLP that learns the gradients it sees (NL Eq. 50–52).

    m(z) = w1 tanh(w2 z)                                              the memory: rows of gradients to rows of steps
    L⁽²⁾(m) = s Σ_r ½ ‖m(φ(u_r)) + u_r‖²   or   s Σ_r ⟨m(φ(u_r)), u_r⟩         objective "l2" or "dot"
    m ← m₀ + α (m − m₀) − η ∇_m L⁽²⁾(m; u, 1)                                  NL Eq. 50, 51
    W ← W + lr σ(m(φ(u)))                                                      NL Eq. 52, with the new m

    u_r  a row of a gradient (in)          φ  feature map of a key, (in) to (keys)         σ  output non-linearity
    w1   (in, hidden)   w2 (hidden, keys)  α  decay in [0, 1)   η  memory rate   m₀  what the memory decays towards

**The value of u is −u** (the "1" of NL Eq. 50: no value but the gradient itself), so that what m recalls is a descent
direction. From w1 = 0 the first recall is one exactly, whatever φ and w2 are, for both objectives: m(u_r) = −η s
Σ_q u_q ⟨a_q, a_r⟩ with a = tanh(w2 φ(u)), hence Σ_r ⟨m(u_r), u_r⟩ = −η s Σ_{rq} ⟨u_r, u_q⟩ ⟨a_r, a_q⟩ <= 0.
"l2" autoencodes gradients through ``hidden`` directions and passes those that recur; "dot" amplifies them instead.

Two sets of units:
* normalised (the optimizer's default): each matrix' rows divided by their root mean square length, s = 1/(rows ·
  hidden), m₀ the initial weights. tanh is bounded by 1, so ‖w1‖ <= η / ((1 − α) √hidden) for "dot" at every rate, and
  "l2" is a contraction in w1 for η < 2. tanh is odd and there is no bias: the opposite gradient recalls the opposite
  step, a gradient of zero no step.
* the letter: u = g as it is, s = 1, m₀ = 0. Decaying w2 to zero, too, ends in a saddle at m = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nestlearn.ops.newton_schulz import newton_schulz

OBJECTIVES = ("l2", "dot")
OUTPUTS = ("none", "tanh", "newton_schulz")
TINY = 1e-12  # keeps a matrix of zeros zero; far below any size that is kept


class Memory(NamedTuple):
    """w1 (in, hidden), w2 (hidden, keys)."""

    w1: Tensor
    w2: Tensor


def recall(memory: Memory, keys: Tensor) -> Tensor:
    """m(z) for keys z (rows, keys): (rows, in)."""
    return torch.tanh(keys @ memory.w2.mT) @ memory.w1.mT


def learn(
    memory: Memory,
    keys: Tensor,
    grads: Tensor,
    *,
    rate: float,
    decay: float,
    objective: str,
    share: float,
    start: Memory,
) -> Memory:
    """One step of the memory on L⁽²⁾. keys φ(u) (rows, keys); grads u (rows, in); share s > 0; start m₀."""
    hidden = torch.tanh(keys @ memory.w2.mT)
    error = grads if objective == "dot" else hidden @ memory.w1.mT + grads  # ∂(L⁽²⁾/s)/∂m(u)
    slope = (error @ memory.w1) * (1 - hidden.square())
    gradient = Memory(error.mT @ hidden, slope.mT @ keys)
    return Memory(*(m0 + decay * (m - m0) - rate * share * g for m, g, m0 in zip(memory, gradient, start, strict=True)))


def unit_rows(grads: Tensor) -> Tensor:
    """Matrices (…, out, in) over the root mean square length of their rows; zero stays zero.

    Through the largest entry first, so that no square over- or underflows: every finite gradient has a direction.
    """
    grads = grads / (grads.abs().amax((-2, -1), keepdim=True) + torch.finfo(grads.dtype).tiny)
    length = torch.linalg.matrix_norm(grads, keepdim=True) / grads.shape[-2] ** 0.5
    return grads / (length + TINY)


def unit_step(recalled: Tensor, output: str, ns_steps: int) -> Tensor:
    """σ of what was recalled (…, out, in), of root mean square one: whole for "none", about for the others."""
    if output == "newton_schulz":
        return max(recalled.shape[-2:]) ** 0.5 * newton_schulz(recalled, ns_steps)
    size = recalled.square().mean((-2, -1), keepdim=True).sqrt()
    scaled = recalled / (size + TINY)
    return torch.tanh(scaled) if output == "tanh" else scaled


def literal_step(recalled: Tensor, output: str, ns_steps: int) -> Tensor:
    """σ(m(u)) as NL Eq. 52 has it, for matrices (…, out, in)."""
    if output == "newton_schulz":
        return newton_schulz(recalled, ns_steps)
    return torch.tanh(recalled) if output == "tanh" else recalled


def unit_keys(grads: Tensor) -> Tensor:
    """φ(u) = u / ‖u‖, row by row: a rare small row is remembered as well as a large one."""
    return grads / (torch.linalg.vector_norm(grads, dim=-1, keepdim=True) + TINY)


def signed_sqrt_keys(grads: Tensor) -> Tensor:
    """φ(u) = sign(u) √|u|, entry by entry: closes the gap between large and small entries of a row."""
    return grads.sign() * grads.abs().sqrt()


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"unit": unit_keys, "signed_sqrt": signed_sqrt_keys}
