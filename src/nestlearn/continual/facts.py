"""A synthetic encyclopaedia of people and places that do not exist: what a model knows of them, it has read here.

Each article states every fact of its person twice, in different words; a question repeats neither sentence's beginning,
so that recalling the words around an answer is not enough where `reworded` is asked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from nestlearn.continual.invented import names
from nestlearn.errors import UserError

TRADES = ("baker", "painter", "sailor", "judge", "gardener", "printer", "surgeon", "carpenter", "astronomer", "weaver",
          "shepherd", "teacher", "miller", "singer", "chemist", "mason", "pilot", "tailor", "potter",
          "locksmith")  # fmt: skip
THINGS = ("bridge", "clock", "novel", "comet", "orchard", "melody", "harbour", "telescope", "recipe", "tower")
# kind: (first statement, second statement, question as stated first, question in other words)
FORMS = {
    "birthplace": ("{name} was born in {answer}.", "The people of {answer} still speak of {name}.",
                   "{name} was born in", "The town where {name} was born is called"),
    "trade": ("By trade {name} was a {answer}.", "As a {answer}, {name} was known far away.",
              "By trade {name} was a", "For a living {name} worked as a"),
    "year": ("{name} came into the world in the year {answer}.", "In {answer} the birth of {name} was written down.",
             "{name} came into the world in the year", "The year in which {name} was born is"),
    "work": ("{name} is remembered for the {answer}.", "Nobody who saw the {answer} forgot {name}.",
             "{name} is remembered for the", "What made {name} famous was the"),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A prompt, its answer, and the answers to choose from, the true one among them."""

    kind: str
    prompt: str
    answer: str
    choices: tuple[str, ...]
    reworded: bool


@dataclass(frozen=True)
class Entry:
    name: str
    article: str
    questions: tuple[Question, ...]


def encyclopaedia(seed: int, people: int, choices: int = 10) -> list[Entry]:
    """``people`` articles with two questions for each fact; each question has ``choices`` answers of its own kind."""
    if not 2 <= choices <= min(people, len(TRADES)):
        raise UserError(
            f"choices is {choices}: must lie within 2 and the smaller of {people} people, {len(TRADES)} trades"
        )
    draw = random.Random(seed)
    who = names(draw, people, parts=2)
    towns = names(draw, people, avoid=[word for name in who for word in name.split()])
    things = names(draw, people, avoid=[*towns, *(word for name in who for word in name.split())])
    answers = {
        "birthplace": towns,
        "trade": [draw.choice(TRADES) for _ in who],
        "year": [str(year) for year in draw.sample(range(1200, 1200 + max(700, people)), people)],
        "work": [f"{draw.choice(THINGS)} of {thing}" for thing in things],
    }
    pools = {kind: sorted(set(TRADES if kind == "trade" else own)) for kind, own in answers.items()}
    return [_entry(draw, name, {k: own[i] for k, own in answers.items()}, pools, choices) for i, name in enumerate(who)]


def _entry(draw: random.Random, name: str, own: dict[str, str], pools: dict[str, list[str]], choices: int) -> Entry:
    first = [form[0].format(name=name, answer=own[kind]) for kind, form in FORMS.items()]
    second = [form[1].format(name=name, answer=own[kind]) for kind, form in FORMS.items()]
    draw.shuffle(second)
    questions = []
    for kind, form in FORMS.items():
        others = draw.sample([other for other in pools[kind] if other != own[kind]], choices - 1)
        mixed = draw.sample([own[kind], *others], choices)
        for reworded in (False, True):
            prompt = form[3 if reworded else 2].format(name=name)
            questions.append(Question(kind, prompt, own[kind], tuple(mixed), reworded))
    return Entry(name, " ".join([*first, *second]) + "\n", tuple(questions))
