"""A pretrained MLP as a chain of levels that starts as the MLP itself (NL Eq. 70, NL §7.3).

    d_s = M[W + Δ_s](x + Σ_{r<s} d_r) − M[W](x)            every level but the slowest, fastest first
    y   = M[W + Δ_n](x + Σ_s d_s) + Σ_s d_s                the slowest level

    M[W]  the pretrained MLP, its weights W frozen      Δ_s  what level s has learned, float32 at least, zero at first

A level passes on what it says beyond the pretrained MLP, and with Δ = 0 that is zero exactly, so the chain is the
pretrained MLP bit for bit, in every dtype; the residual carries each level's words to the output, as in `continuum.py`.
A level with the period inf has no Δ. Weight decay on Δ pulls towards the pretrained weights. A chain drops nothing out:
with a mask of its own each time, M[W](x) − M[W](x) would be noise.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nestlearn.errors import UserError
from nestlearn.levels import Level


class LevelChain(nn.Module):
    """``original``, which it freezes, with its levels' Δ, MLPs of the same shape: ``deltas[level.name]``."""

    def __init__(self, original: nn.Module, levels: Sequence[Level]) -> None:
        super().__init__()
        self.original, self.levels = original, tuple(levels)
        self.trained = {name: p.requires_grad for name, p in original.named_parameters()}  # for `give_back`
        _refuse_integers(original)
        _refuse_more_inputs(original)
        self.dropped = _without_dropout(original)
        self.deltas = nn.ModuleDict({level.name: _zeros(original) for level in levels if level.period != math.inf})
        original.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        *faster, slowest = self.levels
        if not faster:
            return self._block(slowest, x)
        start, said = self.original(x), torch.zeros((), dtype=x.dtype, device=x.device)
        for level in faster:
            said = said + (self._block(level, x + said) - start)
        return self._block(slowest, x + said) + said

    def _block(self, level: Level, x: Tensor) -> Tensor:
        if level.name not in self.deltas:
            return self.original(x)
        weights = dict(self.original.named_parameters())
        changed = {
            name: (weights[name] + delta).to(weights[name].dtype)
            for name, delta in self.deltas[level.name].named_parameters()
        }
        return functional_call(self.original, changed, (x,))

    def give_back(self) -> nn.Module:
        """The pretrained MLP, as trainable as it was."""
        for name, p in self.original.named_parameters():
            p.requires_grad_(self.trained[name])
        for name, share in self.dropped.items():
            cast(nn.Dropout, self.original.get_submodule(name)).p = share
        return self.original


@torch.no_grad()
def _zeros(original: nn.Module) -> nn.Module:
    """A copy with the weights zero, in float32 or wider: modules of the same kinds and names."""
    delta = copy.deepcopy(original)
    for p in delta.parameters():
        p.data = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
    return delta.requires_grad_(True)


def _without_dropout(original: nn.Module) -> dict[str, float]:
    """Turns dropout off; by the module's name, what it was."""
    found = {n: m for n, m in original.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    shares = {name: module.p for name, module in found.items()}
    for name, module in found.items():
        warnings.warn(
            f"{type(original).__name__}.{name} drops out with p={module.p}: in a chain it does not, since its levels "
            'would differ by noise; by="depth" leaves it as it is',
            stacklevel=2,
        )
        module.p = 0.0
    return shares


def _refuse_more_inputs(original: nn.Module) -> None:
    wanted = [p for p in inspect.signature(original.forward).parameters.values() if p.default is p.empty]
    names = [p.name for p in wanted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if len(names) > 1:
        raise UserError(f'{type(original).__name__} reads {names}, but a chain hands on one tensor: use by="depth"')


def _refuse_integers(original: nn.Module) -> None:
    for name, p in original.named_parameters():
        if not p.is_floating_point():
            raise UserError(
                f"{type(original).__name__}.{name} is {p.dtype}, to which no Δ can be added: "
                'load the MLPs in a floating dtype, or use by="depth"'
            )
