"""benchmarks/quality/lasting_languages.py: its lessons, and a small run of every reader from start to JSON."""

import random

import pytest
import torch

from benchmarks.quality import lasting_languages as script

SMALL = ["--width", "16", "--layers", "2", "--base-steps", "2", "--base-batch", "2", "--steps", "2", "--batch", "2",
         "--curriculum", "1", "2", "--streams", "2", "--asked", "4", "--rates", "1", "2", "--passes", "1",
         "--tuned-rates", "1e-3", "--counts", "0", "3"]  # fmt: skip
WORDS = list(script.VOCABULARY)


def arguments(folder, stage):
    return script.arguments([stage, "--out", str(folder), "--json", str(folder / "found.json"), *SMALL])


def test_questions_are_of_other_sentences_in_the_languages_that_were_taught():
    text = script.Text(3, 2, 48)
    ids, answers = text.batch(random.Random(0), 2, 2, 2)
    assert ids.shape == answers.shape == (2, 5 * 48 + 1) and not answers[:, : 4 * 48].any() and answers.any()
    for row, told in zip(ids.tolist(), answers, strict=True):
        taught = [" ".join(WORDS[i] for i in row[at : at + 96]) for at in (0, 96)]
        lines = " ".join(WORDS[i] for i in row[4 * 48 :]).split("\n")
        sentences = [line.split(" . In")[0].strip() for line in lines if "English" in line]
        assert sentences and all(sum(s.split(" : ")[0] in part for part in taught) == 1 for s in sentences)
        assert not any(s in part for s in sentences for part in taught)
        assert {WORDS[row[i]] for i in range(len(row)) if told[i]} <= {"the", ".", *script.NOUNS, *script.VERBS}


def test_what_words_mean_differs_between_languages():
    text = script.Text(6, 3, 96)
    (one, two), said = text.languages(0, 2)
    assert len(said) == len(set(said)) == text.count == 90
    assert not {*one.lexicon.values()} & {*two.lexicon.values()}
    assert {*one.lexicon.values(), *two.lexicon.values()} <= {*script.STOCK}
    prompt, choices = text.translations(one, said[:8])[0]
    assert len({tuple(c) for c in choices}) == 4 and WORDS[prompt[-1]] == ":"


def test_words_come_first():
    args = script.arguments(["train", "--out", "x", "--alone-later", "0.5", "--curriculum", "1", "2"])
    batches = script.later_batches(script.text_of(args), args)
    english = [[int((ids == WORDS.index("English")).sum()) for ids in batches(share)[0]] for share in (0, 0.25, 0.99)]
    assert not any(english[0]) and 0 < sum(english[1]) < sum(english[2])


def test_every_reader_from_the_first_step_to_the_table(tmp_path, capsys):
    script.train_all(arguments(tmp_path, "train"))
    found = script.measure(arguments(tmp_path, "measure"))
    kinds = ["levels-0", "levels-3", "in context", "tuned-1"]
    names = [f"base {k}" for k in kinds] + [f"none {k}" for k in kinds] + ["exact levels-0", "exact levels-3"]
    assert list(found["results"]) == [f"languages-gated_delta-0 {name} lesson-2" for name in names]
    for name, own in found["results"].items():
        assert (own["before"] != own["after the first"] != own["after the second"]) is ("levels-0" not in name)
    capsys.readouterr()
    assert script.measure(arguments(tmp_path, "measure")) == found and capsys.readouterr().out == ""


def test_tuned_streams_do_not_share_weights(tmp_path):
    args = arguments(tmp_path, "train")
    args.orders = ["base"]
    script.train_all(args)
    reader = script.Tuned("base", 1, 1e-2, args)
    reader.read([list(range(10)), list(range(10, 20))])
    one, two = (dict(model.named_parameters()) for model in reader.models)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert reader.nats(0, [([0, 1], [[2]])])[0][0] != pytest.approx(reader.nats(1, [([0, 1], [[2]])])[0][0])
