"""`OnlineLearner` as a `Reader` of `reading.py`: it learns from each document, and is asked without its context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from numpy.typing import NDArray
from torch import Tensor

from nestlearn.continual.online import OnlineLearner
from nestlearn.continual.recall import NOW, SLOW, mixed, voices
from nestlearn.errors import UserError, suggest

RECALL = (None, "slow", "marks")
START = "\n"  # stands before a text that has no prompt


class OnlineReader:
    """A learner whose levels have the rate 0 is the frozen model, read the same way.

    encode   text to token ids
    window   tokens that `bits` predicts together, after the prompt: a longer text is cut, since attention is used to
             texts as long as those that it was trained on; None: all at once
    recall   who is asked (recall.py): None, the stream as it is; "slow", beside it the slow weights; "marks", and the
             stream as it was after each document, of which `read` then makes a mark
    """

    def __init__(
        self,
        learner: OnlineLearner,
        encode: Callable[[str], Sequence[int]],
        window: int | None = None,
        *,
        recall: str | None = None,
    ) -> None:
        if window is not None and window < 1:
            raise UserError(f"window is {window}: must be at least 1 token, or None")
        if recall not in RECALL:
            raise UserError(f"recall is {recall!r}, must be one of {list(RECALL)}{suggest(str(recall), RECALL[1:])}")
        self.learner, self._encode, self._window, self._recall = learner, encode, window, recall

    def read(self, text: str) -> NDArray:
        """Bits of each token (n,), nan for the very first of all; the context of earlier documents is dropped."""
        if self.learner.state.tokens:
            self.learner.drop_context()
        bits = (self.learner.read(self.tokens(text)).double() / math.log(2)).numpy()
        if self._recall == "marks":
            self.learner.mark(f"after {self.learner.state.tokens} tokens")
        return bits

    def tokens(self, text: str) -> torch.Tensor:
        """The ids of a text (n,)."""
        return torch.tensor(list(self._encode(text)))

    def bits(self, prompt: str, text: str) -> float:
        """Bits of ``text`` after ``prompt``, with what the levels know and without any other context."""
        before, after = list(self._encode(prompt or START)), list(self._encode(text))
        if not after:
            raise UserError(f"the text after {prompt!r} is empty: give at least one token to predict")
        step = self._window or len(after)
        windows = [self._nats(before, after[at : at + step]) for at in range(0, len(after), step)]
        nats = torch.cat(windows, dim=-1)
        return float(mixed(nats).sum()) / math.log(2)

    def _nats(self, before: list[int], after: list[int]) -> Tensor:
        """Of each token (voices, n)."""
        asked = {None: [NOW], "slow": [SLOW, NOW], "marks": None}[self._recall]
        found = voices(self.learner, torch.tensor([before + after]), asked)
        return torch.cat([nats[:, len(before) - 1 :] for nats in found.values()])
