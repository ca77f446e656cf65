"""Formal languages as Bhattamishra et al. give them to sequence models (arXiv 2009.11264): a target for every prefix.

    parity       0 and 1, evenly many 1s     is the prefix in the language? 1 or 0
    aa-star      (aa)*                       the same
    abab-star    (abab)*                     the same
    counter-2    aⁿ bⁿ                       which symbols may follow; T ends the string
    counter-3    aⁿ bⁿ cⁿ                    the same
    shuffle-2    brackets () and [], each    which brackets may follow; an open one always may
                 balanced by itself          (the generator draws only strings whose pairs do not cross)

Training strings are at most 50 symbols long, the tests at most 50 and 51 to 100. The strings and their distribution are
those of the authors' generators, and targets are written as there: one character per symbol (for counters, the letter
after the last one stands for "a or b"), for shuffle-2 two bits, whether ")" and whether "]" may follow.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nestlearn.errors import UserError, suggest

SPLITS = {"train": (2, 50, 10_000), "val_in_dist": (2, 50, 2_000), "test_longer": (51, 100, 2_000)}


class Example(NamedTuple):
    """A string and its target, as text."""

    source: str
    target: str


class Language(NamedTuple):
    """How a language is drawn and labelled.

    symbols, answers  what is read; what a target is a set of
    label             string -> target, as text
    sets              target as text -> the set of answers after each symbol
    draw              (generator, shortest, longest) -> strings without end; None for languages with one string a length
    word              n -> the n-th string of such a language
    uniform           "length": n is a length drawn uniformly, over the step; "count": n itself is drawn uniformly
    """

    symbols: str
    answers: str
    label: Callable[[str], str]
    sets: Callable[[str], list[str]]
    draw: Callable[[random.Random, int, int], Iterator[str]] | None = None
    word: Callable[[int], str] = str
    uniform: str = "length"


def generate_language(name: str, seed: int) -> dict[str, list[Example]]:
    """All splits of a language. Where it has one string a length, the tests hold each of them once."""
    language, rng = named(name), random.Random(f"{name} {seed}")
    low, high, count = SPLITS["train"]
    if language.draw is None:
        drawn = [_one_of(language, rng, low, high) for _ in range(count)]
        strings = {"train": drawn} | {split: every(language, *SPLITS[split][:2]) for split in list(SPLITS)[1:]}
    else:
        near = _take(language.draw(rng, low, high), count + SPLITS["val_in_dist"][2])
        low, high, longer = SPLITS["test_longer"]
        far = _take(language.draw(rng, low, high), longer)
        strings = {"train": near[:count], "val_in_dist": near[count:], "test_longer": far}
    return {split: [Example(s, language.label(s)) for s in found] for split, found in strings.items()}


def read_language(name: str, folder: Path) -> dict[str, list[Example]]:
    """All splits from ``folder``/NAME.jsonl.gz, lines of {"split", "src", "tgt"}."""
    named(name)
    path = folder / f"{name}.jsonl.gz"
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the folder of the languages' files, or none to generate them")
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            splits[row["split"]].append(Example(row["src"], row["tgt"]))
    return splits


def encode(name: str, example: Example) -> tuple[np.ndarray, np.ndarray]:
    """(ids (T,), which answers are right after each symbol (T, answers) bool)."""
    language = named(name)
    ids = np.array([language.symbols.index(s) for s in example.source])
    allowed = [[answer in right for answer in language.answers] for right in language.sets(example.target)]
    return ids, np.array(allowed, dtype=bool)


def named(name: str) -> Language:
    """The language of that name."""
    if name not in LANGUAGES:
        raise UserError(f"language is {name!r}, must be one of {list(LANGUAGES)}{suggest(name, LANGUAGES)}")
    return LANGUAGES[name]


def every(language: Language, low: int, high: int) -> list[str]:
    """Each string of low … high symbols of a language with one string a length."""
    words = (language.word(n) for n in range(1, high + 1))
    return [word for word in words if low <= len(word) <= high]


def _one_of(language: Language, rng: random.Random, low: int, high: int) -> str:
    """A random string; n may be drawn by its length or by itself."""
    step = len(language.word(1))
    while True:
        n = rng.randint(low, high) // step if language.uniform == "length" else rng.randint(1, high // step)
        if low <= n * step <= high:
            return language.word(n)


def _take(strings: Iterator[str], count: int) -> list[str]:
    return [string for _, string in zip(range(count), strings, strict=False)]


def _draw_parity(rng: random.Random, low: int, high: int) -> Iterator[str]:
    """Bits that end with a probability of 1 in 1 + the mean length; a string with oddly many 1s gets one more."""
    end, seen = 1 / (1 + (low + high) // 2), set[str]()
    while True:
        string = ""
        while len(string) < high and rng.random() >= end:
            string += rng.choice("01")
        if string in seen or len(string) < low:
            continue
        string += "1" if string.count("1") % 2 else ""
        if len(string) <= high:
            seen.add(string)
            yield string


def _draw_brackets(rng: random.Random, low: int, high: int) -> Iterator[str]:
    """S → bracket S bracket (p = ½), S S (¼) or nothing (¼); what grows too long is nothing. No string twice."""

    def grow(size: int) -> str:
        if size >= high:
            return ""
        chance, string = rng.random(), ""
        if chance < 0.5:
            pair = rng.choice(("()", "[]"))
            string = pair[0] + grow(size + 2) + pair[1]
        elif chance < 0.75:
            string = grow(size) + grow(size)
        return string if len(string) <= high else ""

    seen = set[str]()
    while True:
        string = grow(0)
        if len(string) >= low and string not in seen:
            seen.add(string)
            yield string


def _prefixes(inside: Callable[[str], bool]) -> Callable[[str], str]:
    """Labels by membership of every prefix."""
    return lambda string: "".join("01"[inside(string[: t + 1])] for t in range(len(string)))


def _label_counter(string: str) -> str:
    """While the first letter comes, it or the second may follow; then everything is determined."""
    letters = sorted(set(string))
    n, free = len(string) // len(letters), chr(ord(letters[-1]) + 1)
    return free * n + string[n + 1 :] + "T"


def _label_brackets(string: str) -> str:
    bits, depth = "", {"(": 0, "[": 0}
    for symbol in string:
        opening = {")": "(", "]": "["}.get(symbol, symbol)
        depth[opening] += 1 if symbol == opening else -1
        bits += "".join("01"[d > 0] for d in depth.values())
    return bits


def _bracket_sets(target: str) -> list[str]:
    pairs = zip(target[::2], target[1::2], strict=True)
    return ["([" + ")" * (first == "1") + "]" * (second == "1") for first, second in pairs]


def _counter(letters: str) -> Language:
    free = chr(ord(letters[-1]) + 1)
    return Language(
        letters,
        letters + "T",
        _label_counter,
        lambda target: [letters[:2] if answer == free else answer for answer in target],
        word=lambda n: "".join(letter * n for letter in letters),
        uniform="count",
    )


LANGUAGES: dict[str, Language] = {
    "parity": Language("01", "01", _prefixes(lambda s: s.count("1") % 2 == 0), list, _draw_parity),
    "aa-star": Language("a", "01", _prefixes(lambda s: len(s) % 2 == 0), list, word=lambda n: "aa" * n),
    "abab-star": Language("ab", "01", _prefixes(lambda s: len(s) % 4 == 0), list, word=lambda n: "abab" * n),
    "counter-2": _counter("ab"),
    "counter-3": _counter("abc"),
    "shuffle-2": Language("()[]", "()[]", _label_brackets, _bracket_sets, _draw_brackets),
}
