"""Truth for delta gradient descent: each write *solves* its proximal problem instead of using a closed form.

    prox(S, u, x) = argmin_P  1/2 |P x - u|^2  +  1/(2 rate) |P - S|_F^2         NL Eq. 56, u = -g

Setting the derivative to zero gives ``P (I + rate x x^T) = S + rate u x^T``, a linear system that is handed to
torch.linalg.solve: no gain, no Sherman-Morrison. ``proximal_by_gradient`` finds the same point by minimising, which
tests the derivation as well.

One write, as the project defines it: what forgets is the proximal step towards "nothing" (u = 0), what is learned is
the proximal step of an empty memory (S = 0), which passes through momentum; retention scales the old state alone
(NL Eq. 88).

Shapes: S, m (out, in); x, q (in,); g (out,); rate, retain scalars. Batched over B and H by Python loops.
"""

from __future__ import annotations

import torch
from torch import Tensor


def proximal(state: Tensor, target: Tensor, x: Tensor, rate: Tensor) -> Tensor:
    """The minimiser, from the normal equations. Linear in (state, target) jointly."""
    system = torch.eye(len(x), dtype=x.dtype) + rate * torch.outer(x, x)
    right_hand_side = state + rate * torch.outer(target, x)
    return torch.linalg.solve(system, right_hand_side, left=False)


def proximal_by_gradient(state: Tensor, target: Tensor, x: Tensor, rate: float, steps: int = 20_000) -> Tensor:
    """The same minimiser by plain gradient descent on the objective, for small well-conditioned cases."""
    point = state.detach().clone().requires_grad_()
    step = 0.9 / (1 / rate + float(x @ x))
    for _ in range(steps):
        loss = 0.5 * (point @ x - target).square().sum() + (point - state).square().sum() / (2 * rate)
        (gradient,) = torch.autograd.grad(loss, point)
        point = (point - step * gradient).detach().requires_grad_()
    return point.detach()


def write(
    state: Tensor,
    momentum: Tensor,
    x: Tensor,
    g: Tensor,
    rate: Tensor,
    retain: Tensor,
    mu: float,
    initial: Tensor | None = None,
    forgets: bool = True,
) -> tuple[Tensor, Tensor]:
    """One token's write. ``initial`` is what retention decays towards (None: zero); ``forgets=False`` drops the decay
    that the proximal step makes along x (plain gradient descent, same step)."""
    momentum = mu * momentum + proximal(torch.zeros_like(state), -g, x, rate)
    decay = proximal(state, torch.zeros_like(g), x, rate) - state if forgets else torch.zeros_like(state)
    home = torch.zeros_like(state) if initial is None else initial
    return home + retain * (state - home) + decay + momentum, momentum


def run_row(state, momentum, inputs, errors, rate, retain, query, mu, initial=None, forgets=True):
    """One row and one head: inputs, query (T,in); errors (T,out); rate, retain (T,). Reads come before the write."""
    reads = []
    for t in range(len(inputs)):
        reads.append(state @ query[t])
        state, momentum = write(state, momentum, inputs[t], errors[t], rate[t], retain[t], mu, initial, forgets)
    return torch.stack(reads), state, momentum


def run(state, momentum, inputs, errors, rate, retain, query, *, mu, initial=None, forgets=True):
    """All rows and heads; shapes as in the public function: (B,H,out,in), (B,T,H,.), (B,T,H); initial (H,out,in)."""
    batch, _, heads = rate.shape
    rows = []
    for b in range(batch):
        cells = []
        for h in range(heads):
            tokens = (tensor[b, :, h] for tensor in (inputs, errors, rate, retain, query))
            home = None if initial is None else initial.expand(batch, *initial.shape[-3:])[b, h]
            cells.append(run_row(state[b, h], momentum[b, h], *tokens, mu, home, forgets))
        rows.append([torch.stack(parts) for parts in zip(*cells, strict=True)])
    reads, state, momentum = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return reads.transpose(1, 2), state, momentum
