"""What a model felt while it read a held-out passage: the numbers of `model.trace`, and the text as it can be shown."""

import codecs
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nestlearn.models.trace import MemorySignal

MEMORIES = ("memory", "k", "v", "eta", "alpha")  # in the order in which they are shown
SHOWN_AS = {" ": "·", "\n": "↵", "\t": "⇥", "\x1c": "¶"}  # the last is the separator between documents


@dataclass(frozen=True, eq=False)
class Signal:
    """What one memory or CMS level felt, each (T,) float64 or None."""

    group: str
    name: str
    period: float
    surprise: np.ndarray
    rate: np.ndarray | None
    retain: np.ndarray | None
    norm: np.ndarray | None

    @property
    def order(self) -> float:
        """The memories in their order, then the levels from fast to slow."""
        if not self.is_memory:
            return len(MEMORIES) + self.period
        return MEMORIES.index(self.name) if self.name in MEMORIES else len(MEMORIES)

    @property
    def is_memory(self) -> bool:
        return self.rate is not None

    @property
    def css(self) -> str:
        return f"m-{self.name}" if self.name in MEMORIES else "m-other"


@dataclass(frozen=True, eq=False)
class Passage:
    """T tokens of text: `texts` (T strings as shown), `loss` (T,) bits to predict each one (NaN for the first)."""

    texts: tuple[str, ...]
    loss: np.ndarray
    signals: tuple[Signal, ...]
    source: str | None = None

    @property
    def groups(self) -> list[str]:
        """The layers, in the model's order."""
        return list(dict.fromkeys(signal.group for signal in self.signals))

    def memories(self, group: str) -> list[Signal]:
        return sorted((s for s in self.signals if s.group == group and s.is_memory), key=lambda s: s.order)

    def levels(self, group: str) -> list[Signal]:
        return sorted((s for s in self.signals if s.group == group and not s.is_memory), key=lambda s: s.order)


def passage(
    pieces: Sequence[bytes], loss_nats: Tensor, signals: Sequence[MemorySignal], source: str | None = None
) -> Passage:
    """From the bytes of each token, the loss (T-1,) in nats and the signals of `model.trace`."""
    loss = np.concatenate([[np.nan], loss_nats.double().numpy() / np.log(2)])
    return Passage(tuple(visible(pieces)), loss, tuple(_signal(s) for s in signals), source)


def visible(pieces: Sequence[bytes]) -> list[str]:
    """Each token's bytes as characters that can be seen; "‥" stands for bytes whose character is still to come."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    return ["".join(map(_visible, decode(piece))) or "‥" for piece in pieces]


def _visible(char: str) -> str:
    if char in SHOWN_AS:
        return SHOWN_AS[char]
    return char if char.isprintable() and not unicodedata.combining(char) else "▯"


def _signal(raw: MemorySignal) -> Signal:
    """A component is named "layer 0 / M_eta" or "layer 0 / CMS every-512"."""
    group, _, name = raw.component.partition(" / ")
    name = name.removeprefix("M_").removeprefix("CMS ")
    rate, retain, norm = (None if v is None else v.double().numpy() for v in (raw.rate, raw.retain, raw.norm))
    return Signal(group, name, raw.period, raw.surprise.double().numpy(), rate, retain, norm)
