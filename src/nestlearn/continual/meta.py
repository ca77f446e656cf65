"""Training that knows it will be adapted: the gradient of a start from which levels learn in context (NL §7.1).

    pieces    the segments of `online.py`: they end at every multiple of every active level's period
    inner     Δ_{k+1} = change(Δ_k, ∇_Δ ℓ_k)        ℓ_k  summed nats of piece k, read with W + Δ_k; the rules of §1
    outer     L = Σ_k ℓ_k(W + Δ_k) / n                n    tokens that were predicted, over all rows

    "first"   ∇L with every ∇_Δ ℓ_k and every context taken as constants: a piece's one backward pass gives both the
              inner step and its share of the outer gradient. The memory is that of one piece.
    "exact"   ∇L through the inner steps, second order, and through the contexts: backpropagation through the pieces,
              each computed a second time with its graph when its turn comes. The memory is that of one piece, and one
              copy of the state (Δ, the rule's memory, the context) for each piece.

The inner rates are learned too: λ = log η of each level. In the first order ∂Δ/∂λ is carried forward beside Δ, so that
a piece gives ∂L/∂λ += ⟨∇_Δ ℓ_k, ∂Δ_k/∂λ⟩; a nested level, which restarts from a slower one, takes over that one's. A
level that is absent (lr 0, period inf) cuts nothing: without levels both orders are the ordinary gradient. There is no
going back after a spike: training has its own guard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestlearn.continual import learning
from nestlearn.continual.context import Context, read_cache, write_cache
from nestlearn.continual.delta import Delta
from nestlearn.continual.online_level import OnlineLevel, check_levels, find_linear, is_conv1d, online_levels
from nestlearn.continual.plan import check_shapes, context_limit
from nestlearn.continual.seam import Whole, active, attach
from nestlearn.continual.stream_state import LevelState, total_norm
from nestlearn.errors import UserError, suggest
from nestlearn.memory.state import State
from nestlearn.models.hf import HopeForCausalLM

ORDERS = ("first", "exact")
ONCE = ("m3",)  # rules whose update is written in place, so that nothing can be differentiated through it
Slopes = dict[int, tuple[Tensor, ...]]  # of one level: by each level's λ that it depends on, beside its tensors
_TWICE = ("second derivative", "once_differentiable", "is not implemented", "modified by an inplace")


@dataclass(frozen=True)
class _Piece:
    """Targets begin … end − 1; the levels that step at its end; whether the context is emptied there."""

    begin: int
    end: int
    fired: tuple[int, ...]
    emptied: bool


@dataclass(frozen=True)
class _Start(State):
    """What a piece starts from: the active levels, and the model's context."""

    levels: tuple[LevelState, ...]
    context: Context | None


