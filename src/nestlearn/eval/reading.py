"""Log-likelihoods of many rows of tokens, with every state that can be shared read once.

    log p(row) = Σ_{t scored} log p(token_t | the tokens before it)

A streaming model reads a text of any length in pieces, with constant memory, and its state is forked where requests
begin alike. A model without our state (any Hugging Face causal LM) reads every row at once and whole, as
lm-evaluation-harness's own adapter does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.errors import UserError
from nestlearn.eval.families import Family, Row, families
from nestlearn.models.hf import HopeCache, HopeForCausalLM

Score = tuple[float, bool]  # log-likelihood in nats; whether every scored token was the likeliest

TOKENS = 1 << 15  # of one call of a streaming model, over all rows
LOGITS = 1 << 26  # numbers that one call may give back
SIMILAR = 0.75  # families are read together if the shortest shared text is at least so much of the longest


class Reader:
    """A model in eval mode. `batch_size` rows are read together; `reuse` off reads every row from its first token."""

    def __init__(self, model: Any, batch_size: int = 64, *, reuse: bool = True) -> None:
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}: must be at least 1")
        self.model, self.batch_size = model.eval(), batch_size
        self.streams = isinstance(model, HopeForCausalLM)
        self.reuse = reuse and self.streams
        self.device = next(model.parameters()).device
        self.tokens_read = 0  # columns given to the model, padding included: the cost

    @torch.inference_mode()
    def score(self, rows: Sequence[Row], done: Callable[[int], Any] = lambda count: None) -> list[Score]:
        """The score of each row. `done` hears how many rows have been finished."""
        scores: list[Score | None] = [None] * len(rows)
        alone = [Family(0, (index,)) for index in range(len(rows))]
        for group in self._groups(families(rows) if self.reuse else alone):
            cut = group[0].shared if len(group) == 1 else min(family.shared for family in group)
            state = self.state_after([rows[family.rows[0]].ids[:cut] for family in group]) if cut else None
            members = [(number, index) for number, family in enumerate(group) for index in family.rows]
            members.sort(key=lambda member: -len(rows[member[1]].ids))
            for begin in range(0, len(members), self.batch_size):
                part = members[begin : begin + self.batch_size]
                start = None if state is None else state[[number for number, _ in part]]
                texts = [Row(rows[index].ids[cut:], rows[index].scored) for _, index in part]
                for (_, index), score in zip(part, self._scores(texts, start), strict=True):
                    scores[index] = score
                done(len(part))
        return [score for score in scores if score is not None]

    def _groups(self, found: list[Family]) -> Iterator[list[Family]]:
        """Families to be read together, those that share most first; last, all rows that share nothing."""
        group: list[Family] = []
        for family in sorted((f for f in found if f.shared), key=lambda family: -family.shared):
            if group and (len(group) == self.batch_size or family.shared < SIMILAR * group[0].shared):
                yield group
                group = []
            group.append(family)
        if group:
            yield group
        alone = tuple(index for family in found if not family.shared for index in family.rows)
        if alone:
            yield [Family(0, alone)]  # `score` cuts it into batches by length

    def state_after(self, texts: Sequence[Sequence[int]]) -> Any:
        """The state of each text, at least one token long, in order. Texts of one length are read together."""
        shortest = min(len(text) for text in texts)
        state = self._read([text[:shortest] for text in texts], None)
        by_rest: dict[int, list[int]] = {}
        for number, text in enumerate(texts):
            by_rest.setdefault(len(text) - shortest, []).append(number)
        if len(by_rest) == 1:
            return state
        parts = [self._rest(texts, numbers, shortest, state[numbers]) for numbers in by_rest.values()]
        order = torch.argsort(torch.tensor([number for numbers in by_rest.values() for number in numbers]))
        return type(state).cat(parts)[order]

    def _rest(self, texts: Sequence[Sequence[int]], numbers: list[int], begin: int, state: Any) -> Any:
        rest = [texts[number][begin:] for number in numbers]
        return self._read(rest, state) if rest[0] else state

    def _read(self, texts: Sequence[Sequence[int]], state: Any) -> Any:
        """The state after texts of one length."""
        ids = torch.tensor(texts, device=self.device)
        piece = self._piece(len(ids), last_only=True)
        for begin in range(0, ids.shape[1], piece):
            _, state = self._call(ids[:, begin : begin + piece], state, keep=1)
        return state

    def _scores(self, rows: Sequence[Row], state: Any) -> list[Score]:
        """Scores of rows sorted from the longest to the shortest, each going on from its row of `state`."""
        lengths = [len(row.ids) - 1 for row in rows]  # the last token predicts nothing
        firsts = [length - row.scored for length, row in zip(lengths, rows, strict=True)]
        sums, greedy = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.bool)
        ids = _padded([row.ids for row in rows]).to(self.device)
        piece = self._piece(len(rows)) if self.streams else lengths[0]
        for begin in range(0, lengths[0], piece):
            alive = sum(length > begin for length in lengths)
            if alive < len(rows) and state is not None:
                state = state[:alive]
            end = min(begin + piece, lengths[0])
            low = max(begin, min(firsts[:alive]))
            logits, state = self._call(ids[:alive, begin:end], state, keep=max(1, end - low), more=end < lengths[0])
            if low < end:
                spans = [(max(f, low) - low, min(n, end) - low) for f, n in zip(firsts[:alive], lengths, strict=False)]
                gained, likeliest = _judge(logits, ids[:alive, low + 1 : end + 1], spans)
                sums[:alive] += gained
                greedy[:alive] &= likeliest
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def _piece(self, rows: int, *, last_only: bool = False) -> int:
        """How many tokens of `rows` rows to give to the model at once."""
        most = TOKENS // rows if last_only else min(TOKENS // rows, LOGITS // (rows * self.model.config.vocab_size))
        return max(64, most // 64 * 64)

    def _call(self, ids: Tensor, state: Any, *, keep: int, more: bool = True) -> tuple[Tensor, Any]:
        """Logits of the last `keep` columns (B, keep, V), and the state where `more` is to come."""
        self.tokens_read += ids.numel()
        if not self.streams:
            return self.model(input_ids=ids, use_cache=False).logits[:, -keep:], None
        past = None if state is None else HopeCache(state, 0)  # it keeps no positions: the state has them
        out = self.model(input_ids=ids, past_key_values=past, use_cache=more, logits_to_keep=keep)
        return out.logits, out.past_key_values.state if more else None


def _padded(texts: Sequence[Sequence[int]]) -> Tensor:
    """(B, longest) ids, zeros on the right, where no token that counts can see them."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)


def _judge(logits: Tensor, targets: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Σ log p of each row's targets in its span [a, b) of columns (B,), and whether all of them were the likeliest."""
    logits = logits.float()
    gained = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    column = torch.arange(targets.shape[1], device=targets.device)
    begin, end = (torch.tensor(bound, device=targets.device)[:, None] for bound in zip(*spans, strict=True))
    counts = (column >= begin) & (column < end)
    sums = (gained.double() * counts).sum(1)
    return sums.cpu(), ((logits.argmax(-1) == targets) | ~counts).all(1).cpu()
