"""`OnlineLearner` as a `Reader` of `reading.py`: it learns from each document, and is asked without its context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from nestlearn.continual.online import OnlineLearner
from nestlearn.errors import UserError

START = "\n"  # stands before a text that has no prompt


class OnlineReader:
    """A learner whose levels have the rate 0 is the frozen model, read the same way.

    encode   text to token ids
    window   tokens that `bits` predicts together, after the prompt: a longer text is cut, since attention is used to
             texts as long as those that it was trained on; None: all at once
    """

    def __init__(
        self, learner: OnlineLearner, encode: Callable[[str], Sequence[int]], window: int | None = None
    ) -> None:
        if window is not None and window < 1:
            raise UserError(f"window is {window}: must be at least 1 token, or None")
        self.learner, self._encode, self._window = learner, encode, window

    def read(self, text: str) -> NDArray:
        """Bits of each token (n,), nan for the very first of all; the context of earlier documents is dropped."""
        if self.learner.state.tokens:
            self.learner.drop_context()
        return (self.learner.read(self.tokens(text)).double() / math.log(2)).numpy()

    def tokens(self, text: str) -> torch.Tensor:
        """The ids of a text (n,)."""
        return torch.tensor(list(self._encode(text)))

    @torch.no_grad()
    def bits(self, prompt: str, text: str) -> float:
        """Bits of ``text`` after ``prompt``, with what the levels know and without any other context."""
        before, after = list(self._encode(prompt or START)), list(self._encode(text))
        if not after:
            raise UserError(f"the text after {prompt!r} is empty: give at least one token to predict")
        step = self._window or len(after)
        return sum(self._window_bits(before, after[at : at + step]) for at in range(0, len(after), step))

    def _window_bits(self, before: list[int], after: list[int]) -> float:
        ids = torch.tensor([before + after])
        model = self.learner.model
        training = model.training
        model.eval()
        with self.learner.adapted():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1].double()
        model.train(training)
        return float(F.cross_entropy(logits, ids[0, len(before) :], reduction="sum")) / math.log(2)