class MetaLearner:
    """The gradient of a model that will be read with ``OnlineLearner(model, levels)``.

    model      a Hugging Face causal language model with weights in float32 or float64
    levels     OnlineLevel objects, fastest first, whose lr is where the learned rates start; None: the model's own
    order      "first" or "exact", see above
    connection, context   as in OnlineLearner
    log_rates  (n,) a parameter to learn the rates of the n active levels in; None: a new one, of the levels' lr

    Raises UserError for levels, rules or models that this cannot differentiate.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Iterable[OnlineLevel] | None = None,
        *,
        order: str = "first",
        connection: str = "sequential",
        context: float | None = None,
        log_rates: nn.Parameter | None = None,
    ) -> None:
        if order not in ORDERS:
            raise UserError(f"order is {order!r}, must be one of {list(ORDERS)}{suggest(str(order), ORDERS)}")
        self.model, self.order, self.connection = model, order, connection
        self._all = check_levels(online_levels(model) if levels is None else levels, connection)
        self._levels = tuple(level for level in self._all if level.active)
        self._modules = {path: find_linear(model, path) for level in self._levels for path in level.weights}
        self._limit = context_limit(model, context)
        self._check()
        if log_rates is None:
            start = torch.tensor([level.lr for level in self._levels], dtype=torch.float64).log()
            log_rates = nn.Parameter(start.to(next(model.parameters())))
        self.log_rates = log_rates
        attach(model, self._modules)

    @property
    def levels(self) -> tuple[OnlineLevel, ...]:
        """With the rates as learned so far: ``OnlineLearner(model, learner.levels)`` reads with them."""
        rates = iter(self.log_rates.detach().double().exp().tolist())
        return tuple(replace(level, lr=next(rates)) if level.active else level for level in self._all)

    def backward(self, tokens: Tensor, rate_scale: float = 1.0) -> Tensor:
        """Adds ∇L to ``.grad`` of the model's parameters and of ``log_rates``, as ``loss.backward()`` does.

        tokens (B, N), N >= 2: rows are separate streams from their start. rate_scale: multiplies every inner rate.
        Returns the nats of each token given all before it (B, N − 1), float32 at least, as OnlineLearner reads them.
        """
        tokens = self._checked(tokens)
        backward = self._first if self.order == "first" else self._exact
        return backward(tokens, self._pieces(tokens.shape[1]), rate_scale)

    # The two orders.

    def _first(self, tokens: Tensor, pieces: Sequence[_Piece], scale: float) -> Tensor:
        start, losses = self._begin(len(tokens)), []
        slopes: list[Slopes] = [{} for _ in start.levels]
        count = tokens[:, 1:].numel()
        for piece in pieces:
            start = _leaves(start, deltas_only=True)
            each, context = self._read(start, tokens, piece)
            (each.sum() / count).backward()
            losses.append(each.detach())
            with torch.no_grad():
                self._add_rate_gradient(start.levels, slopes)
                grads = [[_gradient(d) * count for d in state.deltas] for state in start.levels]
                start = self._closed(_Start(start.levels, context).detach(), grads, each, piece)
                start, slopes = self._stepped_with_slope(start, slopes, piece, scale)
        return torch.cat(losses, dim=1)

    def _exact(self, tokens: Tensor, pieces: Sequence[_Piece], scale: float) -> Tensor:
        starts, count = [self._begin(len(tokens))], tokens[:, 1:].numel()
        for piece in pieces[:-1]:
            starts.append(self._advance(_leaves(starts[-1], deltas_only=True), tokens, piece, scale, graph=False)[1])
        losses: list[Tensor] = []
        after: list[Tensor | None] = []
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            for piece in reversed(pieces):
                start = _leaves(starts.pop())
                last = piece is pieces[-1]
                if last:
                    each, end = self._read(start, tokens, piece)[0], None
                else:
                    each, end = self._advance(start, tokens, piece, scale, graph=True)
                _backward(each.sum() / count, end, after)
                after = [t.grad for t in start.tensors()]
                losses.insert(0, each.detach())
        return torch.cat(losses, dim=1)

    def _advance(
        self, start: _Start, tokens: Tensor, piece: _Piece, scale: float, *, graph: bool
    ) -> tuple[Tensor, _Start]:
        """A piece read and its inner steps made: losses (B, T), and what the next piece starts from."""
        each, context = self._read(start, tokens, piece)
        leaves = [d.dense for state in start.levels for d in state.deltas]
        try:
            found = iter(torch.autograd.grad(each.sum(), cast(Any, leaves), create_graph=graph, retain_graph=graph))
        except RuntimeError as error:
            raise _cannot(self.model, error) from error
        with torch.set_grad_enabled(graph):
            grads = [[next(found) for _ in state.deltas] for state in start.levels]
            end = self._closed(_Start(start.levels, context), grads, each, piece)
            levels = [
                self._stepped(i, s, self._rate(i, scale)) if i in piece.fired else s for i, s in enumerate(end.levels)
            ]
            for i in self._restarting(piece):
                levels[i] = learning.restarted(levels[i], levels[i + 1])
        end = _Start(tuple(levels), end.context)
        return each, end if graph else end.detach()

    # One piece.

    def _read(self, start: _Start, tokens: Tensor, piece: _Piece) -> tuple[Tensor, Context]:
        """Losses (B, T) of a piece read with W + Δ, and the context after it, both with their graph."""
        inputs, targets = tokens[:, piece.begin - 1 : piece.end - 1], tokens[:, piece.begin : piece.end]
        with torch.enable_grad(), active(self._whole(start.levels)):
            cache = write_cache(start.context, self.model)
            out = self.model(input_ids=inputs, past_key_values=cache, use_cache=True)
        logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        return losses, read_cache(out.past_key_values)

    def _whole(self, levels: Sequence[LevelState]) -> dict[str, tuple[Whole, ...]]:
        """W + ΣΔ (B, out, in) of every weight, differentiable in both."""
        found = {path: _matrix(module) for path, module in self._modules.items()}
        for level, state in zip(self._levels, levels, strict=True):
            for path, delta in zip(level.weights, state.deltas, strict=True):
                found[path] = found[path] + delta.matrix()
        return {path: (Whole(weight),) for path, weight in found.items()}

    def _closed(self, start: _Start, grads: Sequence[Sequence[Tensor]], each: Tensor, piece: _Piece) -> _Start:
        """The piece's gradients wait for their levels' periods to end; the context is emptied where that is due."""
        loss, fine = each.detach().sum(dim=1), torch.ones(len(each), dtype=torch.bool, device=each.device)
        levels = tuple(
            learning.collect(state, [Delta(dense=g) for g in own], loss, fine, each.shape[1])
            for state, own in zip(start.levels, grads, strict=True)
        )
        return _Start(levels, None if piece.emptied else start.context)

    def _stepped(self, i: int, state: LevelState, rate: Tensor) -> LevelState:
        """The change of level i at the end of its period, as OnlineLearner makes it."""
        if state.losses == 0:
            return state
        level = self._levels[i]
        norms = [_matrix(self._modules[path]).norm() for path in level.weights]
        surprise = total_norm(state.pending) / state.losses
        deltas, memory, _ = learning.changed(level, state, state.pending, surprise, norms, rate)
        zeros = tuple(Delta(dense=torch.zeros_like(p.matrix())) for p in state.pending)
        return replace(
            state,
            deltas=deltas, memory=memory, pending=zeros, loss=torch.zeros_like(state.loss),
            losses=0, steps=state.steps + 1,
        )  # fmt: skip

    def _restarting(self, piece: _Piece) -> Iterable[int]:
        """Nested: the levels that take over the next slower one's Δ at the end of a piece, the slowest first."""
        return reversed(range(max(piece.fired, default=0))) if self.connection == "nested" else ()

    # Learned rates in the first order.

    def _stepped_with_slope(
        self, start: _Start, slopes: list[Slopes], piece: _Piece, scale: float
    ) -> tuple[_Start, list[Slopes]]:
        """The changes, and beside every tensor of a level its derivatives (forward mode)."""
        levels, slopes = list(start.levels), list(slopes)
        for i in piece.fired:
            after, found = levels[i], {}
            for j in {i, *slopes[i]}:
                with forward_ad.dual_level():
                    rate = self._rate(i, scale).detach()
                    dual = _with_slopes(levels[i], slopes[i].get(j))
                    # dη/dλ = η
                    end = self._stepped(i, dual, forward_ad.make_dual(rate, rate) if i == j else rate)
                    found[j] = tuple(_slope(t) for t in end.tensors())
                    after = end.map(lambda t: forward_ad.unpack_dual(t).primal.detach())
            levels[i], slopes[i] = after, found
        for i in self._restarting(piece):
            count = len(levels[i].deltas)  # a state's deltas are its first tensors; all else starts anew
            levels[i] = learning.restarted(levels[i], levels[i + 1])
            rest = tuple(t.new_zeros(()) for t in levels[i].tensors())[count:]
            slopes[i] = {j: (*own[:count], *rest) for j, own in slopes[i + 1].items()}
        return _Start(tuple(levels), start.context), slopes

    def _add_rate_gradient(self, levels: Sequence[LevelState], slopes: list[Slopes]) -> None:
        """∂L/∂λ += ⟨∇_Δ L, ∂Δ/∂λ⟩."""
        found = torch.zeros_like(self.log_rates)
        for state, of_level in zip(levels, slopes, strict=True):
            for j, own in of_level.items():
                for delta, slope in zip(state.deltas, own, strict=False):
                    found[j] += (_gradient(delta) * slope).sum()
        self.log_rates.grad = found if self.log_rates.grad is None else self.log_rates.grad + found

    def _rate(self, i: int, scale: float) -> Tensor:
        return scale * self.log_rates[i].exp()

    # Before the first piece.

    def _begin(self, rows: int) -> _Start:
        """Nothing read, nothing learned."""
        levels = []
        for level in self._levels:
            matrices = [_matrix(self._modules[path]) for path in level.weights]
            zeros = [Delta(dense=m.new_zeros(rows, *m.shape)) for m in matrices]
            levels.append(learning.initial_level(replace(level, spike=math.inf), zeros))
        return _Start(tuple(levels), None)

    def _pieces(self, length: int) -> list[_Piece]:
        ends = {length} | {e for level in self._levels for e in range(int(level.period), length, int(level.period))}
        if self._limit != math.inf:
            ends |= set(range(int(self._limit), length, int(self._limit)))
        pieces, begin = [], 1
        for end in sorted(e for e in ends if e > 1):
            fired = tuple(i for i, level in enumerate(self._levels) if end % level.period == 0)
            pieces.append(_Piece(begin, end, fired, end % self._limit == 0))
            begin = end
        return pieces

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.shape[1] < 2 or tokens.is_floating_point():
            raise UserError(f"tokens are {tuple(tokens.shape)} of {tokens.dtype}, must be whole numbers (B, N >= 2)")
        periods = [level.period for level in self._levels]
        if periods and min(periods) >= tokens.shape[1]:
            raise UserError(
                f"the levels' periods are {[int(p) for p in periods]}, but a sequence has {tokens.shape[1]} tokens: no "
                "level would learn within it; give longer sequences or a period below their length"
            )
        return tokens.to(next(self.model.parameters()).device, torch.long)

    def _check(self) -> None:
        for path, module in self._modules.items():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter) or weight.dtype not in (torch.float32, torch.float64):
                kind = getattr(weight, "dtype", None)
                raise UserError(f"{path!r} has a weight of {kind}, must be float32 or float64: load the model so")
        if self.connection == "nested":
            check_shapes(self._levels, {path: tuple(_matrix(m).shape) for path, m in self._modules.items()})
        if self.order == "first":
            return
        for level in self._levels:
            if level.rule in ONCE:
                raise UserError(f"level {level.name!r}: rule {level.rule!r} has no second order: set order='first'")
        self._check_above_memories()

    def _check_above_memories(self) -> None:
        """What comes after a weight is differentiated twice: of the last block's MLPs that is no memory."""
        config: Any = self.model.config
        writes = isinstance(self.model, HopeForCausalLM) and config.mixer == "self_modifying"
        if not (writes and (config.memory or {}).get("recompute", False)):
            return
        last = config.num_hidden_layers - 1
        if below := [path for path in self._modules if not path.startswith(f"model.blocks.{last}.cms.")]:
            raise UserError(
                f"order is 'exact', which differentiates twice what comes after {below[0]!r}, but this model's memory "
                "has recompute=True, which can be differentiated once: set memory={'recompute': False} in its "
                "HopeConfig, or order='first', or give levels of the last block's MLPs alone (a level's layers)"
            )


