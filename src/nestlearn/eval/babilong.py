"""BABILong (Kuratov et al. 2024, arXiv:2406.10149): the facts of a bAbI story, in order, between sentences of books.

Composed from bAbI v1.2 and any text; the questions are the hundred per task that BABILong names, where that list is
beside the stories. Prompts, examples and scoring are lm-evaluation-harness's `babilong_qa1` … `babilong_qa5`.
"""

from __future__ import annotations

import json
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nestlearn.errors import UserError

TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
ARCHIVE = "babi/babi_tasks_v1-2_en_en10k.tar.xz"
INDICES = "babi/babilong_test_100_idxs.json"


@dataclass(frozen=True)
class Question:
    """The facts told so far, and what is asked about them."""

    facts: tuple[str, ...]
    question: str
    answer: str


def parse_babi(text: str) -> list[Question]:
    """Lines "ID fact" or "ID question<TAB>answer<TAB>supporting facts"; a story begins where the ID is 1."""
    facts: list[str] = []
    found: list[Question] = []
    for line in text.splitlines():
        number, _, rest = line.strip().partition(" ")
        if number == "1":
            facts = []
        parts = [part.strip() for part in rest.split("\t")]
        if len(parts) > 1:
            found.append(Question(tuple(facts), parts[0], parts[1]))
        elif rest:
            facts.append(rest.strip())
    return found


def read_questions(folder: Path, task: str) -> list[Question]:
    """BABILong's hundred test questions of a task. UserError where the stories are missing."""
    if task not in TASKS:
        raise UserError(f"BABILong task is {task!r}, must be one of {list(TASKS)}")
    archive, indices = folder / ARCHIVE, folder / INDICES
    for path in (archive, indices):
        if not path.is_file():
            raise UserError(f"{path} is missing: bAbI v1.2 (en-10k) and the index file of github booydar/babilong")
    questions = parse_babi(_test_file(archive, task))
    return [questions[index] for index in json.loads(indices.read_text())[task]]


def _test_file(archive: Path, task: str) -> str:
    with tarfile.open(archive) as files:
        for member in files:
            if re.search(rf"/en-10k/{task}_.*_test\.txt$", member.name):
                file = files.extractfile(member)
                assert file is not None  # a regular file
                return file.read().decode()
    raise UserError(f"{archive}: holds no en-10k test file of {task}: fetch bAbI v1.2 again")


def sentences(text: str) -> list[str]:
    """A book as sentences, white space made single blanks."""
    return [s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s]


def compose(
    questions: Sequence[Question], book: Sequence[str], length: int, count: Callable[[str], int], seed: int = 42
) -> Iterator[dict[str, str]]:
    """A document {input, question, target} for each question: facts among sentences, at most `length` tokens of both.

    book    sentences, read on from a random place, around the end
    length  0 gives the facts alone
    """
    rng = random.Random(seed)
    sizes = [count(sentence + " ") for sentence in book] if length else []
    if sum(sizes) < length:
        raise UserError(f"the books have {sum(sizes):,} tokens, not enough for {length:,}: give more text with --text")
    for question in questions:
        room = length - count(" ".join([*question.facts, question.question]))
        background = stretch(book, sizes, room, rng) if length else []
        places = sorted(rng.choices(range(len(background) + 1), k=len(question.facts)))
        parts: list[str] = []
        facts = iter(zip(places, question.facts, strict=True))
        place, fact = next(facts, (-1, ""))
        for index, sentence in enumerate([*background, ""]):
            while place == index:
                parts.append(fact)
                place, fact = next(facts, (-1, ""))
            parts.append(sentence)
        yield {"input": " ".join(filter(None, parts)), "question": question.question, "target": question.answer}


def stretch(book: Sequence[str], sizes: Sequence[int], room: int, rng: random.Random) -> list[str]:
    """Sentences in their order that fit into `room` tokens."""
    begin, chosen = rng.randrange(len(book)), []
    for step in range(len(book)):
        index = (begin + step) % len(book)
        room -= sizes[index]
        if room < 0:
            break
        chosen.append(book[index])
    return chosen
