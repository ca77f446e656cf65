"""Needles in a haystack and BABILong: what is asked can be answered from the prompt, and lengths are kept."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from nestlearn.errors import UserError
from nestlearn.eval.babilong import compose, parse_babi, read_questions, sentences
from nestlearn.eval.needles import NEEDLES, NEW_TOKENS, found, found_any, harness_config, samples

DATA = Path(os.environ.get("NESTLEARN_DATA", Path(__file__).parents[2] / "../shared/data"))
STORY = (
    "1 Mary went home.\n2 John ran off.\n3 Where is Mary? \thome\t1\n4 Mary left.\n5 Where is John?\toff\t2\n1 Al sat."
)
BOOK = " ".join(f"Sentence {n} says {n * n % 89}." for n in range(4000))


def tokens(text: str) -> int:
    return len(text.encode())


@pytest.mark.parametrize("name", NEEDLES)
@pytest.mark.parametrize("length", [1024, 4096])
def test_a_sample_fills_its_length_and_holds_its_answers(name, length):
    task = NEEDLES[name]
    made = list(samples(task, BOOK, length, 4, tokens))
    assert len({sample.prompt for sample in made}) == 4
    for sample in made:
        size = tokens(f"{sample.prompt} {sample.prefix}") + NEW_TOKENS
        assert length - 250 <= size <= length
        assert len(sample.answers) == task.values * task.asked
        for answer in sample.answers:
            assert sample.prompt.count(f"is: {answer}.") == 1
        assert sample.prompt.count("One of the special magic") == task.count


def test_the_words_of_a_prompt_are_ruler_s():
    one = next(samples(NEEDLES["ruler_single_passkey"], "", 1024, 1, tokens))
    assert one.prompt.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it."
    )
    assert one.prompt.count("The grass is green. The sky is blue.") > 3
    assert "\nWhat is the special magic number for " in one.prompt and one.prefix.endswith("provided text is")
    many = next(samples(NEEDLES["ruler_multiquery"], BOOK, 2048, 1, tokens))
    assert many.prompt.startswith("Some special magic numbers are hidden") and ", and " in many.prefix


def test_the_same_seed_gives_the_same_samples():
    one, two = (list(samples(NEEDLES["ruler_multikey"], BOOK, 2048, 2, tokens)) for _ in range(2))
    assert one == two and one != list(samples(NEEDLES["ruler_multikey"], BOOK, 2048, 2, tokens, seed=1))


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="not enough for 4,096 tokens"):
        next(samples(NEEDLES["ruler_single_number"], "too short.", 4096, 1, tokens))
    with pytest.raises(UserError, match="too short for 4 needles"):
        next(samples(NEEDLES["ruler_multivalue"], BOOK, 256, 1, tokens))


def test_scores_are_ruler_s():
    assert found(" It is 12 and\x0134.", ["12", "34", "56", "7"]) == 0.5
    assert found("ABC", ["abc"]) == 1 and found_any("abc", ["x", "ABC"]) == 1 and found_any("", ["x"]) == 0


def test_the_harness_takes_the_task():
    pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask

    task = ConfigurableTask(config=harness_config("ruler_multivalue", BOOK, [1024, 2048], 2, tokens))
    documents = list(task.test_docs())
    assert [document["max_length"] for document in documents] == [1024, 1024, 2048, 2048]
    answer = " ".join(documents[2]["outputs"][:3])
    assert task.process_results(documents[2], [answer]) == {"2048": 0.75}


def test_bab_i_is_read_story_by_story():
    first, second = parse_babi(STORY)
    assert (first.facts, first.question, first.answer) == (
        ("Mary went home.", "John ran off."),
        "Where is Mary?",
        "home",
    )
    assert second.facts == ("Mary went home.", "John ran off.", "Mary left.") and second.answer == "off"


@pytest.mark.parametrize("length", [0, 1000, 5000])
def test_facts_keep_their_order_between_sentences_of_the_book(length):
    book = sentences(BOOK)
    for question, document in zip(parse_babi(STORY), compose(parse_babi(STORY), book, length, tokens), strict=True):
        rest = document["input"]
        for fact in question.facts:
            before, _, rest = rest.partition(fact)
            assert fact not in before
        size = tokens(document["input"] + " " + question.question)
        assert max(0, length - 40) <= size <= max(length, 120)
        assert document["target"] == question.answer and (length > 0) == ("Sentence" in document["input"])


def test_books_that_are_too_short_are_refused():
    with pytest.raises(UserError, match="not enough for 5,000"):
        next(compose(parse_babi(STORY), ["One."], 5000, tokens))
    with pytest.raises(UserError, match="is missing"):
        read_questions(Path("nowhere"), "qa1")
    with pytest.raises(UserError, match="must be one of"):
        read_questions(Path("nowhere"), "qa9")


@pytest.mark.skipif(not (DATA / "babi").is_dir(), reason="no bAbI")
@pytest.mark.parametrize("task", ["qa1", "qa3"])
def test_the_real_stories_answer_their_questions(task):
    questions = read_questions(DATA, task)
    assert len(questions) == 100
    picked = random.Random(0).sample(questions, 20)
    assert all(any(q.answer in fact for fact in q.facts) and q.question.endswith("?") for q in picked)
