"""OnlineReader: learns from what it reads, learns nothing from what it is asked."""

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nestlearn import OnlineLearner, online_levels, stack_levels
from nestlearn.continual.online_reader import OnlineReader
from nestlearn.continual.reading import Choice, domains_in_sequence, share_right
from nestlearn.errors import UserError

TEXT = "the cat sat on the mat. "


def reader(lr=0.5):
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0}
    model = stack_levels(GPT2LMHeadModel(GPT2Config(**sizes)).eval(), [8, 16])
    return OnlineReader(OnlineLearner(model, online_levels(model, lr=lr)), lambda text: text.encode("ascii"))


def test_bits_are_the_model_s_own_and_teach_it_nothing():
    one = reader()
    bits = one.bits("the cat", " sat")
    ids = torch.tensor([list(b"the cat sat")])
    with torch.no_grad():
        probabilities = one.learner.model(ids).logits.softmax(-1)[0]  # pyright: ignore[reportCallIssue]
    expected = -sum(math.log2(probabilities[i - 1, ids[0, i]]) for i in range(7, 11))
    assert bits == pytest.approx(expected, abs=1e-4) and one.learner.state.tokens == 0
    with pytest.raises(UserError, match="is empty"):
        one.bits("a", "")


def test_a_window_cuts_a_text_after_the_same_prompt():
    whole = reader()
    cut = OnlineReader(whole.learner, lambda text: text.encode("ascii"), window=3)
    assert cut.bits("the", " cat") == pytest.approx(whole.bits("the", " ca") + whole.bits("the", "t"), abs=1e-9)
    with pytest.raises(UserError, match="window is 0"):
        OnlineReader(whole.learner, lambda text: text.encode("ascii"), window=0)


def test_reading_teaches_and_a_rate_of_zero_does_not():
    for lr, learns in ((0.5, True), (0.0, False)):
        one = reader(lr)
        before = one.bits("", TEXT)
        read = np.concatenate([one.read(TEXT) for _ in range(8)])
        assert len(read) == 8 * len(TEXT) and np.isnan(read[0]) and not np.isnan(read[1:]).any()
        after = one.bits("", TEXT)
        assert (after < before - 0.1) if learns else (after == before)


def test_the_protocols_take_it():
    one = reader()
    measured, curves = domains_in_sequence(one, [[TEXT] * 4, ["0123456789 "] * 4], [TEXT, "0123 "])
    assert measured[1, 0] < measured[0, 0] and measured[2, 1] < measured[1, 1] and len(curves) == 2
    texts = ("789 ", "~~~~")  # what was read of, and what was not
    assert share_right(one, [Choice("0123456", texts, 0)]) + share_right(one, [Choice("0123456", texts, 1)]) == 1
