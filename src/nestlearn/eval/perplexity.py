"""Bits per byte on held-out text.

    bits/byte = - sum_i log2 p(token_i | the tokens before it in its window) / bytes(token_1 .. token_n)

The text is cut into windows of `sequence_length` targets, each read from a fresh state, so that the loss at a position
tells what the preceding positions of the window were worth. Windows do not overlap and the last may be short: every
token but the first of the text is predicted exactly once. A document separator counts as one byte, here and for the
compressors that the result is compared with.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.data.text import SEPARATOR
from nestlearn.data.tokens import Tokenizer
from nestlearn.errors import UserError
from nestlearn.eval.run_record import Evaluation


@dataclass(frozen=True, eq=False)
class Perplexity:
    """A model on held-out text: `tokens` targets that stand for `bytes` bytes.

    by_position  (sequence_length,) float64, mean loss of the i-th target of a window, in bits per token
    """

    bits_per_byte: float
    tokens: int
    bytes: int
    by_position: np.ndarray

    @property
    def bits_per_token(self) -> float:
        return self.bits_per_byte * self.bytes / self.tokens

    def evaluation(self) -> Evaluation:
        """The form that run.json holds."""
        by_position = [round(float(bits), 4) for bits in self.by_position]
        return Evaluation(self.bits_per_byte, self.tokens, self.bytes, by_position)


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    tokens: np.ndarray,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
) -> Perplexity:
    """Loss of `model` (ids (B, T) -> `.logits` (B, T, V)) on `tokens` (n,), at most the first `max_tokens` targets.

    The model's train/eval mode is restored. UserError where nothing can be predicted.
    """
    _check(tokens, sequence_length, batch_size, max_tokens)
    nats, windows = torch.zeros(2, sequence_length, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for inputs, targets in _windows(tokens, sequence_length, batch_size, max_tokens):
            nats[: inputs.shape[1]] += _nats(model, inputs, targets).sum(0)
            windows[: inputs.shape[1]] += len(inputs)
    finally:
        model.train(was_training)
    reached = windows > 0
    bits = nats / np.log(2)
    size = len(measured_bytes(tokens, tokenizer, max_tokens))
    by_position = (bits[reached] / windows[reached]).numpy()
    return Perplexity(float(bits.sum()) / size, int(windows.sum()), size, by_position)


def measured_bytes(tokens: np.ndarray, tokenizer: Tokenizer, max_tokens: int | None = None) -> bytes:
    """The bytes that `bits_per_byte` divides by: the targets, each document decoded, joined by one separator byte."""
    targets = np.asarray(tokens[1:] if max_tokens is None else tokens[1 : 1 + max_tokens])
    cuts = np.flatnonzero(targets == tokenizer.separator_id)
    starts, ends = np.append(0, cuts + 1), np.append(cuts, len(targets))
    return SEPARATOR.join(tokenizer.decode(targets[a:b]) for a, b in zip(starts, ends, strict=True))


def _check(tokens: np.ndarray, sequence_length: int, batch_size: int, max_tokens: int | None) -> None:
    for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}, must be at least 1")
    if len(tokens) < 2:
        raise UserError(f"the held-out text has {len(tokens)} token(s): predicting one needs at least 2")


def _windows(
    tokens: np.ndarray, sequence_length: int, batch_size: int, max_tokens: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (inputs, targets), (B, T) int64 each; the last batch may have fewer rows, then a short row follows."""
    count = min(len(tokens) - 1, max_tokens or len(tokens))
    ids = torch.from_numpy(np.asarray(tokens[: count + 1], dtype=np.int64))
    whole = count - count % sequence_length
    rows = zip(
        ids[:whole].view(-1, sequence_length).split(batch_size),
        ids[1 : whole + 1].view(-1, sequence_length).split(batch_size),
        strict=True,
    )
    yield from rows if whole else ()
    if whole < count:
        yield ids[None, whole:count], ids[None, whole + 1 :]


def _nats(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Loss of each target, (B, T) float64 on the CPU, in nats."""
    device = next(model.parameters()).device
    logits = model(inputs.to(device)).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), targets.to(device), reduction="none").double().cpu()
