"""Text to learn to remember from: articles, other text, questions with answers, all made up anew for every sequence.

    articles | a lesson in some language, to the end of a period (and further periods) | questions with their answers

The people that a model is tested on, and their towns and works, occur in nothing that it was trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from nestlearn.continual.facts import Entry, Question, encyclopaedia
from nestlearn.continual.languages import Language, Meaning, english, invent, lesson, meanings

VOCABULARY = 640
TRAINED = 1_000_000  # where the seeds of training texts begin
TESTED, TUNED = (*range(4), *range(500_000, 500_004)), tuple(range(250_000, 250_004))  # seeds


@cache
def tokenizer() -> Tokenizer:
    """Byte pairs of made-up text: the usual words are one token each, a name is three to five."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    found.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator(_sample(), trainer)
    return found


def _sample() -> Iterator[str]:
    for seed in range(TRAINED, TRAINED + 60):
        entries = encyclopaedia(seed, 12, 4)
        yield "".join(entry.article for entry in entries)
        yield "".join(f"{q.prompt} {q.answer}.\n" for entry in entries for q in entry.questions)
        yield other_text(random.Random(seed), 1)


def encode(text: str) -> list[int]:
    return tokenizer().encode(text).ids


def other_text(draw: random.Random, lessons: int) -> str:
    """Lessons in languages that are used nowhere else."""
    seeds = [TRAINED + draw.randrange(2**30) for _ in range(lessons)]
    return "".join(lesson(invent(seed, 1)[0], meanings(seed, 40)) for seed in seeds)


@dataclass(frozen=True)
class Asked:
    """A question in tokens: the prompt, which begins with the end of a line, and the answers to choose from."""

    kind: str
    prompt: list[int]
    answers: list[list[int]]
    right: int


def asked(question: Question) -> Asked:
    answers = [encode(f" {text}.") for text in question.choices]
    kind = "reworded" if question.reworded else "stated"
    return Asked(kind, encode("\n" + question.prompt), answers, question.choices.index(question.answer))


def translation(language: Language, said: Sequence[Meaning], at: int, choices: int = 4) -> Asked:
    """Which English belongs to a sentence: the other answers are the English of the meanings after it."""
    answers = [encode(f" {english(said[(at + step) % len(said)])}.") for step in range(choices)]
    prompt = f"\nIn {language.name}: {language.say(said[at])}. In English:"
    return Asked("translation", encode(prompt), answers, 0)


class Sequences:
    """An endless stream of sequences for training; the same seed gives the same ones.

    period    tokens; questions begin at a multiple of it, when everything before them has been written
    forbidden words of names, towns and works that must not occur
    """

    def __init__(self, seed: int, period: int, forbidden: frozenset[str]) -> None:
        self._draw, self._period, self._forbidden = random.Random(seed), period, forbidden

    def batch(self, rows: int, people: int, apart: int = 0, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (rows, N + 1), and which of them belong to an answer.

        people  articles in each row      apart  further periods of other text between articles and questions
        length  N; None: one period of questions. Where given, questions follow the articles at once
        """
        found = [self._people(people) for _ in range(rows)]
        articles = [encode("".join(entry.article for entry in entries)) for entries in found]
        written = (-(-max(map(len, articles)) // self._period) + apart) * self._period
        made = []
        for entries, ids in zip(found, articles, strict=True):
            begin, end = (len(ids), length) if length else (written, written + self._period)
            made.append(self._row(entries, ids, begin, end + 1))
        return torch.tensor([ids for ids, _ in made]), torch.tensor([answers for _, answers in made])

    def lessons(self, rows: int, periods: int) -> tuple[Tensor, Tensor]:
        """The same of languages: a lesson of so many periods, then one of other sentences and their English."""
        made = []
        for _ in range(rows):
            language = invent(TRAINED + self._draw.randrange(2**30), 1)[0]
            said = meanings(self._draw.randrange(2**30), 20 * periods)
            ids = encode(lesson(language, said))[: periods * self._period]
            begin = len(ids) - len(ids) % self._period
            ids, answers = ids[:begin], [False] * begin
            new = [m for m in meanings(self._draw.randrange(2**30), self._period) if m not in said]
            for at in range(len(new)):
                q = translation(language, new, at, 1)
                ids += q.prompt + q.answers[0]
                answers += [False] * len(q.prompt) + [True] * len(q.answers[0])
            made.append((ids[: begin + self._period + 1], answers[: begin + self._period + 1]))
        return torch.tensor([ids for ids, _ in made]), torch.tensor([answers for _, answers in made])

    def _row(self, entries: Sequence[Entry], ids: list[int], begin: int, end: int) -> tuple[list[int], list[bool]]:
        while len(ids) < begin:  # with text that never comes again: what is known by heart disturbs nothing
            ids = ids + encode(other_text(self._draw, 1))
        ids = ids[:begin]
        answers, questions = [False] * begin, [asked(q) for entry in entries for q in entry.questions]
        while len(ids) < end:
            for q in self._draw.sample(questions, len(questions)):
                ids += q.prompt + q.answers[q.right]
                answers += [False] * len(q.prompt) + [True] * (len(q.answers[q.right]) - 1) + [False]
        return ids[:end], answers[:end]

    def _people(self, count: int) -> list[Entry]:
        while True:
            seed = TRAINED + self._draw.randrange(2**30)
            entries = encyclopaedia(seed, max(count, 2), 2)[:count]
            if not any(self._forbidden & own_words(entry) for entry in entries):
                return entries


def own_words(entry: Entry) -> frozenset[str]:
    """The made-up words of an article: names, town, the end of the work."""
    words = [q.answer.split()[-1] for q in entry.questions if q.kind in ("birthplace", "work")]
    return frozenset([*entry.name.split(), *words])
