"""A model that learns while it reads: per-stream levels, changed by the next-token loss of what was just read.

    tokens    x_0 x_1 … ; the loss of token t is −log p(x_t | x_<t) and belongs to token t
    segments  end at every multiple of every active level's period (in tokens), and where the context is emptied
    forward   of a segment: its inputs are the tokens before its targets, x_{a−1} … x_{b−1} for the targets x_a … x_b

So the last token read has been predicted but is no input yet; it is the first input of what comes next, which is what
``generate()`` expects of a cache. Each token is one input once: one forward, and one backward at the segment's end, in
which gradients flow between all tokens of the segment and not beyond. A period of one token works like any other.
Tokens may come one at a time or all at once: segments do not depend on it. Between two reads the open segment's graph
is kept, so that nothing is computed twice; a state that is loaded or forked inside a segment holds the segment's
tokens, and these are read once more.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.continual import learning
from nestlearn.continual.context import Context, finite_rows, read_cache, repair, write_cache
from nestlearn.continual.online_level import OnlineLevel, online_levels
from nestlearn.continual.plan import make_plan
from nestlearn.continual.seam import Deltas, active, adapted_cache, attach, gradients
from nestlearn.continual.stream_state import HISTORY, VERDICTS, Mark, OnlineState, check_alike
from nestlearn.errors import UserError
from nestlearn.models.hf import HopeForCausalLM
from nestlearn.ops.inner_loop import storing


class RolledBack(UserWarning):
    """A level of a stream went back to its last good state, which the trace records too; or its context starts anew."""


@dataclass
class _Segment:
    """The open segment's graph: what a state cannot hold. Losses (B,) are summed over its tokens."""

    context: Context | None
    deltas: Deltas
    tape: dict[str, list[tuple[Tensor, Tensor]]]
    loss: Tensor | None = None
    losses: int = 0


