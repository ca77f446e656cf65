"""In-context recall: MQAR (Arora et al. 2023, arXiv:2312.04927) in words that a language model can read.

    The anchor is violet. The basket is mellow. …          P pairs, no word twice
    [a stretch of the user's text, up to the length]        MQAR's gap, here one and the same for all questions
    The basket is mellow. The anchor is                     the keys again in a new order, each answered before the next

A question's answer is one of at most `CHOICES` values of the same prompt, the right one among them: "acc" is the share
of questions for which the right one is the likeliest (chance 1/min(P, CHOICES)), "exact" the share for which all of
its tokens are the model's own first choice, as in MQAR. Of a prompt at most `ASKED` keys are asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nestlearn.errors import UserError
from nestlearn.eval.babilong import sentences, stretch
from nestlearn.eval.needles import ADJECTIVES, NOUNS

MQAR = {f"mqar_{pairs}": pairs for pairs in (4, 8, 16, 32)}
ASKED, CHOICES = 8, 8
PAIR = "The {key} is {value}."


@dataclass(frozen=True)
class Question:
    """A prompt up to the value that is asked for, values to choose from, and which of them is right."""

    prompt: str
    choices: tuple[str, ...]
    right: int


def questions(
    pairs: int, text: str, length: int, number: int, count: Callable[[str], int], seed: int = 42
) -> Iterator[Question]:
    """Those of `number` prompts, the longest of each at most `length` tokens, as `count` counts them.

    text    the stretches between pairs and questions are from it
    length  0 for no text between them. UserError where it is too small for the pairs, or the text for it
    """
    rng = random.Random(seed)
    book = sentences(text) if length else []
    sizes = [count(sentence + " ") for sentence in book]
    if sum(sizes) < length:
        raise UserError(f"the text has {sum(sizes):,} tokens, not enough for {length:,}: give more with --text")
    for _ in range(number):
        yield from _prompt(pairs, book, sizes, length, count, rng)


def _prompt(
    pairs: int, book: Sequence[str], sizes: Sequence[int], length: int, count: Callable[[str], int], rng: random.Random
) -> Iterator[Question]:
    """All questions of one prompt; the last one is the longest."""
    values = dict(zip(rng.sample(NOUNS, pairs), rng.sample(ADJECTIVES, pairs), strict=True))
    shown = " ".join(PAIR.format(key=key, value=value) for key, value in values.items())
    asked = rng.sample(list(values), min(pairs, ASKED))
    answered = " ".join(PAIR.format(key=key, value=values[key]) for key in asked)
    between = "\n"
    if length:
        room = length - count(f"{shown}\n\n{answered}")
        if room < 0:
            raise UserError(f"length is {length} tokens: too short for {pairs} pairs and their questions, give more")
        between = f"\n{' '.join(stretch(book, sizes, room, rng))}\n"
    before = f"{shown}{between}"
    for key in asked:
        wrong = rng.sample([value for value in values.values() if value != values[key]], min(pairs, CHOICES) - 1)
        choices = rng.sample([*wrong, values[key]], len(wrong) + 1)
        asking, _, _ = PAIR.partition(" {value}")
        yield Question(before + asking.format(key=key), tuple(choices), choices.index(values[key]))
        before += PAIR.format(key=key, value=values[key]) + " "


def harness_config(
    name: str, text: str, lengths: Sequence[int], number: int, count: Callable[[str], int]
) -> dict[str, Any]:
    """The task as lm-evaluation-harness's `ConfigurableTask` takes it: two metrics for each length."""

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        rows = [(n, question) for n in lengths for question in questions(MQAR[name], text, n, number, count)]
        return {"test": Dataset.from_list([_document(question, length) for length, question in rows])}

    def judge(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
        likelihoods, right = [likelihood for likelihood, _ in results], document["right"]
        length = document["max_length"]
        return {
            f"acc_{length}": float(likelihoods.index(max(likelihoods)) == right),
            f"exact_{length}": float(results[right][1]),
        }

    metrics = [f"{metric}_{length}" for length in lengths for metric in ("acc", "exact")]
    return {
        "task": name,
        "custom_dataset": dataset,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "right",
        "process_results": judge,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


def _document(question: Question, length: int) -> dict[str, Any]:
    return {
        "prompt": question.prompt,
        "choices": list(question.choices),
        "right": question.right,
        "max_length": length,
    }
