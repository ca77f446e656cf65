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
    """``encode``: text to token ids. A learner whose levels have the rate 0 is the frozen model, read the same way."""

    def __init__(self, learner: OnlineLearner, encode: Callable[[str], Sequence[int]]) -> None:
        self.learner, self._encode = learner, encode

    def read(self, text: str) -> NDArray:
        """Bits of each token (n,), nan for the very first of all; the context of earlier documents is dropped."""
        if self.learner.state.tokens:
            self.learner.drop_context()
        return (self.learner.read(torch.tensor(list(self._encode(text)))).double() / math.log(2)).numpy()

    @torch.no_grad()
    def bits(self, prompt: str, text: str) -> float:
        """Bits of ``text`` after ``prompt``, with what the levels know and without any other context."""
        before, after = list(self._encode(prompt or START)), list(self._encode(text))
        if not after:
            raise UserError(f"the text after {prompt!r} is empty: give at least one token to predict")
        ids = torch.tensor([before + after])
        model = self.learner.model
        training = model.training
        model.eval()
        with self.learner.adapted():
            logits = model(input_ids=ids).logits[0, len(before) - 1 : -1].double()
        model.train(training)
        return float(F.cross_entropy(logits, ids[0, len(before) :], reduction="sum")) / math.log(2)
