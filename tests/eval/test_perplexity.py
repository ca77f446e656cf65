"""Bits per byte against models whose loss is known, and against a sum written out token by token."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nestlearn.data.tokens import ByteTokenizer
from nestlearn.errors import UserError
from nestlearn.eval.compression import compression
from nestlearn.eval.perplexity import bits_per_byte, measured_bytes


class Uniform(nn.Module):
    """Says that all tokens are equally likely."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.vocabulary.expand(*ids.shape, -1))


class Running(nn.Module):
    """A causal model: logits are a fixed function of the running sum of ids since the start of the window."""

    def __init__(self, vocabulary: int = 256) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(17, vocabulary, generator=generator))

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[ids.cumsum(1) % 17])


class TwoBytes:
    """A vocabulary in which a token stands for two bytes, and token 0 separates documents."""

    name, vocab_size, separator_id = "two bytes", 256, 0

    def decode(self, ids) -> bytes:
        return b"".join(bytes([i, i]) for i in ids)


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, length).astype(np.uint16)


def by_hand(model: nn.Module, tokens: np.ndarray, length: int) -> list[list[float]]:
    """Bits of every target, per window: one token at a time, softmax written out in float64."""
    windows = []
    for start in range(0, len(tokens) - 1, length):
        ids = torch.tensor(tokens[start : start + length + 1].astype(int))
        logits = [model(ids[None, : i + 1]).logits[0, -1].double() for i in range(len(ids) - 1)]
        windows.append(
            [float((-x[t] + x.exp().sum().log()).detach() / math.log(2)) for x, t in zip(logits, ids[1:], strict=True)]
        )
    return windows


def test_a_uniform_model_costs_the_logarithm_of_its_vocabulary():
    measured = bits_per_byte(Uniform(256), text(1000), ByteTokenizer(), sequence_length=64, batch_size=4)
    assert measured.bits_per_byte == pytest.approx(8.0, abs=1e-5)
    assert (measured.tokens, measured.bytes) == (999, 999)
    np.testing.assert_allclose(measured.by_position, np.full(64, 8.0), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize(("tokens", "length"), [(101, 20), (95, 20), (7, 20), (2, 20), (21, 20)])
def test_equals_a_sum_over_single_tokens(tokens: int, length: int, batch_size: int):
    model, ids = Running(), text(tokens)
    windows = by_hand(model, ids, length)
    measured = bits_per_byte(model, ids, ByteTokenizer(), sequence_length=length, batch_size=batch_size)
    assert measured.tokens == tokens - 1
    assert measured.bits_per_byte == pytest.approx(sum(map(sum, windows)) / (tokens - 1), rel=1e-5)
    at = [np.mean([w[i] for w in windows if len(w) > i]) for i in range(max(map(len, windows)))]
    np.testing.assert_allclose(measured.by_position, at, rtol=1e-5)


def test_max_tokens_measures_the_start_of_the_text():
    model, ids = Running(), text(300)
    limited = bits_per_byte(model, ids, ByteTokenizer(), sequence_length=32, batch_size=4, max_tokens=100)
    whole = bits_per_byte(model, ids[:101], ByteTokenizer(), sequence_length=32, batch_size=4)
    assert limited.tokens == 100
    assert limited.bits_per_byte == whole.bits_per_byte


def test_bytes_are_those_of_the_text_and_one_for_each_separator():
    ids = np.array([5, 6, 7, 0, 8, 9, 0, 10], dtype=np.uint16)
    assert measured_bytes(ids, TwoBytes()) == b"\6\6\7\7\x1c\10\10\11\11\x1c\n\n"
    measured = bits_per_byte(Uniform(256), ids, TwoBytes(), sequence_length=4, batch_size=2)
    assert measured.bits_per_byte == pytest.approx(7 * 8 / 12, abs=1e-5)
    assert measured.bits_per_token == pytest.approx(8.0, abs=1e-5)


def test_separators_at_the_edges_and_in_a_row_count():
    ids = np.array([1, 0, 0, 2, 0], dtype=np.uint16)
    assert measured_bytes(ids, TwoBytes()) == b"\x1c\x1c\2\2\x1c"


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(training: bool):
    model = Uniform(256).train(training)
    bits_per_byte(model, text(9), ByteTokenizer(), sequence_length=4, batch_size=2)
    assert model.training is training


@pytest.mark.parametrize(
    ("options", "named"), [({"sequence_length": 0}, "0"), ({"batch_size": -1}, "-1"), ({"max_tokens": 0}, "0")]
)
def test_impossible_numbers_are_named(options: dict, named: str):
    with pytest.raises(UserError, match=f"{next(iter(options))} is {named}"):
        bits_per_byte(Uniform(256), text(9), ByteTokenizer(), **{"sequence_length": 4, "batch_size": 1} | options)


def test_a_single_token_cannot_be_predicted():
    with pytest.raises(UserError, match="at least 2"):
        bits_per_byte(Uniform(256), text(1), ByteTokenizer(), sequence_length=4, batch_size=1)


def test_the_evaluation_holds_the_same_numbers():
    measured = bits_per_byte(Running(), text(100), ByteTokenizer(), sequence_length=16, batch_size=4)
    evaluation = measured.evaluation()
    assert (evaluation.bits_per_byte, evaluation.tokens, evaluation.bytes) == (measured.bits_per_byte, 99, 99)
    np.testing.assert_allclose(evaluation.by_position, measured.by_position, atol=1e-4)


def test_compressors_on_known_text():
    repeated, noise = compression(b"abcd" * 100_000), compression(np.random.default_rng(0).bytes(200_000))
    assert max(repeated) < 0.02
    assert min(noise) > 7.9


def test_compressors_agree_with_the_command_line_tools():
    """`xz -9 -c | wc -c` (xz 5) and `bzip2 -9 -c | wc -c` of the bytes 0 to 255, a hundred times over."""
    data = bytes(range(256)) * 100
    assert compression(data).xz * len(data) / 8 == 360
    assert compression(data).bz2 * len(data) / 8 == 818


def test_empty_text_has_no_bits_per_byte():
    with pytest.raises(UserError, match="empty"):
        compression(b"")