def _matrix(module: nn.Module) -> Tensor:
    """W (out, in), with its graph."""
    weight = cast(Tensor, module.weight)
    return weight.mT if is_conv1d(module) else weight


def _gradient(delta: Delta) -> Tensor:
    """Of a leaf; zeros where the loss does not depend on it."""
    leaf = delta.matrix()
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _leaves(start: _Start, deltas_only: bool = False) -> _Start:
    """The same numbers as leaves that collect gradients; whole numbers and booleans stay as they are."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_() if t.is_floating_point() else t

    if not deltas_only:
        return start.map(leaf)
    levels = tuple(replace(s, deltas=tuple(d.map(leaf) for d in s.deltas)) for s in start.levels)
    return replace(start, levels=levels)


def _backward(loss: Tensor, end: _Start | None, after: Sequence[Tensor | None]) -> None:
    """Adds to every leaf the gradient of the loss and of what the later pieces made of ``end``."""
    pairs = [] if end is None else list(zip(end.tensors(), after, strict=True))
    pairs = [(t, g) for t, g in pairs if g is not None and t.requires_grad]
    torch.autograd.backward([loss, *(t for t, _ in pairs)], [torch.ones_like(loss), *(g for _, g in pairs)])


def _with_slopes(state: LevelState, slopes: tuple[Tensor, ...] | None) -> LevelState:
    """Dual numbers where a slope is known; None: nowhere."""
    own = iter(slopes or [t.new_zeros(()) for t in state.tensors()])

    def dual(t: Tensor) -> Tensor:
        slope = next(own)
        return forward_ad.make_dual(t.detach(), slope) if slope.dim() else t

    return state.map(dual)


def _slope(t: Tensor) -> Tensor:
    """Of a dual number; () where it has none, which is zero."""
    slope = forward_ad.unpack_dual(t).tangent
    return torch.zeros((), dtype=t.dtype, device=t.device) if slope is None else slope.detach()


def _cannot(model: nn.Module, error: RuntimeError) -> Exception:
    """A clear error where a model's own code has no second derivative, else the error itself."""
    if not any(sign in str(error) for sign in _TWICE):
        return error
    return UserError(f"{type(model).__name__} cannot be differentiated twice ({error}): set order='first'")
