"""Needles in a haystack, as RULER defines them (Hsieh et al. 2024, arXiv:2404.06654; lm-evaluation-harness `ruler`).

A needle says "One of the special magic numbers for KEY is: VALUE."; needles lie at random depths of a haystack; the
question asks for all values of one key or of several. Templates, depths and scoring are RULER's. Three things differ:
the essays are the user's own text, keys are drawn from the words below (RULER: from the package `wonderwords`), and
the haystack is the longest that fits (RULER goes in steps of 5, 25 or 500 units).
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nestlearn.errors import UserError

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEW_TOKENS = 128  # room for the answer; it counts towards the length
DEPTHS = [round(100 * step / 39) for step in range(40)]  # percent

_ADJECTIVES = (
    "able bitter calm distant eager faint gentle hollow idle jolly keen lively mellow narrow odd plain quick rapid "
    "silent tender upbeat vivid weary young zesty bold crisp damp elegant fierce grand humble icy loyal modest noble"
)
_NOUNS = (
    "anchor basket candle desert engine feather garden hammer island jacket kettle ladder market needle orchard pencil "
    "quarry ribbon saddle tunnel umbrella valley window yard zipper bridge cotton dragon forest glacier harbor lantern"
)
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


@dataclass(frozen=True)
class Needles:
    """One RULER task. `essay` hides the needles in the user's text instead of noise; `keys` of which are asked for."""

    kind: str = "numbers"
    essay: bool = True
    keys: int = 1
    values: int = 1
    asked: int = 1

    @property
    def count(self) -> int:
        return self.keys * self.values


NEEDLES = {
    "ruler_single_passkey": Needles(essay=False),  # RULER's niah_single_1
    "ruler_single_number": Needles(),  # niah_single_2
    "ruler_single_uuid": Needles("uuids"),  # niah_single_3
    "ruler_multikey": Needles(keys=4),  # niah_multikey_1
    "ruler_multivalue": Needles(values=4),  # niah_multivalue
    "ruler_multiquery": Needles(keys=4, asked=4),  # niah_multiquery
}


@dataclass(frozen=True)
class Sample:
    """A prompt, the beginning of its answer, and the strings that the answer must hold."""

    prompt: str
    prefix: str
    answers: tuple[str, ...]


