"""What queries read of one layer within a chunk, before or after their own token's write, its backward by hand.

out = share(q) − ((Q Xᵀ) ∘ W') Ĝ − ((Q Xᵀ) ∘ R') E    letters and share as in `inner_layer.py`; after it R, W for R', W'

dĜ = −((Q Xᵀ) ∘ W')ᵀ dout      dE = −((Q Xᵀ) ∘ R')ᵀ dout      d(Q Xᵀ) = −(dout Ĝᵀ) ∘ W' − (dout Eᵀ) ∘ R'
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nestlearn.ops.inner_layer import Carried, LogGrads, Shares, Solved, carry, carry_back, log_rows


class Read(NamedTuple):
    """Queries Q (N, C, in), Q Xᵀ and what was carried, and the result (N, C, out)."""

    query: Tensor
    products: Tensor
    carried: Carried
    out: Tensor


class ReadGrads(NamedTuple):
    """Gradients of a read: query, inputs X, E (or T), Ĝ (None at μ = 0), state, anchor."""

    query: Tensor
    x: Tensor
    erased: Tensor
    updates: Tensor | None
    state: Tensor
    anchor: Tensor | None


def read(query: Tensor, solved: Solved, state: Tensor, anchor: Tensor | None, shares: Shares) -> Read:
    """One map's tensors all through."""
    carried = carry(query, state, anchor, shares, solved.g.shape[-1])
    products = torch.bmm(query, solved.x.mT)
    out = torch.baddbmm(carried.share, products * shares.retain[0], solved.erased, alpha=-1)
    if solved.moment is not None:
        out.baddbmm_(products * shares.moment[0], solved.updates, alpha=-1)
    return Read(query, products, carried, out)


def read_back(
    grad: Tensor,
    done: Read,
    solved: Solved,
    state: Tensor,
    anchor: Tensor | None,
    shares: Shares,
    grads: LogGrads,
    *,
    after: bool,
) -> ReadGrads:
    """All gradients but those of the log decays, which ``grads`` collects."""
    retain, moment = shares.retain[0], shares.moment[0]
    rows = slice(1, None) if after else slice(0, -1)
    log_rows(grad, done.carried, shares, grads, int(after))
    d_erased = torch.bmm((done.products * retain).mT, grad).neg_()
    d_products = torch.bmm(grad, solved.erased.mT).neg_().mul_(retain)
    grads.ratios[:, rows].addcmul_(d_products, done.products)
    d_updates = None
    if solved.moment is not None and grads.moment is not None:
        d_updates = torch.bmm((done.products * moment).mT, grad).neg_()
        others = torch.bmm(grad, solved.updates.mT)
        grads.moment[:, rows].addcmul_(others, done.products, value=-1)
        d_products.addcmul_(others, moment, value=-1)
    dq, d_state, d_anchor = carry_back(grad, done.query, state, anchor, shares)
    dq.baddbmm_(d_products, solved.x)
    return ReadGrads(dq, torch.bmm(d_products.mT, done.query), d_erased, d_updates, d_state, d_anchor)
