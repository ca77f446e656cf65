"""What a self-modifying memory is made of: widths, chunks, and the switches of the ablation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from nestlearn.errors import UserError, suggest
from nestlearn.memory.deep import WriteRule

SLOW = ("k", "v", "eta", "alpha")
READ = ("before", "after")
KEEP = ("auto", "sqrt", "all")


class Part(NamedTuple):
    """Neighbours in the stack of memories whose chunks have the same ``length`` in tokens."""

    span: slice
    length: int


@dataclass(frozen=True)
class SelfModifyingConfig:
    """Widths, chunks and switches; the defaults of the switches are the letter of the paper unless noted.

    head_width, hidden_width, heads   d, h, H, each at least 1
    chunk, memory_chunk   tokens from one origin of the gradients to the next, of the slow memories and of M_memory;
                          memory_chunk divides chunk
    rate_max              upper end of η, finite and >= 0; 0 never writes
    momentum              μ in [0, 1)
    objective             "dot" (default: with DGD it is the delta rule, S x → v̂), "l2", or "mix": e = λ M(k) − v̂ with
                          a learned λ for each memory and head. The last two are bounded at chunk 1 without momentum
    mix_start             λ at the start, in (0, 1); several values spread the heads as for rate_start
    target_norm           "l2" (default: bounded writes) or "none" (the letter; unstable)
    adaptive              which of k, v, eta, alpha adapt; "q" adds an adaptive query memory
    retention, dgd        False: α = 1; False: plain gradient descent
    retain_to             "zero" (the letter) or "initial"
    read                  y_t reads "before" (the letter) or "after" the write of token t
    rate_start, retain_start   η / rate_max and α for a zero input read-out, each in (0, 1); several values spread the
                          heads along them, in logits: memories of several time scales
    slow_rate_scale       start of rate_scale for k, v, eta, alpha; 1 is the letter
    w1_scale, w2_scale    spread of the initial weights, times 1/sqrt(fan-in)
    detach_writes         stop-gradient inner loop, an option for comparison
    recompute             lean backward pass; False stores everything and allows higher derivatives
    keep_every            the lean backward pass keeps the state of every n-th chunk and computes the others again:
                          n >= 1, "auto" (4), or "sqrt", the root of the sequence's number of chunks: least memory;
                          "all" keeps everything and computes nothing again, in plain torch only: elsewhere it is 1
    truncate              None, or n >= 1: gradients through the state stop at every n-th chunk boundary of a stream
    """

    head_width: int
    hidden_width: int
    heads: int = 1
    chunk: int = 64
    memory_chunk: int | None = None
    rate_max: float = 8.0
    momentum: float = 0.0
    objective: str = "dot"
    mix_start: float | tuple[float, ...] = 0.5
    target_norm: str = "l2"
    adaptive: tuple[str, ...] = SLOW
    retention: bool = True
    dgd: bool = True
    retain_to: str = "zero"
    rate_start: float | tuple[float, ...] = 0.5
    retain_start: float | tuple[float, ...] = 0.9999
    slow_rate_scale: float = 1.0
    w1_scale: float = 1.0
    w2_scale: float = 1.0
    read: str = "before"
    detach_writes: bool = False
    recompute: bool = True
    keep_every: int | str = "auto"
    truncate: int | None = None
    # all memories in the order of their stack, static ones, adaptive ones, then "memory"; and those that change
    names: tuple[str, ...] = field(init=False, repr=False, compare=False)
    written: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.adaptive, str) or not isinstance(self.adaptive, Iterable):
            raise UserError(f"adaptive is {self.adaptive!r}, must be a list of names, for example ['k', 'v']")
        object.__setattr__(self, "adaptive", tuple(self.adaptive))
        object.__setattr__(self, "memory_chunk", self.chunk if self.memory_chunk is None else self.memory_chunk)
        self._check_numbers()
        if self.chunk % self.memory_length:
            raise UserError(
                f"chunk is {self.chunk} and memory_chunk {self.memory_chunk}: chunk must be a multiple of memory_chunk"
            )
        for name in ("retention", "dgd", "detach_writes", "recompute"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is {getattr(self, name)!r}, must be True or False")
        if self.read not in READ:
            raise UserError(f"read is {self.read!r}, must be one of {list(READ)}{suggest(str(self.read), READ)}")
        for name in self.adaptive:
            if name not in (*SLOW, "q"):
                raise UserError(f"adaptive names {name!r}, must be among {[*SLOW, 'q']}{suggest(str(name), SLOW)}")
        _ = self.rule
        slow = (*SLOW, "q") if "q" in self.adaptive else SLOW
        static, changing = ([n for n in slow if (n in self.adaptive) is changes] for changes in (False, True))
        object.__setattr__(self, "written", (*changing, "memory"))
        object.__setattr__(self, "names", (*static, *self.written))

    def _check_numbers(self) -> None:
        for name in ("head_width", "hidden_width", "heads", "chunk", "memory_chunk"):
            value = getattr(self, name)
            if not _whole(value):
                raise UserError(f"{name} is {value!r}, must be a whole number, at least 1")
        if self.truncate is not None and not _whole(self.truncate):
            raise UserError(f"truncate is {self.truncate!r}, must be None or a whole number of chunks, at least 1")
        if self.keep_every not in KEEP and not _whole(self.keep_every):
            raise UserError(
                f"keep_every is {self.keep_every!r}, must be a whole number of chunks, at least 1, or of {list(KEEP)}"
            )
        for name in ("rate_max", "slow_rate_scale", "w1_scale", "w2_scale"):
            if not 0 <= _number(name, getattr(self, name)) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, must be finite and >= 0")
        for name in ("rate_start", "retain_start", "mix_start"):
            object.__setattr__(self, name, _start(name, getattr(self, name)))
        _number("momentum", self.momentum)

    @property
    def memory_length(self) -> int:
        """memory_chunk, resolved."""
        return self.chunk if self.memory_chunk is None else self.memory_chunk

    def kept_every(self, tokens: int) -> int:
        """keep_every for a sequence of so many tokens, 0 for everything."""
        if self.keep_every == "sqrt":
            return max(1, math.isqrt(-(-tokens // self.chunk)))
        return {"auto": 4, "all": 0}[self.keep_every] if isinstance(self.keep_every, str) else self.keep_every

    @property
    def rule(self) -> WriteRule:
        """How every memory writes."""
        return WriteRule(
            self.objective,
            self.momentum,
            self.dgd,
            self.retain_to,
            self.target_norm,
            detach_writes=self.detach_writes,
        )

    @property
    def constant(self) -> bool:
        """Whether no memory can ever change: rate 0, and nothing fades."""
        return self.rate_max == 0 and not self.retention

    @property
    def parts(self) -> tuple[Part, ...]:
        """The written memories by chunk length: all at once where it is the same, else "memory" by itself."""
        count = len(self.names)
        first = count - len(self.written)
        if self.memory_length == self.chunk or first == count - 1:
            return (Part(slice(first, count), self.memory_length),)
        return Part(slice(first, count - 1), self.chunk), Part(slice(count - 1, count), self.memory_length)


def _whole(value: object) -> bool:
    """Whether it is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _start(name: str, value: object) -> float | tuple[float, ...]:
    """A number in (0, 1) or several of them, a list as JSON has it included."""
    several = isinstance(value, list | tuple)
    values = tuple(_number(name, v) for v in (value if several else [value]))
    if not values or not all(0 < v < 1 for v in values):
        raise UserError(f"{name} is {value}, must be between 0 and 1, both excluded, or a list of such numbers")
    return values if several else values[0]


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} is {value!r}, must be a number")
    return value
