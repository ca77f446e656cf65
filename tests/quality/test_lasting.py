"""benchmarks/quality/lasting.py: the text it makes, how it asks, and a small run from the first step to the JSON."""

import json

import pytest
import torch

from benchmarks.quality import lasting as script
from benchmarks.quality import lasting_text as text
from nestlearn.continual.facts import encyclopaedia

SMALL = ["--width", "16", "--layers", "2", "--base-steps", "3", "--base-batch", "2", "--base-length", "160",
         "--steps", "2", "--batch", "2", "--curriculum", "1", "2+1", "--people", "4", "--streams", "2", "--later", "64",
         "--whole", "64", "--periods", "160", "--rates", "1", "2", "--asked", "4", "--sentences", "8"]  # fmt: skip


def arguments(folder, stage, *more):
    return script.arguments([stage, "--out", str(folder), "--json", str(folder / f"{stage}.json"), *SMALL, *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lasting")
    script.train_all(arguments(folder, "train", "--orders", "exact"))
    return folder


def test_questions_begin_where_all_articles_are_written():
    draw = text.Sequences(0, 96, frozenset())
    ids, answers = draw.batch(3, 2)
    assert ids.shape == answers.shape and ids.shape[1] % 96 == 1
    begin = ids.shape[1] - 97
    assert not answers[:, :begin].any() and answers[:, begin:].any(dim=1).all()
    for row, own in zip(ids.tolist(), answers, strict=True):
        article, asked = text.tokenizer().decode(row[:begin]), text.tokenizer().decode(row[begin:])
        town = article.split(" was born in ")[1].split(".")[0]
        assert article.count(town) >= 2 and asked.startswith("\n")
        starts = [i for i in range(1, len(own)) if own[i] and not own[i - 1]]
        assert all(text.tokenizer().decode([row[i]]).startswith(" ") for i in starts)
    again = text.Sequences(0, 96, frozenset()).batch(3, 2)[0]
    assert torch.equal(ids, again) and not torch.equal(ids, draw.batch(3, 2)[0])
    assert draw.batch(1, 1, length=200)[0].shape == (1, 201)
    assert draw.batch(1, 1, apart=2)[0].shape[1] == draw.batch(1, 1)[0].shape[1] + 2 * 96


def test_other_text_is_new_in_every_sequence():
    draw = text.Sequences(0, 256, frozenset())
    rows = [row[160:512] for _ in range(3) for row in draw.batch(2, 1, apart=1)[0].tolist()]
    lines = [{line for line in text.tokenizer().decode(row).split("\n")[1:-1] if ":" in line} for row in rows]
    assert all(lines) and not any(a & b for i, a in enumerate(lines) for b in lines[:i])


def test_lessons_are_asked_with_other_sentences():
    ids, answers = text.Sequences(0, 96, frozenset()).lessons(2, 3)
    assert ids.shape == answers.shape == (2, 4 * 96 + 1) and not answers[:, : 3 * 96].any() and answers.any()
    for row in ids.tolist():
        taught, asked = text.tokenizer().decode(row[: 3 * 96]), text.tokenizer().decode(row[3 * 96 :])
        assert " means farmer." in taught and asked.startswith("\nIn ")
        assert asked.split("In English:")[0] not in taught


def test_what_is_tested_occurs_in_no_training_text():
    first = text.Sequences(3, 96, frozenset())._people(2)
    words = text.own_words(first[0])
    assert len(words) == 4 and set(first[0].name.split()) < words
    other = text.Sequences(3, 96, words)._people(2)  # the same seed would have drawn the same people
    assert not any(words & text.own_words(entry) for entry in other)
    told = script.forbidden()
    for size in script.SIZES:
        assert all(text.own_words(entry) < told for entry in encyclopaedia(text.TESTED[-1], size, script.CHOICES))


def test_nats_of_answers_are_those_of_one_at_a_time():
    model = script.make_model(script.arguments(["train", "--out", "x", "--width", "16", "--layers", "2"])).eval()
    questions = [text.asked(q) for q in encyclopaedia(1, 4, 4)[0].questions]
    found = script.choices_nats(model, {}, questions)
    for question, nats in zip(questions, found, strict=True):
        for answer, own in zip(question.answers, nats, strict=True):
            ids = torch.tensor([question.prompt + answer])
            with torch.no_grad():
                logs = model(input_ids=ids).logits.log_softmax(-1)[0]
            begin = len(question.prompt)
            expected = -sum(float(logs[i - 1, ids[0, i]]) for i in range(begin, ids.shape[1]))
            assert own == pytest.approx(expected, abs=1e-3)


def test_a_run_from_the_first_step_to_the_table(folder, capsys):
    args = arguments(folder, "facts", "--orders", "exact")
    found = script.measure(args)
    assert list(found["results"]) == [f"facts-transformer-0 exact levels-{n} 160 people-4" for n in range(4)]
    frozen, *adapted = found["results"].values()
    assert frozen["after"] == frozen["later"]
    for own in adapted:
        assert own["after"] != frozen["after"] and own["later"] != own["after"]
    done = json.loads((folder / "facts-transformer-0" / "exact" / "done.json").read_text())
    assert len(done["rates"]) == 3 and all(rate > 0 for rate in done["rates"])
    capsys.readouterr()
    assert script.measure(args) == found and capsys.readouterr().out == ""


def test_languages(folder):
    found = script.measure(arguments(folder, "languages", "--text", "facts", "--orders", "exact"))
    last = found["results"]["facts-transformer-0 exact levels-3 160"]
    assert [len(last[when]) for when in ("before", "after the first", "after the second")] == [2, 2, 2]
    assert last["before"] != last["after the first"] != last["after the second"]


def test_levels_in_the_last_block_of_a_hope_go_on_from_another_model(tmp_path):
    """C++ or torch, whose memories have one derivative, and periods p, 2 p, 4 p, from the rates learned before."""
    hope = ["--mixer", "self_modifying", "--top", "8", "--memory", "4", "--orders", "exact"]
    script.train_all(arguments(tmp_path / "first", "train", *hope))
    start = tmp_path / "first" / "facts-self_modifying-0" / "exact"
    args = arguments(tmp_path / "second", "train", *hope, "--start", str(start), "--spread", "2")
    learner = script.go_on("exact", args)
    assert [level.period for level in learner.levels] == [160, 320, 640]
    assert {weight.split(".")[2] for level in learner.levels for weight in level.weights} == {"1"}
    rates = json.loads((start / "done.json").read_text())["rates"]
    assert [level.lr for level in learner.levels] == pytest.approx(rates, abs=1e-4)
    script.train_all(args)
    assert not script.folder(args, "base").exists()
    for place, orders in (("first", "base"), ("second", "exact")):
        found = script.measure(arguments(tmp_path / place, "facts", *hope, "--orders", orders, "--counts", "3"))
        assert all(own["after"] != own["later"] for own in found["results"].values())
