"""An encoder with a classification head: one that is trained, or one that is a memory.

    linear   y = W f · sharpness + b                              W, b trained by gradient, from zero
    memory   y = cos(f, M_c) · sharpness,   M_c ← M_c + f     a Hebbian write of every example (NL Eq. 64)

    f  feature of a text, of length one        M_c  what class c remembers: the sum of its examples' features

The memory is a level of its own, the fastest: it changes with each example. Classes that have not come yet score −inf.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.continual.encoder import Encoded, Encoder

HEADS = ("linear", "memory")
SHARPNESS = 16.0  # of the softmax over cosines


class LinearHead(nn.Module):
    """A linear map from zero."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, classes)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(SHARPNESS * features)  # of length one, too short for a softmax


class MemoryHead(nn.Module):
    """One vector for each class."""

    memory: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(classes, width))

    def forward(self, features: Tensor) -> Tensor:
        return SHARPNESS * features @ F.normalize(self.memory, dim=-1).T

    @torch.no_grad()
    def write(self, features: Tensor, labels: Tensor) -> None:
        """features (n, width), labels (n,)."""
        self.memory.index_add_(0, labels, features)

    @torch.no_grad()
    def forget(self, classes: Sequence[int]) -> None:
        self.memory[list(classes)] = 0


class Classifier(nn.Module):
    """Scores (n, classes) of texts. ``reads``: also reads the pretrained feature, beside that of the encoder as it is.

    The pretrained feature is the read of the frozen level. It never goes stale, whatever the others have unlearned.
    """

    def __init__(self, encoder: Encoder, head: str, classes: int, *, reads: bool = False) -> None:
        super().__init__()
        self.encoder, self.config, self.reads = encoder, encoder.config, reads
        width = encoder.config.hidden_size * (2 if reads else 1)
        self.classifier: LinearHead | MemoryHead = (LinearHead if head == "linear" else MemoryHead)(width, classes)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    def features(self, batch: Encoded) -> Tensor:
        features = self.encoder(*batch.padded())
        return torch.cat((batch.frozen, features), dim=-1) / 2**0.5 if self.reads else features

    def forward(self, batch: Encoded) -> Tensor:
        return self.classifier(self.features(batch)).masked_fill(~self.seen, -torch.inf)

    def meet(self, classes: Sequence[int]) -> None:
        """From now on these classes are possible answers."""
        self.seen[list(classes)] = True