def samples(
    task: Needles, text: str, length: int, number: int, count: Callable[[str], int], seed: int = 42
) -> Iterator[Sample]:
    """`number` samples of at most `length` tokens, as `count` counts them, the answer's `NEW_TOKENS` included.

    text  the haystack of a task with essays. UserError where it is too short, or `length` too small for the needles
    """
    words = text.split()
    rng = random.Random(seed)
    units = _fitting(task, words, length, count, random.Random(seed))
    for _ in range(number):
        state = rng.getstate()
        sample = sample_of(task, words, units, rng)
        less = units
        while _tokens(sample, count) > length and less > task.count:  # needles differ in length by a few tokens
            rng.setstate(state)
            less = max(task.count, less - max(1, less // 100))
            sample = sample_of(task, words, less, rng)
        yield sample


def sample_of(task: Needles, words: Sequence[str], units: int, rng: random.Random) -> Sample:
    """One sample with `units` words of an essay, or so many sentences of noise."""
    keys = rng.sample([f"{a}-{n}" for a in ADJECTIVES for n in NOUNS], task.keys)
    values = {key: [_value(task.kind, rng) for _ in range(task.values)] for key in keys}
    needles = [NEEDLE.format(kind=task.kind, key=key, value=v) for key in keys for v in values[key]]
    rng.shuffle(needles)
    context = _essay(" ".join(words[:units]), needles, rng) if task.essay else _noise(units, needles, rng)
    asked = rng.sample(keys, task.asked)
    query = f"{', '.join(asked[:-1])}, and {asked[-1]}" if len(asked) > 1 else asked[0]
    one = task.asked * task.values == 1
    kind, template = task.kind, TEMPLATE
    if one:
        template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
        kind = kind[:-1]
    prefix = f"The special magic {kind} for {query} mentioned in the provided text {'is' if one else 'are'}"
    prompt = template.format(kind=kind, context=context, query=query)
    return Sample(prompt, prefix, tuple(value for key in asked for value in values[key]))


def found(prediction: str, answers: Sequence[str]) -> float:
    """RULER's string_match_all: the share of the answers that the prediction holds, in any case of letters."""
    said = _printable(prediction)
    return sum(answer.lower() in said for answer in answers) / len(answers)


def found_any(prediction: str, answers: Sequence[str]) -> float:
    """RULER's string_match_part: 1 if the prediction holds one of the answers."""
    said = _printable(prediction)
    return float(any(answer.lower() in said for answer in answers))


def harness_config(
    name: str, text: str, lengths: Sequence[int], number: int, count: Callable[[str], int]
) -> dict[str, Any]:
    """The task as lm-evaluation-harness's `ConfigurableTask` takes it: one metric for each length."""

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        rows = [_document(s, length) for length in lengths for s in samples(NEEDLES[name], text, length, number, count)]
        return {"test": Dataset.from_list(rows)}

    def judge(document: dict[str, Any], results: list[str]) -> dict[str, float]:
        return {str(document["max_length"]): found(results[0], document["outputs"])}

    return {
        "task": name,
        "custom_dataset": dataset,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{input}}",
        "doc_to_target": "{{outputs}}",
        "gen_prefix": "{{gen_prefix}}",
        "process_results": judge,
        "metric_list": [{"metric": str(n), "aggregation": "mean", "higher_is_better": True} for n in lengths],
        "generation_kwargs": {"do_sample": False, "temperature": 0.0, "max_gen_toks": NEW_TOKENS, "until": []},
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


def _document(sample: Sample, length: int) -> dict[str, Any]:
    return {
        "input": sample.prompt,
        "outputs": list(sample.answers),
        "gen_prefix": sample.prefix,
        "max_length": length,
    }


def _value(kind: str, rng: random.Random) -> str:
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return str(rng.randint(10**6, 10**7 - 1))


def _essay(text: str, needles: Sequence[str], rng: random.Random) -> str:
    """Needles between the sentences, each at another of 40 depths."""
    sentences = re.split(r"(?<=[.!?])\s+", text)
    places = sorted(int(len(sentences) * depth / 100) for depth in rng.sample(DEPTHS, len(needles)))
    parts, last = [], 0
    for place, needle in zip(places, needles, strict=True):
        parts += [" ".join(sentences[last:place]), needle]
        last = place
    return " ".join([*parts, " ".join(sentences[last:])])


def _noise(units: int, needles: Sequence[str], rng: random.Random) -> str:
    sentences = [NOISE] * units
    places = sorted(rng.sample(range(units), len(needles)), reverse=True)
    for place, needle in zip(places, needles, strict=True):
        sentences.insert(place, needle)
    return "\n".join(sentences)


def _fitting(task: Needles, words: Sequence[str], length: int, count: Callable[[str], int], rng: random.Random) -> int:
    """The most units of haystack with which a sample is at most `length` tokens long: by doubling, then bisection."""
    most = len(words) if task.essay else length
    state = rng.getstate()

    def fits(units: int) -> bool:
        rng.setstate(state)
        return _tokens(sample_of(task, words, units, rng), count) <= length

    low = max(task.count, 1)
    if most < low or not fits(low):
        raise UserError(f"length is {length} tokens: too short for {task.count} needles and their question, give more")
    high = low
    while high < most and fits(high):
        low, high = high, min(2 * high, most)
    if high == most and fits(most):
        if not task.essay:
            return most
        raise UserError(
            f"the haystack has {len(words):,} words, not enough for {length:,} tokens: give more text with --text"
        )
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _tokens(sample: Sample, count: Callable[[str], int]) -> int:
    return count(f"{sample.prompt} {sample.prefix}") + NEW_TOKENS


def _printable(prediction: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
