"""In-context recall in words: a prompt holds what it asks for, and a model that knows it gets full marks."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nestlearn.errors import UserError
from nestlearn.eval.mqar import ASKED, CHOICES, MQAR, harness_config, questions

BOOK = " ".join(f"Sentence {n} says {n * n % 89}." for n in range(4000))


def tokens(text: str) -> int:
    return len(text.encode())


def shown(prompt: str) -> dict[str, str]:
    """What a prompt says before its first question."""
    pairs, _, _ = prompt.partition("\n")
    return dict(re.findall(r"The (\w+) is (\w+)\.", pairs))


@pytest.mark.parametrize("pairs", MQAR.values())
@pytest.mark.parametrize("length", [0, 3000])
def test_every_question_can_be_answered_from_its_prompt_alone(pairs, length):
    made = list(questions(pairs, BOOK if length else "", length, 3, tokens))
    assert len(made) == 3 * min(pairs, ASKED) and len({question.prompt for question in made}) == len(made)
    for question in made:
        values = shown(question.prompt)
        key = question.prompt.rpartition("The ")[2].removesuffix(" is")
        assert len(values) == len(set(values.values())) == pairs
        assert question.choices[question.right] == values[key]
        assert len(set(question.choices)) == min(pairs, CHOICES) and set(question.choices) <= set(values.values())
        assert ("Sentence" in question.prompt) == (length > 0)


def test_the_answers_before_a_question_are_given_and_no_key_is_asked_twice():
    made = list(questions(16, "", 0, 1, tokens))
    values = shown(made[0].prompt)
    said = re.findall(r"The (\w+) is (\w+)\.", made[-1].prompt.partition("\n")[2])
    assert len(said) == len(dict(said)) == ASKED - 1 and all(values[key] == value for key, value in said)


def test_lengths_are_kept_and_filled():
    for pairs in (4, 32):
        longest = list(questions(pairs, BOOK, 3000, 2, tokens))[min(pairs, ASKED) - 1 :: min(pairs, ASKED)]
        for question in longest:
            whole = tokens(f"{question.prompt} {question.choices[question.right]}.")
            assert 3000 - 30 <= whole <= 3000


def test_the_right_answer_is_anywhere_among_the_choices():
    places = [question.right for question in questions(8, "", 0, 30, tokens)]
    assert set(places) == set(range(8)) and max(map(places.count, places)) < 60


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="not enough for 3,000"):
        next(questions(4, "One.", 3000, 1, tokens))
    with pytest.raises(UserError, match="too short for 32 pairs"):
        next(questions(32, BOOK, 100, 1, tokens))


def test_the_harness_takes_the_task_and_counts_what_is_right():
    pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask

    task: Any = ConfigurableTask(config=harness_config("mqar_4", BOOK, [0, 1024], 2, tokens))
    documents = list(task.test_docs())
    assert [document["max_length"] for document in documents] == [0] * 8 + [1024] * 8
    document = documents[9]
    requests = task.construct_requests(document, task.doc_to_text(document), metadata=("mqar_4", 9, 1))
    assert [request.args[1] for request in requests] == [f" {choice}" for choice in document["choices"]]
    right = document["right"]
    known = [(0.0 if n == right else -1.0, False) for n in range(4)]
    assert task.process_results(document, known) == {"acc_1024": 1.0, "exact_1024": 0.0}
    wrong = [(-1.0 if n == right else -0.5, n == right) for n in range(4)]
    assert task.process_results(document, wrong) == {"acc_1024": 0.0, "exact_1024": 1.0}
