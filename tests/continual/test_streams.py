"""Class-incremental streams: every class in one task, every text in one part."""

import pytest

from nestlearn.continual.labelled import Row
from nestlearn.continual.streams import class_incremental
from nestlearn.errors import UserError


def rows(classes=6, each=20, **more):
    return [
        Row(f"text {c} {i}", f"c{c}", more.get("task"), more.get("split")) for c in range(classes) for i in range(each)
    ]


def test_every_class_is_in_one_task_and_every_text_in_one_part():
    stream = class_incremental(rows(), seed=0, tasks=4)
    assert sorted(c for task in stream.tasks for c in task.classes) == list(range(6))
    assert [len(task.classes) for task in sorted(stream.tasks, key=lambda t: t.name)] == [1, 2, 1, 2]
    texts = [text for task in stream.tasks for part in (task.train, task.valid, task.test) for text in part.texts]
    assert sorted(texts) == sorted(row.text for row in rows())
    for task in stream.tasks:
        for part, each in ((task.train, 14), (task.valid, 2), (task.test, 4)):
            assert len(part) == each * len(task.classes) and set(part.labels) == set(task.classes)
            assert all(
                text.split()[1] == stream.classes[label][1:]
                for text, label in zip(part.texts, part.labels, strict=True)
            )


def test_the_seed_draws_the_texts_and_the_order():
    one, again, other = (class_incremental(rows(10), seed=s, train=5) for s in (1, 1, 2))
    assert one == again and one.classes == other.classes
    assert [t.name for t in one.tasks] != [t.name for t in other.tasks]
    by_name = [{t.name: t.train.texts for t in s.tasks} for s in (one, other)]
    assert by_name[0].keys() == by_name[1].keys() and by_name[0] != by_name[1]


def test_the_rows_own_tasks_and_splits_are_kept():
    given = [row._replace(task="a" if row.label < "c3" else "b") for row in rows()]
    given += [Row(f"held {row.label}", row.label, row.task, "test") for row in given if row.text.endswith(" 0")]
    stream = class_incremental(given, seed=0)
    assert {task.name: len(task.classes) for task in stream.tasks} == {"a": 3, "b": 3}
    assert all(text.startswith("held") for task in stream.tasks for text in task.test.texts)
    assert sum(len(task.train) + len(task.valid) for task in stream.tasks) == 120


def test_what_makes_no_stream_is_refused():
    for given, options, message in (
        (rows(1), {}, "at least 2"),
        (rows(3), {"tasks": 4}, "within 1 and the 3 classes"),
        (rows(3, 1), {}, "too few to learn and to test it"),
        (rows(3, split="test"), {}, "too few"),
    ):
        with pytest.raises(UserError, match=message):
            class_incremental(given, seed=0, **options)