class OnlineLearner:
    """Reads streams with a Hugging Face causal language model whose levels learn in context.

    model       its weights are never written; its linear modules are made to look for a stream's deltas (seam.py)
    levels      OnlineLevel objects, fastest first; None: the model's own levels (`online_levels`)
    connection  "sequential" and "independent": each level keeps its own Δ (the model says how their blocks connect);
                "nested": a faster level restarts from the next slower one's Δ each time that one steps
    context     tokens after which the model's cache is emptied (the levels keep what they learned): attention cannot
                read for ever. None: ``max_position_embeddings`` of an attention model, never for HOPE; inf: never

    Rows of a batch are separate streams of equal length. Raises UserError for bad levels, tokens or states.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Iterable[OnlineLevel] | None = None,
        *,
        connection: str = "sequential",
        context: float | None = None,
    ) -> None:
        own = online_levels(model) if levels is None else levels
        self.model = model
        self._plan = make_plan(model, own, connection, context)
        attach(model, self._plan.weights)
        self._segment: _Segment | None = None
        self._state = self._plan.empty(1)

    @property
    def levels(self) -> tuple[OnlineLevel, ...]:
        """Fastest first."""
        return self._plan.levels

    @property
    def state(self) -> OnlineState:
        """All that was read and learned. Assign another state of this model and these levels to go on from there."""
        return self._state

    @state.setter
    def state(self, state: OnlineState) -> None:
        if not isinstance(state, OnlineState):
            raise UserError(
                f"state is a {type(state).__name__}, must be an OnlineState: learner.state, or a loaded one"
            )
        check_alike(state, self._plan.made_by, self._plan.fingerprint)
        self._state, self._segment = state.to(self._plan.device), None

    def read(self, tokens: Tensor) -> Tensor:
        """Read on. tokens (B, T) or (T,), T >= 1; the first read decides B.

        Returns the nats of each token given all before it (B, T), or (T,), float32; nan for a stream's first token.
        """
        flat = tokens.dim() == 1
        tokens = self._checked(tokens[None] if flat else tokens)
        if self._state.tokens == 0 and self._state.rows != tokens.shape[0]:
            self._state = self._plan.empty(tokens.shape[0])
        losses = []
        with self._evaluation():
            while tokens.shape[1]:
                count = int(min(self._plan.room(self._state.tokens), tokens.shape[1]))
                losses.append(self._extend(tokens[:, :count]))
                tokens = tokens[:, count:]
                if self._plan.room(self._state.tokens - count) == count:
                    self._close()
        joined = torch.cat(losses, dim=1)
        return joined[0] if flat else joined

    def fork(self) -> OnlineLearner:
        """Another learner that goes on from here: what one reads does not touch the other."""
        other = object.__new__(OnlineLearner)
        other.__dict__.update(self.__dict__)
        other._segment = None
        return other

    def restart(self) -> None:
        """A new stream: nothing read, nothing learned, no marks."""
        self._state, self._segment = self._plan.empty(1), None

    def mark(self, name: str) -> None:
        """Give the state as it is now a name; a name that is taken moves here."""
        kept = tuple(m for m in self._marks if m.name != name)
        now = Mark(str(name), replace(self._state, marks=()))
        self._state = replace(self._state, marks=(*kept, now))

    def forget(self, name: str) -> None:
        """Back to a mark, as if nothing had been read since: levels, context and counts. Earlier marks stay."""
        names = [m.name for m in self._marks]
        if name not in names:
            raise UserError(f"the stream has no mark {name!r}: it has {names}, made by learner.mark(name)")
        earlier = self._marks[: names.index(name) + 1]
        self._state, self._segment = replace(earlier[-1].state, marks=earlier), None

    def drop_context(self) -> None:
        """The model's cache emptied, what the levels learned kept. An open segment's gradient is kept as well."""
        with self._evaluation():
            self._close(fire=False)
        self._state = replace(self._state, context=None)

    def cache(self) -> Any:
        """The stream as ``past_key_values``, deltas included, for any forward or ``generate()`` of this model.

        It does not hold the last token read, which is the first input of what comes next: `prompt` gives both.
        """
        return adapted_cache(self._context_now(), self.model, self._plan.in_use(self.model, self._state))

    def prompt(self, tokens: Tensor | None = None) -> dict[str, Any]:
        """Arguments for the model's own ``generate()`` to go on from here, after further tokens (B, T) if given."""
        last = self._state.last
        if last is None:
            raise UserError("nothing was read yet: read at least one token")
        ids = last if tokens is None else torch.cat([last, self._checked(tokens)], dim=1)
        context = self._context_now()
        if context is None:
            raise UserError("the context is empty: use `with learner.adapted(): model.generate(...)` with a prompt")
        cache = self.cache()
        mask = torch.ones(ids.shape[0], cache.get_seq_length() + ids.shape[1], dtype=torch.long, device=ids.device)
        return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}

    def generate(self, tokens: Tensor | None = None, **options: Any) -> Tensor:
        """The model's own ``generate()`` from here, after further tokens (B, T) if given; the stream stays where it is.

        Returns these and the new tokens. options: as generate takes them, ``max_new_tokens=20`` for example.
        """
        copies = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
        with self._evaluation():
            if self._context_now() is None:
                return self._generate_afresh(tokens, options)
            arguments = self.prompt(tokens)
            if copies > 1 and not isinstance(self.model, HopeForCausalLM):
                arguments["past_key_values"].batch_repeat_interleave(copies)  # Hugging Face repeats all but the cache
            found = self.model.generate(**arguments, **options)  # pyright: ignore
        return found[:, 1:] if isinstance(found, Tensor) else found

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Every forward of the model inside sees what the streams' levels have learned, and no context of theirs.

        It must read one row for each stream.
        """
        with active(self._plan.in_use(self.model, self._state)):
            yield

    # How a segment is read.

    def _extend(self, piece: Tensor) -> Tensor:
        """Reads tokens that end within the open segment. Returns their losses (B, T)."""
        last = self._state.last
        inputs = piece[:, :-1] if last is None else torch.cat([last, piece[:, :-1]], dim=1)
        targets = piece[:, piece.shape[1] - inputs.shape[1] :]
        segment = self._segment or self._reopened()
        losses = self._forward(segment, inputs, targets)
        self._segment = segment
        self._state = replace(
            self._state,
            open=torch.cat([self._state.open, inputs], dim=1),
            last=piece[:, -1:],
            tokens=self._state.tokens + piece.shape[1],
        )
        if not segment.tape:
            self._close()
        return F.pad(losses, (piece.shape[1] - inputs.shape[1], 0), value=math.nan)

    def _forward(self, segment: _Segment, inputs: Tensor, targets: Tensor) -> Tensor:
        """One forward: losses (B, T) without graph; the segment holds the graph."""
        if inputs.shape[1] == 0:
            return inputs.new_zeros(inputs.shape, dtype=torch.float32)
        tape = segment.tape or None
        with torch.set_grad_enabled(tape is not None), active(segment.deltas, tape), storing():
            cache = write_cache(segment.context, self.model)
            out = self.model(input_ids=inputs, past_key_values=cache, use_cache=True)
            logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
            segment.context = read_cache(out.past_key_values)
            total = losses.sum(dim=1)
            segment.loss = total if segment.loss is None else segment.loss + total
            segment.losses += inputs.shape[1]
        return losses.detach().float()

    def _reopened(self) -> _Segment:
        """The open segment at its start, or, of a state that was loaded or forked inside it, its tokens read again."""
        state, context = self._state, cast(Any, self._state.context)
        segment = _Segment(context, self._plan.in_use(self.model, state), {path: [] for path in self._plan.taped})
        if state.open.shape[1]:
            assert state.last is not None
            self._forward(segment, state.open, torch.cat([state.open[:, 1:], state.last], dim=1))
        return segment

    def _close(self, fire: bool = True) -> None:
        """The end of a segment: one backward pass, then the change of every level whose period ends here."""
        if self._segment is None and not self._state.open.shape[1]:
            return
        segment = self._segment or self._reopened()
        self._segment = None
        context = None if segment.context is None else segment.context.detach()
        if segment.tape and segment.loss is not None:
            context = self._collect(segment, context)
        elif segment.loss is not None and context is not None:
            context = self._sound(context, torch.isfinite(segment.loss))
        now, limit = self._state.tokens, self._plan.context
        emptied = fire and limit != math.inf and now % limit == 0
        self._state = replace(self._state, context=None if emptied else context, open=self._state.open[:, :0])
        if fire and segment.tape:
            self._change(now)

    def _collect(self, segment: _Segment, context: Context | None) -> Context | None:
        """The segment's gradients into the levels' pending ones; a broken row's context repaired."""
        assert segment.loss is not None and context is not None
        found, loss = gradients(segment.loss, segment.tape), segment.loss.detach()
        sizes = torch.stack([g.norm() for g in found.values()])
        finite = torch.isfinite(loss) & torch.isfinite(sizes).all(dim=0)
        levels = [
            learning.collect(state, [found[path] for path in level.weights], loss, finite, segment.losses)
            if level.active
            else state
            for level, state in zip(self.levels, self._state.levels, strict=True)
        ]
        self._state = replace(self._state, levels=tuple(levels))
        return self._sound(context, finite)

    def _sound(self, context: Context, finite: Tensor) -> Context:
        """The context after the open segment; of a row that is not finite, as it was before the segment.

        What was repaired once and breaks down in the next segment, too, would do so for ever: a memory that is finite,
        but so large that everything read with it overflows. Such a row starts a new context at this segment, and so
        does one that only reads, since nothing else of it can change.
        """
        if bool(finite.all()):
            return context
        repaired = repair(context, cast(Any, self._state.context), finite)
        known = self._state.trace[:, -1:, -1] == VERDICTS.index("not finite")
        stuck = ~finite & (known.any(dim=1) if any(level.active for level in self.levels) else True)
        if getattr(self.model, "state_grows", True) or not bool(stuck.any()):
            return repaired
        afresh = self._afresh()
        stuck = stuck & finite_rows(afresh)
        _warn_anew(stuck, self._state.tokens)
        return repair(repaired, afresh, ~stuck)

    @torch.no_grad()
    def _afresh(self) -> Context:
        """The context of a stream that begins with the open segment."""
        assert self._state.last is not None
        segment = _Segment(None, self._plan.in_use(self.model, self._state), {})
        self._forward(segment, self._state.open, torch.cat([self._state.open[:, 1:], self._state.last], dim=1))
        return cast(Context, segment.context)

    def _change(self, now: int) -> None:
        """Every level whose period ends at token ``now`` changes, fastest first; then nested levels restart."""
        levels, lines = list(self._state.levels), []
        fired = [i for i, level in enumerate(self.levels) if level.active and now % level.period == 0]
        for i in fired:
            if levels[i].losses == 0:
                continue
            level = self.levels[i]
            norms = [self._plan.weights[path].norm for path in level.weights]
            levels[i], judged = learning.end_period(level, levels[i], norms)
            lines.append(_line(i, now, judged))
            _warn(level.name, now, judged)
        if self._plan.connection == "nested" and fired:
            for i in reversed(range(max(fired))):
                levels[i] = learning.restarted(levels[i], levels[i + 1])
        trace = torch.cat([self._state.trace, *lines], dim=1)[:, -HISTORY:]
        self._state = replace(self._state, levels=tuple(levels), trace=trace)

    def _context_now(self) -> Context | None:
        """The context after all tokens but the last."""
        if self._segment is None and self._state.open.shape[1]:
            with self._evaluation():
                self._segment = self._reopened()
        if self._segment is not None:
            return None if self._segment.context is None else self._segment.context.detach()
        return cast(Any, self._state.context)

    def _generate_afresh(self, tokens: Tensor | None, options: dict[str, Any]) -> Tensor:
        """With what was learned, but from an empty context."""
        last = self._state.last
        if tokens is None and last is None:
            raise UserError("nothing was read and no tokens are given: read some, or give tokens to start from")
        ids = last if tokens is None else self._checked(tokens)
        with active(self._plan.in_use(self.model, self._state)):
            return self.model.generate(ids, **options)  # pyright: ignore

    # Bookkeeping.

    @property
    def _marks(self) -> tuple[Mark, ...]:
        return cast(tuple[Mark, ...], self._state.marks)

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.shape[1] < 1 or tokens.is_floating_point():
            shape = f"{tuple(tokens.shape)} of {tokens.dtype}"
            raise UserError(
                f"tokens has the shape {shape}, must be whole numbers (streams, tokens), at least one token"
            )
        if self._state.tokens and tokens.shape[0] != self._state.rows:
            raise UserError(
                f"tokens has {tokens.shape[0]} rows, but the state holds {self._state.rows} streams: one each"
            )
        tokens = tokens.to(device=self._state.open.device, dtype=torch.long)
        vocabulary = getattr(self.model.config, "vocab_size", math.inf)
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            found = f"{int(tokens.min())} to {int(tokens.max())}"
            raise UserError(f"tokens are {found}, must be from 0 to below the vocabulary's {vocabulary}")
        return tokens

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Without dropout: a stream is read the same way each time."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            yield
        finally:
            if training:
                self.model.train()


def _warn_anew(rows: Tensor, now: int) -> None:
    for row in torch.nonzero(rows).flatten().tolist():
        warnings.warn(
            f"stream {row} starts a new context at token {now}: what the model keeps of it made all that follows not "
            "finite",
            RolledBack,
            stacklevel=2,
        )


def _line(level: int, now: int, judged: learning.Judged) -> Tensor:
    """One line of the trace for each stream (B, 1, 7)."""
    loss = judged.loss.double()
    numbers = [judged.loss, judged.gradient, judged.step, judged.distance, judged.verdict]
    head = [torch.full_like(loss, level), torch.full_like(loss, now)]
    return torch.stack(head + [n.double() for n in numbers], dim=-1)[:, None]


def _warn(name: str, now: int, judged: learning.Judged) -> None:
    for row in torch.nonzero(judged.verdict >= 2).flatten().tolist():
        why = VERDICTS[int(judged.verdict[row])]
        warnings.warn(
            f"level {name!r} of stream {row} was rolled back to its last good state at token {now} ({why}; loss "
            f"{float(judged.loss[row]):.3f} nats per token, gradient norm {float(judged.gradient[row]):.3g})",
            RolledBack,
            stacklevel=2,
        )
