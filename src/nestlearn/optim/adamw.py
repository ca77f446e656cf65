"""AdamW for what is not a matrix: vectors, embeddings, heads (Loshchilov and Hutter, 2019; NL App. B on Adam).

m ← β1 m + (1 − β1) g      v ← β2 v + (1 − β2) g²      W ← (1 − lr λ) W − lr (m / (1−β1ᵗ)) / (√(v / (1−β2ᵗ)) + ε)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestlearn.optim.checks import check_betas, check_number

if TYPE_CHECKING:
    from nestlearn.optim.base import Bucket

ADAMW_DEFAULTS = {"betas_adamw": (0.9, 0.95), "eps_adamw": 1e-8}


def check_adamw(group: dict[str, Any], where: str) -> None:
    check_betas(where, "betas_adamw", group["betas_adamw"], count=2)
    check_number(where, "eps_adamw", group["eps_adamw"], above=0)


def adamw_initial(grad: Tensor) -> dict[str, Any]:
    return {"mean": torch.zeros_like(grad), "variance": torch.zeros_like(grad)}


def adamw_update(group: dict[str, Any], bucket: Bucket) -> Tensor:
    beta1, beta2 = group["betas_adamw"]
    state, g = bucket.state, bucket.grad
    state["mean"] = torch.lerp(state["mean"], g, 1 - beta1)
    state["variance"] = (beta2 * state["variance"]).addcmul_(g, g, value=1 - beta2)
    root = (state["variance"] / bucket.correction(beta2)).sqrt_().add_(group["eps_adamw"])
    return (state["mean"] / bucket.correction(beta1)).div_(root).mul_(-group["lr"])
