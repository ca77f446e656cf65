"""Formal languages: labels against truths written another way, the distribution of strings against the files."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nestlearn.errors import UserError
from nestlearn.eval.synthetic import LANGUAGES, Example, encode, generate_language, read_language
from tests.eval.synthetic.two_samples import LEAST, data_folder, same_distribution

FILES = data_folder("formal_languages")
files_present = pytest.mark.skipif(not FILES.is_dir(), reason=f"{FILES} is not there")


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, list[Example]]]:
    return {name: generate_language(name, seed=1) for name in LANGUAGES}


def truth(name: str, source: str) -> list[set[str]]:
    """The set of right answers after each symbol, from the definition of the language."""
    found = []
    for end in range(1, len(source) + 1):
        prefix = source[:end]
        if name == "parity":
            found.append({str(1 - sum(map(int, prefix)) % 2)})
        elif name in ("aa-star", "abab-star"):
            unit = name.split("-")[0]
            found.append({str(int(prefix.replace(unit, "") == ""))})
        elif name == "shuffle-2":
            open_ones = {close: prefix.count(start) - prefix.count(close) for start, close in ("()", "[]")}
            found.append({"(", "["} | {close for close, depth in open_ones.items() if depth})
        else:
            found.append(followers("abc"[: int(name[-1])], prefix))
    return found


def followers(letters: str, prefix: str, longest: int = 60) -> set[str]:
    """What comes next in some string of the language that begins with the prefix."""
    whole = ["".join(letter * n for letter in letters) + "T" for n in range(1, longest)]
    return {word[len(prefix)] for word in whole if word.startswith(prefix)}


@pytest.mark.parametrize("name", LANGUAGES)
def test_targets_are_those_of_the_definition(name, made):
    answers = LANGUAGES[name].answers
    for split, examples in made[name].items():
        for example in examples[:: max(1, len(examples) // 40)]:
            ids, right = encode(name, example)
            assert "".join(LANGUAGES[name].symbols[i] for i in ids) == example.source
            got = [{answers[i] for i in np.flatnonzero(row)} for row in right]
            assert got == truth(name, example.source), (split, example)


@pytest.mark.parametrize("name", LANGUAGES)
def test_strings_belong_to_the_language_and_to_their_split(name, made):
    for split, low, high in (("train", 2, 50), ("val_in_dist", 2, 50), ("test_longer", 51, 100)):
        assert all(low <= len(e.source) <= high for e in made[name][split])
    last = [encode(name, e)[1][-1] for e in made[name]["train"][:200]]
    answers = LANGUAGES[name].answers
    ends = {"counter-2": "T", "counter-3": "T", "shuffle-2": "(["}.get(name, "1")
    assert all({answers[i] for i in np.flatnonzero(row)} == set(ends) for row in last)


def test_a_seed_is_all_that_matters(made):
    assert generate_language("parity", seed=1) == made["parity"] != generate_language("parity", seed=2)


@files_present
@pytest.mark.parametrize("name", LANGUAGES)
def test_the_files_targets_are_ours(name):
    label = LANGUAGES[name].label
    for examples in read_language(name, FILES).values():
        assert all(label(e.source) == e.target for e in examples)


@files_present
@pytest.mark.parametrize("name", LANGUAGES)
def test_strings_are_distributed_as_in_the_files(name, made):
    """Lengths, pairs of symbols at random places, and target sets with where they stand."""
    given = read_language(name, FILES)
    for split in given:
        ours, theirs = made[name][split], given[split]
        if len(theirs) < 100:  # one string of each length: the same strings
            assert {e.source for e in ours} == {e.source for e in theirs}
            continue
        for look in (lambda e, rng: len(e.source), pair, answer):
            rng = random.Random(0)
            p = same_distribution([look(e, rng) for e in ours], [look(e, rng) for e in theirs])
            assert p > LEAST, (split, look)


def pair(example: Example, rng: random.Random) -> str:
    at = rng.randrange(len(example.source) - 1)
    return example.source[at : at + 2]


def answer(example: Example, rng: random.Random) -> tuple[str, str]:
    """A symbol and the target after it: one of each string, so that the draws are independent."""
    at, width = rng.randrange(len(example.source)), len(example.target) // len(example.source)
    return example.source[at], example.target[at * width : (at + 1) * width]


@files_present
def test_the_comparison_notices_other_distributions(made):
    """Strings of a uniform length, or with more 1s, are told apart from the files'."""
    theirs, rng = read_language("parity", FILES)["train"], random.Random(0)
    lengths = [len(e.source) for e in theirs]
    assert same_distribution([rng.randint(2, 50) for _ in lengths], lengths) < LEAST
    assert same_distribution([n + (rng.random() < 0.1) for n in lengths], lengths) < LEAST
    pairs, given = ([pair(e, rng) for e in examples] for examples in (made["parity"]["train"], theirs))
    assert same_distribution([p.replace("0", "1", rng.random() < 0.2) for p in pairs], given) < LEAST


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="language is 'partiy'.*did you mean 'parity'"):
        generate_language("partiy", 0)
    with pytest.raises(UserError, match="does not exist: name the folder"):
        read_language("parity", tmp_path)
