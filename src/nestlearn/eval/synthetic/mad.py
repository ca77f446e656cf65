"""MAD, the small tasks of Poli et al. (arXiv 2403.17844), and MQAR (Zoology, arXiv 2312.04927), at their defaults.

    in-context-recall         k v k v …, k of 8 keys, v of 8 values, one v for a k in a sequence: v where k came before
    noisy-in-context-recall   the same; a fifth of the pairs are two tokens of noise
    fuzzy-in-context-recall   keys and values are 1 to 3 tokens long; tests ask for keys of 3 tokens
    selective-copying         16 tokens among blanks, a mark, then 16 blanks: the tokens, in order
    compression               31 tokens and a mark: all 32 from the last state alone (`MadTask.from_last`)
    memorization              k, a mark: the v that k has in every sequence, test sequences included
    mqar                      P pairs, then the keys again at random places among random tokens: their values

A task makes N sequences at once: inputs (N, T) and targets (N, T), `IGNORED` where nothing is asked. As in MAD's code
the recall tasks train on every next token and test only where a key has been seen before. Distributions are those of
MAD's own generators, flaws included: a fuzzy sequence may end in asking for a pair that it never showed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

IGNORED = -100
Pair = tuple[np.ndarray, np.ndarray]


class MadTask(NamedTuple):
    """make(generator, N, training) -> (inputs, targets); ``train`` training sequences of ``length`` tokens."""

    make: Callable[[np.random.Generator, int, bool], Pair]
    vocabulary: int
    length: int
    train: int = 12_800
    test: int = 1_280
    from_last: bool = False

    def split(self, seed: int, training: bool) -> Pair:
        """The training or the test sequences of a seed."""
        count = self.train if training else self.test
        return self.make(np.random.default_rng([seed, training]), count, training)


def in_context_recall(rng: np.random.Generator, count: int, training: bool, *, noise: float = 0.0) -> Pair:
    """63 pairs and one whose key has been seen; the last token is only ever a target."""
    keys, pairs = 8, 64
    values = rng.integers(keys, 2 * keys, (count, keys))
    asked = rng.integers(keys, size=(count, pairs))
    noisy = rng.random((count, pairs)) < noise
    noisy[np.arange(count), rng.integers(pairs, size=count)] = False
    seen = np.cumsum((asked[..., None] == np.arange(keys)) & ~noisy[..., None], axis=1)
    last = rng.random((count, keys)) * (seen[:, -2] > 0)  # the last key is one of those that came
    asked[:, -1], noisy[:, -1] = last.argmax(-1), False
    known = np.take_along_axis(np.roll(seen, 1, axis=1), asked[..., None], axis=2)[..., 0] > 0
    known[:, 0] = False
    whole = np.stack([asked, np.take_along_axis(values, asked, axis=1)], axis=-1)
    whole = np.where(noisy[..., None], rng.integers(2 * keys, 4 * keys, whole.shape), whole)
    targets = np.full_like(whole, IGNORED)
    targets[..., 1] = np.where(known & ~noisy, whole[..., 1], IGNORED)
    return _shifted(whole.reshape(count, -1), targets.reshape(count, -1), training)


def noisy_in_context_recall(rng: np.random.Generator, count: int, training: bool) -> Pair:
    """A fifth of the pairs are noise."""
    return in_context_recall(rng, count, training, noise=0.2)


def fuzzy_in_context_recall(rng: np.random.Generator, count: int, training: bool) -> Pair:
    """Motifs of one to three tokens, padded on the left to 129."""
    draw = random.Random(int(rng.integers(2**63)))
    rows = [_fuzzy(draw, training) for _ in range(count)]
    whole, targets = (np.array(column) for column in zip(*rows, strict=True))
    return _shifted(whole, targets, training)


def _fuzzy(draw: random.Random, training: bool, length: int = 128, longest: int = 3) -> tuple[list[int], list[int]]:
    """One sequence: pairs, among them the one that is asked for at the end."""

    def motif(low: int, high: int, shortest: int = 1) -> tuple[int, ...]:
        return tuple(draw.sample(range(low, high), draw.randint(shortest, longest)))

    shortest = 1 if training else longest
    probe, answer = motif(0, 7, shortest), motif(7, 15)
    size = len(probe) + len(answer)
    place, shown = draw.randrange(length - 2 * size), False
    values, inputs, targets = {probe: answer}, list[int](), list[int]()
    seen = set[tuple[int, ...]]()
    while len(inputs) < length - size - 2 * longest:
        due = len(inputs) >= place and not shown
        key = probe if due else motif(0, 7, shortest)
        shown |= key == probe
        value = values.setdefault(key, motif(7, 15))
        inputs += key + value
        targets += [IGNORED] * len(key) + (list(value) if key in seen else [IGNORED] * len(value))
        seen.add(key)
    inputs, targets = [*inputs, *probe, *answer], [*targets, *[IGNORED] * len(probe), *answer]
    missing = length + 1 - len(inputs)
    return [15] * missing + inputs, [IGNORED] * missing + targets


def selective_copying(rng: np.random.Generator, count: int, training: bool) -> Pair:
    """16 of 14 tokens; the 223 blanks fall before each of them alike, none between the last and the mark."""
    copied, length, blank, mark = 16, 256, 14, 15
    blanks = rng.multinomial(length - 2 * copied - 1, [1 / copied] * copied, size=count)
    tokens = rng.integers(14, size=(count, copied))
    inputs, targets = np.full((count, length), blank), np.full((count, length), IGNORED)
    np.put_along_axis(inputs, blanks.cumsum(1) + np.arange(copied), tokens, axis=1)
    inputs[:, -copied - 1], targets[:, -copied:] = mark, tokens
    return inputs, targets


def compression(rng: np.random.Generator, count: int, training: bool) -> Pair:
    """31 of 15 tokens and the mark."""
    inputs = np.concatenate([rng.integers(15, size=(count, 31)), np.full((count, 1), 15)], axis=1)
    return inputs, inputs.copy()


def memorization(rng: np.random.Generator, count: int, training: bool, *, facts_seed: int = 12345) -> Pair:
    """Keys 0 … 126, each with a value of its own from 127 … 254 that never changes; 255 asks for it."""
    facts = np.random.default_rng(facts_seed).permutation(np.arange(127, 255))[:127]
    keys = rng.integers(127, size=(count, 16))
    inputs = np.stack([keys, np.full_like(keys, 255)], axis=-1)
    targets = np.stack([np.full_like(keys, IGNORED), facts[keys]], axis=-1)
    return inputs.reshape(count, -1), targets.reshape(count, -1)


def mqar(
    rng: np.random.Generator,
    count: int,
    *,
    vocabulary: int = 8192,
    length: int = 64,
    pairs: int = 8,
    power: float = 0.01,
) -> Pair:
    """Zoology's recall: gaps before a key comes again follow a power law, so that most are short.

    Keys 1 … V/2 − 1 and values V/2 … V − 1, neither twice in a sequence. Token 0 never stands: it marks where random
    tokens go.
    """
    half, space = vocabulary // 2, (length - 2 * pairs) // 2
    keys = 1 + rng.random((count, half - 1)).argsort(-1)[:, :pairs]
    values = half + rng.random((count, vocabulary - half)).argsort(-1)[:, :pairs]
    weights = np.log(power * np.arange(1, space + 1) ** (power - 1))
    gaps = (weights + rng.gumbel(size=(count, space))).argsort(-1)[:, ::-1][:, :pairs]  # without replacement
    inputs = np.zeros((count, length), dtype=np.int64)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    targets = np.full((count, length), IGNORED)
    places = 2 * pairs + 2 * gaps
    np.put_along_axis(inputs, places, keys, axis=1)
    np.put_along_axis(targets, places, values, axis=1)
    return np.where(inputs == 0, rng.integers(vocabulary, size=inputs.shape), inputs), targets


def _shifted(whole: np.ndarray, targets: np.ndarray, training: bool) -> Pair:
    """Every token is trained to say the next one; tests ask only where ``targets`` do."""
    return whole[:, :-1], (whole if training else targets)[:, 1:]


MAD_TASKS: dict[str, MadTask] = {
    "in-context-recall": MadTask(in_context_recall, 16, 127),
    "fuzzy-in-context-recall": MadTask(fuzzy_in_context_recall, 16, 128),
    "noisy-in-context-recall": MadTask(noisy_in_context_recall, 32, 127),
    "selective-copying": MadTask(selective_copying, 16, 256),
    "compression": MadTask(compression, 16, 32, from_last=True),
    "memorization": MadTask(memorization, 256, 32, train=256),
}
