"""Steps every level on its own period: one optimizer, many frequencies (NL Eq. 71).

    c ← c + n g,   N ← N + n                          each step, g the mean gradient of its n tokens
    θ ← optimizer(θ, c / N),   c ← 0,   N ← 0         at the first step boundary at or after each multiple of the period

    θ  parameters of a level        period  tokens between two changes of θ (inf: never)
    c  its chunk's gradient sum     N       tokens in that sum

NL Eq. 71 sums the errors of the chunk; the mean is used here, so that a learning rate means the same at every period.
Between two changes the optimizer does not see a level at all: no step, no weight decay, no moment moves by one bit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.optim import Optimizer

from nestlearn.errors import UserError
from nestlearn.levels import fires
from nestlearn.optim.dgd import InputOptimizer
from nestlearn.optim.rounding import ROUNDED_OFF, in_float32

CHUNK_GRADIENT = "chunk_gradient"  # in optimizer.state[parameter]: c above, absent while the chunk is empty
LEVEL_DEFAULTS: dict[str, Any] = {"period": 1, "tokens_seen": 0, "chunk_tokens": 0}  # in every parameter group


class Leveled(Optimizer):
    """A ``torch.optim.Optimizer`` that wraps another one and steps every parameter group on its own period.

    optimizer_factory  builds the wrapped optimizer from a list of groups, e.g. ``partial(torch.optim.AdamW, lr=3e-3)``
    groups             parameters, or dicts of them as torch.optim takes, each with a ``period`` in tokens
                       (default 1: every step; ``math.inf``: never, and no state is held for it)
    tokens_per_step    tokens behind one ``.step()``, for callers that cannot pass ``tokens``; None: pass it to ``step``
    keep_rounding      steps float16 and bfloat16 parameters in float32 and keeps what their rounding takes away in
                       ``state[parameter]["rounded_off"]``, with the optimizer's own state in float32 (`rounding.py`)

    Param groups and state are those of the wrapped optimizer, so schedulers and gradient clipping work as usual. The
    open chunk's gradient lives in ``state[parameter]["chunk_gradient"]``, at least in float32, and is part of
    ``state_dict()``; ``.grad`` is left as ``step`` found it. A parameter without a gradient adds zero to its chunk.

    An optimizer whose own ``step`` takes ``tokens`` (those of `nestlearn.optim`: M3's slow period can be in tokens) is
    told the tokens of the chunk that it learns from, for each level its own. Periods in steps count steps of the level.
    One that needs the inputs of the layers, such as DGD, finds those of the whole chunk, as if it had been one batch.

    Raises UserError for a period or a token count that is not a whole number >= 1, and for a state of DGD and its like
    that was saved within a chunk: the inputs are not part of it.
    """

    def __init__(
        self,
        optimizer_factory: Callable[[list[dict[str, Any]]], Optimizer],
        groups: Iterable[Any],
        *,
        tokens_per_step: int | None = None,
        keep_rounding: bool = False,
    ) -> None:
        self.keep_rounding = keep_rounding
        self.inner: Optimizer | None = None
        self.tokens_per_step = None if tokens_per_step is None else _whole(tokens_per_step, "tokens_per_step")
        self.fired: frozenset[float] = frozenset()  # periods that stepped in the last step()
        super().__init__(groups, LEVEL_DEFAULTS.copy())
        self.inner = optimizer_factory(self.param_groups)
        self._inner_takes_tokens = "tokens" in inspect.signature(self.inner.step).parameters
        self.defaults = self.inner.defaults | LEVEL_DEFAULTS
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @property
    def tokens_seen(self) -> int:
        """Tokens of all steps so far."""
        return self.param_groups[0]["tokens_seen"] if self.param_groups else 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        period = param_group.get("period", LEVEL_DEFAULTS["period"])
        param_group["period"] = math.inf if period == math.inf else _whole(period, "the period of a parameter group")
        param_group.setdefault("tokens_seen", self.tokens_seen)
        param_group.setdefault("chunk_tokens", 0)
        owner = super() if self.inner is None else self.inner
        owner.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, tokens: int | None = None) -> Any:  # pyright: ignore
        """One step boundary, ``tokens`` after the last one. Returns the closure's value."""
        tokens = self._tokens(tokens)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        firing = [group for group in self.param_groups if self._advance(group, tokens)]
        ages = [group["chunk_tokens"] or tokens for group in firing]
        with _chunk_means_as_grad(firing, self.state):
            self._step_only(firing, ages)
        self.fired = frozenset(group["period"] for group in firing)
        return loss

    def state_dict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert self.inner is not None
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The chunks go around the wrapped optimizer's loading: it takes any state for its own and may cast it.
        kept = (CHUNK_GRADIENT, ROUNDED_OFF)
        moments = {k: {n: v for n, v in s.items() if n not in kept} for k, s in state_dict["state"].items()}
        assert self.inner is not None
        self.inner.load_state_dict(state_dict | {"state": {k: s for k, s in moments.items() if s}})
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(indices, parameters, strict=True):
            saved = state_dict["state"].get(index, {})
            if CHUNK_GRADIENT in saved:
                self._refuse_without_inputs()
            for name, value in saved.items():
                if name in kept or (self.keep_rounding and isinstance(value, torch.Tensor) and value.ndim):
                    self.state[p][name] = value.to(p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("Leveled is not pickled or deep-copied: save state_dict() and load it into a new Leveled")

    def _refuse_without_inputs(self) -> None:
        if isinstance(self.inner, InputOptimizer):
            name = type(self.inner).__name__
            raise UserError(
                f"{name} was saved within a chunk, and the inputs of a chunk are not part of its state: "
                "save where every level has just stepped, after a multiple of all periods"
            )

    def _tokens(self, tokens: int | None) -> int:
        if tokens is None:
            tokens = self.tokens_per_step
        if tokens is not None:
            return _whole(tokens, "tokens of one step")
        slow = [group["period"] for group in self.param_groups if 1 < group["period"] < math.inf]
        if slow:
            raise UserError(f"the periods {slow} are in tokens: call step(tokens=...) or set tokens_per_step")
        return 1

    def _advance(self, group: dict[str, Any], tokens: int) -> bool:
        """Moves the group's clock; whether it fires. Its chunk grows unless it is just this step, or it never fires."""
        before = group["tokens_seen"]
        group["tokens_seen"] = before + tokens
        firing = fires(group["period"], before, before + tokens)
        if group["period"] != math.inf and (not firing or group["chunk_tokens"]):
            group["chunk_tokens"] += tokens
            _accumulate(group["params"], self.state, tokens)
        return firing

    def _step_only(self, groups: list[dict[str, Any]], ages: list[int]) -> None:
        """Steps these groups and no others; ``ages`` are the tokens behind each one's gradient."""
        assert self.inner is not None
        told = sorted(set(ages)) if self._inner_takes_tokens else [None]
        try:
            for tokens in told if groups else ():
                own = [g for g, age in zip(groups, ages, strict=True) if tokens in (None, age)]
                self.inner.param_groups = own
                options: dict[str, Any] = {} if tokens is None else {"tokens": tokens}
                wide = (p for group in own for p in group["params"])
                with in_float32(wide, self.state) if self.keep_rounding else nullcontext():
                    self.inner.step(**options)
        finally:
            self.inner.param_groups = self.param_groups


def _accumulate(parameters: list[torch.Tensor], state: Any, tokens: int) -> None:
    for p in parameters:
        if p.grad is None:
            continue
        if CHUNK_GRADIENT not in state[p]:
            state[p][CHUNK_GRADIENT] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        state[p][CHUNK_GRADIENT].add_(p.grad, alpha=tokens)


@contextmanager
def _chunk_means_as_grad(groups: list[dict[str, Any]], state: Any) -> Iterator[None]:
    """Within, ``.grad`` is the mean gradient of each group's finished chunk, the chunks are empty; after, as before.

    A chunk of one step needs no mean: its ``.grad`` is used as it is, bit for bit what a plain optimizer would see.
    """
    before: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for group in groups:
        for p in group["params"]:
            if CHUNK_GRADIENT in state.get(p, ()):
                before.append((p, p.grad))
                p.grad = (state[p].pop(CHUNK_GRADIENT) / group["chunk_tokens"]).to(p.dtype)
        group["chunk_tokens"] = 0
    try:
        yield
    finally:
        for p, gradient in before:
            p.grad = gradient


def _whole(value: Any, name: str) -> int:
    if not value >= 1 or value == math.inf or value != int(value):
        raise UserError(f"{name} is {value}: must be a whole number of tokens, at least 1")
    return int(value)
