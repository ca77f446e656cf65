"""The faster twin of `dgd_chunk.chunk_write` (NL Eq. 90–93): fewer passes, its backward pass written by hand.

Scaling the inputs once, Y = diag(gain) X, takes the gain out of everything else (letters as in `dgd_chunk`, G the
output gradients, so that U = −gain · G):

    K = X Xᵀ     A = X Yᵀ = K diag(gain)     N = A ∘ R'     P = (I + N)⁻¹ (share − (A ∘ W') G)     left = W_C G + R_C P
    added = −leftᵀ Y     added_momentum = −(μ_C G)ᵀ Y     at μ = 0, W' = R':  P + G = (I + N)⁻¹ (share + G)

Backward, d· marking a gradient, with r = (I + N)⁻ᵀ (dP + R_C dleft) the gradient of the right-hand side:

    dleft = −Y daddedᵀ     dN = −r Pᵀ     d(A ∘ W') = −r Gᵀ     dA = dN ∘ R' + d(A ∘ W') ∘ W'
    dG = W_C dleft − μ_C (Y dadded_momentumᵀ) − (A ∘ W')ᵀ r
    dK = dA diag(gain)     dY = −left dadded − (μ_C G) dadded_momentum     dX = (dK + dKᵀ) X + gain · dY
    dgain = ⟨dY, X⟩ + column sums of dA ∘ K

X may be shared by all maps of a stack (its second dimension is then 1); so is K, and dK and dX are sums over the maps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestlearn.ops.dgd_chunk import Decays, Write
from nestlearn.ops.first_order import first_order
from nestlearn.ops.triangular import invert_unit_lower


def fused_write(inputs: Tensor, errors: Tensor, gain: Tensor, share: Tensor, decays: Decays) -> Write:
    """`chunk_write` for inputs X (B, G or 1, H, C, in), errors and share (B, G, H, C, out), gain (B, G, H, C).

    In the result the gain stands on the inputs instead of the updates, which reads the same. First derivatives only.
    """
    moment, moment_end = (None, None) if decays.leak is None else (decays.moment, decays.moment_end)
    scaled, solved, added, added_momentum = _FusedWrite.apply(
        inputs, errors, gain, share, decays.retain, decays.retain_end, moment, moment_end, decays.power_end
    )  # pyright: ignore[reportGeneralTypeIssues]
    return Write(scaled, -errors, solved, added, added_momentum)


class _FusedWrite(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        g: Tensor,
        gain: Tensor,
        share: Tensor,
        retain: Tensor,
        retain_end: Tensor,
        moment: Tensor | None,
        moment_end: Tensor | None,
        power_end: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = gain[..., None] * x
        gram = x @ x.mT
        products = gram * gain[..., None, :]
        system = products * retain
        inverse = invert_unit_lower(system.flatten(0, 2))
        if moment is None or moment_end is None:
            total = _product(inverse, share + g)
            p, left = total - g, retain_end * total
        else:
            right = torch.baddbmm(share.flatten(0, 2), (products * moment).flatten(0, 2), g.flatten(0, 2), alpha=-1)
            p = torch.bmm(inverse, right).view_as(share)
            left = (moment_end * g).addcmul_(retain_end, p)
        added = (left.mT @ y).neg_()
        added_momentum = ((power_end * g).mT @ y).neg_()
        ctx.save_for_backward(
            x, g, gain, y, retain, retain_end, moment, moment_end, power_end, gram, products, inverse, p, left
        )
        return y, p, added, added_momentum

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor, dp: Tensor, d_added: Tensor, d_momentum: Tensor) -> tuple[Tensor | None, ...]:
        x, g, gain, y, retain, retain_end, moment, moment_end, power_end, gram, products, inverse, p, left = (
            ctx.saved_tensors
        )
        d_left = (y @ d_added.mT).neg_()
        r = _product(inverse.mT, torch.addcmul(dp, retain_end, d_left))
        dg = (y @ d_momentum.mT).mul_(power_end).neg_()
        dy = dy - left @ d_added
        dy -= (power_end * g) @ d_momentum
        d_retain_end = (d_left * p).sum((1, -1)).unflatten(1, (1, -1))[..., None]
        d_moment = d_moment_end = None
        if moment is None:
            total = p + g
            dg.addcmul_(retain_end, d_left)
            dg -= (products * retain).mT @ r
            d_retain_end += (d_left * g).sum((1, -1)).unflatten(1, (1, -1))[..., None]
            d_system = (r @ total.mT).neg_()
            d_retain = (d_system * products).sum(1, keepdim=True)
            d_products = d_system.mul_(retain)
        else:
            moved = products * moment
            dg.addcmul_(moment_end, d_left)
            dg -= moved.mT @ r
            d_moment_end = (d_left * g).sum((1, -1)).unflatten(1, (1, -1))[..., None]
            d_system, d_moved = (r @ p.mT).neg_(), (r @ g.mT).neg_()
            d_retain = torch.mul(d_system, products, out=moved).sum(1, keepdim=True)
            d_moment = torch.mul(d_moved, products, out=moved).sum(1, keepdim=True)
            d_products = d_system.mul_(retain).addcmul_(d_moved, moment)
        d_gain = (dy * x).sum(-1) + (d_products * gram).sum(-2)
        d_gram, dx = d_products.mul_(gain[..., None, :]), dy.mul_(gain[..., None])
        if x.shape[1] < gain.shape[1]:
            d_gram, dx = d_gram.sum(1, keepdim=True), dx.sum(1, keepdim=True)
        dx = dx + (d_gram + d_gram.mT) @ x
        return dx, dg, d_gain, r, d_retain, d_retain_end, d_moment, d_moment_end, None


def _product(matrices: Tensor, t: Tensor) -> Tensor:
    """Batched product with t (B, G, H, C, n)."""
    return torch.bmm(matrices, t.flatten(0, 2)).view_as(t)
