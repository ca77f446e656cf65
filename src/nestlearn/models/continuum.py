"""The continuum memory system (NL §7.1): MLP blocks, one per level, each changing on its own period.

    nested, sequential   y = MLP_n(… MLP_2(MLP_1(x)))            a chain, fastest first            (NL Eq. 70, 72, 73)
    independent          y = x + Σ_s w_s MLP_s(x)                 parallel, learned weights         (NL Eq. 74)

The connections differ in where a block's weights come from. In "sequential" all initial states are parameters of the
whole. In "nested" a slower level provides the initial state of the next faster one, which restarts from it each time
the slower one steps (`restart`). *When* a level steps is the optimizer's affair (`optim/leveled.py`).

A block is MLP(n(x)) with a residual; its norm n has no weights (they would fold into the MLP's first layer), so that
a system of n levels has exactly the parameters of one gated MLP of the summed hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nestlearn.errors import UserError, suggest
from nestlearn.levels import Level
from nestlearn.models.mlp import GatedMLP
from nestlearn.ops.pointwise import rms_norm

CONNECTIONS = ("sequential", "nested", "independent")


class Continuum(nn.Module):
    """A system of levels of the given total hidden width; ``levels`` fastest first."""

    def __init__(
        self, width: int, hidden: int, levels: Sequence[Level], connection: str = "sequential", eps: float = 1e-6
    ) -> None:
        super().__init__()
        if connection not in CONNECTIONS:
            near = suggest(str(connection), CONNECTIONS)
            raise UserError(f"connection is {connection!r}, must be one of {list(CONNECTIONS)}{near}")
        self.levels, self.connection, self.eps = tuple(levels), connection, eps
        hiddens = split_hidden(hidden, levels, connection)
        self.blocks = nn.ModuleDict({level.name: GatedMLP(width, h) for level, h in zip(levels, hiddens, strict=True)})
        self.weights = nn.Parameter(torch.ones(len(levels))) if connection == "independent" else None

    def forward(self, x: Tensor) -> Tensor:
        """x (…, width) to the same shape."""
        return self.run(x)[-1]

    def run(self, x: Tensor) -> list[Tensor]:
        """The output of each level's block (in level order), then the system's output."""
        outputs: list[Tensor] = []
        if self.weights is not None:
            normed = self._norm(x)
            for weight, (_, block) in zip(self.weights, self.by_level(), strict=True):
                outputs.append(block(normed))
                x = x + weight * outputs[-1]
            return [*outputs, x]
        for _, block in self.by_level():
            outputs.append(block(self._norm(x)))
            x = x + outputs[-1]
        return [*outputs, x]

    def by_level(self) -> list[tuple[Level, GatedMLP]]:
        """Every level with its block, fastest first."""
        return list(zip(self.levels, cast(list[GatedMLP], list(self.blocks.values())), strict=True))

    def _norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, None, self.eps)

    @torch.no_grad()
    def restart(self, fired: set[float]) -> None:
        """Nested only: after levels of these periods stepped, every faster level restarts from the next slower one."""
        if self.connection != "nested":
            return
        stepped = max((i for i, level in enumerate(self.levels) if level.period in fired), default=0)
        blocks = [block for _, block in self.by_level()]
        for faster in reversed(range(stepped)):
            for ours, theirs in zip(blocks[faster].parameters(), blocks[faster + 1].parameters(), strict=True):
                ours.copy_(theirs)


def split_hidden(total: int, levels: Sequence[Level], connection: str) -> list[int]:
    """Hidden width of each level: its own, or an equal share of what the others leave of ``total``."""
    open_levels = [level for level in levels if level.hidden_size is None]
    left = total - sum(level.hidden_size or 0 for level in levels)
    if (open_levels and left < len(open_levels)) or (not open_levels and left != 0):
        named = {level.name: level.hidden_size for level in levels}
        raise UserError(
            f"intermediate_size is {total}, but the levels take {named}: it must be the sum over the levels, with "
            "at least 1 for each level that names none"
        )
    shares = iter([left // len(open_levels) + (i < left % len(open_levels)) for i in range(len(open_levels))])
    hiddens = [next(shares) if level.hidden_size is None else level.hidden_size for level in levels]
    if connection == "nested" and len(set(hiddens)) > 1:
        raise UserError(
            f"nested levels have the hidden widths {hiddens}: a level restarts from the next slower one, so all must "
            "be equal; choose an intermediate_size divisible by the number of levels"
        )
    return hiddens
