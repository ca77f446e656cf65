"""Protocols for a model that learns while it reads: new facts, languages in sequence, domain after domain.

They need of the learner what `Reader` says and nothing else, so that a frozen model, one with levels in context and one
that is fine-tuned go through the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nestlearn.continual.facts import Entry
from nestlearn.continual.languages import Language, Meaning, english, lesson
from nestlearn.errors import UserError

Array = NDArray[np.float64]


class Reader(Protocol):
    """A learner between two documents."""

    def read(self, text: str) -> Array:
        """Reads ``text`` once and learns from it. Bits of each piece (a byte, a token), as it was predicted before."""
        ...

    def bits(self, prompt: str, text: str) -> float:
        """Bits of ``text`` after ``prompt``, with no other context; learns nothing."""
        ...


@dataclass(frozen=True)
class Choice:
    """A prompt with texts to choose from; ``right`` is the place of the true one."""

    prompt: str
    texts: tuple[str, ...]
    right: int


def share_right(reader: Reader, choices: Sequence[Choice]) -> float:
    """How often the true text is the one of fewest bits per byte; a tie counts as wrong."""
    if not choices:
        raise UserError("there is nothing to choose: give at least one question")
    right = 0
    for choice in choices:
        bits = [reader.bits(choice.prompt, text) / len(text.encode()) for text in choice.texts]
        right += all(bits[choice.right] < b for i, b in enumerate(bits) if i != choice.right)
    return right / len(choices)


def fact_choices(entries: Sequence[Entry], *, reworded: bool) -> list[Choice]:
    """The questions of a kind, each answer with the space before it."""
    return [
        Choice(q.prompt, tuple(f" {text}" for text in q.choices), q.choices.index(q.answer))
        for entry in entries
        for q in entry.questions
        if q.reworded == reworded
    ]


def new_facts(reader: Reader, entries: Sequence[Entry], other: Sequence[str]) -> dict[str, dict[str, float]]:
    """Share of right answers before the articles are read, after, and after ``other`` documents as well.

    For questions in the article's words ("stated") and in others ("reworded"); 1/choices is chance.
    """
    asked = {"stated": fact_choices(entries, reworded=False), "reworded": fact_choices(entries, reworded=True)}

    def ask() -> dict[str, float]:
        return {kind: share_right(reader, choices) for kind, choices in asked.items()}

    found = {"before": ask()}
    for entry in entries:
        reader.read(entry.article)
    found["after"] = ask()
    for document in other:
        reader.read(document)
    return found | {"later": ask()}


def translation_choices(language: Language, said: Sequence[Meaning], choices: int = 10) -> list[Choice]:
    """Which English belongs to a sentence: the other texts are the English of the meanings after it."""
    if not 2 <= choices <= len(said):
        raise UserError(f"choices is {choices}: must lie within 2 and the {len(said)} sentences")
    meant = [f" {english(meaning)}." for meaning in said]
    found = []
    for at, meaning in enumerate(said):
        texts = [meant[(at + step) % len(said)] for step in range(choices)]
        right = at % choices  # the true one is not always the first
        texts[0], texts[right] = texts[right], texts[0]
        found.append(Choice(f"In {language.name}: {language.say(meaning)}. In English:", tuple(texts), right))
    return found


def languages_in_sequence(
    reader: Reader,
    languages: Sequence[Language],
    taught: Sequence[Meaning],
    asked: Sequence[Meaning],
    choices: int = 10,
) -> tuple[Array, Array]:
    """The accuracy matrix of `metrics.py` for languages learned one after the other, and the accuracies before any."""
    questions = [translation_choices(language, asked, choices) for language in languages]
    before = np.array([share_right(reader, own) for own in questions])
    rows = []
    for language in languages:
        reader.read(lesson(language, list(taught)))
        rows.append([share_right(reader, own) for own in questions])
    return np.array(rows), before


def domains_in_sequence(
    reader: Reader, domains: Sequence[Sequence[str]], held_out: Sequence[str]
) -> tuple[Array, list[Array]]:
    """Reads each domain's documents once.

    domains   documents of each                       held_out   one unread text of each
    Returns bits per byte of every held-out text before any domain and after each, (domains + 1, domains), and for each
    domain the bits of its pieces in the order of reading.
    """
    if len(domains) != len(held_out):
        raise UserError(f"there are {len(domains)} domains and {len(held_out)} held-out texts: give one for each")

    def measure() -> list[float]:
        return [reader.bits("", text) / len(text.encode()) for text in held_out]

    rows, curves = [measure()], []
    for documents in domains:
        curves.append(np.concatenate([reader.read(document) for document in documents]))
        rows.append(measure())
    return np.array(rows), curves


def gain_by_position(adapted: Array, frozen: Array, width: int) -> Array:
    """Frozen minus adapted, mean over windows of ``width`` pieces: what was gained while reading, by position."""
    if adapted.shape != frozen.shape or adapted.ndim != 1 or not 1 <= width <= len(adapted):
        raise UserError(
            f"the curves have the shapes {adapted.shape} and {frozen.shape}, the window is {width}: two equal curves "
            "at least as long as the window are needed"
        )
    windows = len(adapted) // width
    return np.nanmean((frozen - adapted)[: windows * width].reshape(windows, width), axis=1)


def forgotten(measured: Array) -> Array:
    """Of what `domains_in_sequence` measured: the relative loss on each domain after the last, against just after it.

    0.01 is one per cent more bits per byte than when the domain had just been read.
    """
    if measured.ndim != 2 or measured.shape[0] != measured.shape[1] + 1:
        raise UserError(f"the bits per byte have the shape {measured.shape}: must be (domains + 1, domains)")
    return measured[-1] / np.diagonal(measured, -1) - 1


def chance(choices: Sequence[Choice]) -> float:
    """The share right of who guesses."""
    return math.fsum(1 / len(choice.texts) for choice in choices) / len(choices)
