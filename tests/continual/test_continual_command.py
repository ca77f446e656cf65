"""``nestlearn continual`` from a file to a page, and on from where it was stopped."""

import json

import pytest

from nestlearn.cli import main
from nestlearn.continual.benchmark import best_rate, read_results
from nestlearn.continual.report import spread
from tests.continual import small

METHODS = ["sequential", "levels-2", "levels-3", "joint"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continual")
    small.save(folder / "encoder")
    small.write(folder / "rows.jsonl", small.rows(each=10))
    return folder


def words(folder, *more, out="out"):
    return ["continual", str(folder / "rows.jsonl"), "--out", str(folder / out), "--encoder", str(folder / "encoder"),
            "--tasks", "3", "--seeds", "0", "1", "--methods", *METHODS, "--periods", "64", "--train", "4",
            "--rates", "1e-3", "1e-2", "--tune-tasks", "2", *more]  # fmt: skip


def test_stopped_and_gone_on_with_it_is_what_it_would_have_been(folder, capsys):
    assert main(words(folder, "--minutes", "0")) == 0
    assert len(read_results(folder / "out")) == 1 and "goes on" in capsys.readouterr().out
    with (folder / "out" / "results.jsonl").open("a") as file:
        file.write('{"part": "tu')  # killed while it wrote
    assert main(words(folder)) == 0
    printed = capsys.readouterr().out
    assert main(words(folder, out="whole")) == 0
    one, whole = (
        [{k: v for k, v in r.items() if k != "seconds"} for r in read_results(folder / out)] for out in ("out", "whole")
    )
    assert json.dumps(one) == json.dumps(whole) and len(one) == 3 * 2 + 4 * 2
    assert all(name in printed for name in METHODS) and "report.html" in printed
    page = (folder / "out" / "report.html").read_text()
    assert all(name in page for name in METHODS) and "<svg" in page and "http" not in page.replace("http://www.w3", "")


def test_the_rate_is_chosen_by_the_tuning_stream():
    def record(rate, accuracy, part="tune", method="a"):
        return {"part": part, "method": method, "rate": rate, "accuracies": [[accuracy]]}

    records = [
        record(1e-3, 0.5),
        record(3e-3, 0.7),
        record(1e-2, 0.7),
        record(1, 0.9, "test"),
        record(1, 0.9, method="b"),
    ]
    assert best_rate(records, "a") == 3e-3 and best_rate(records, "c") is None
    assert spread([0.2, 0.4]) == (pytest.approx(0.3), pytest.approx(0.1414, abs=1e-4))


def test_a_folder_of_another_plan_and_bad_input_are_refused(folder, capsys):
    assert main(words(folder, "--minutes", "0", out="plan")) == 0
    for more, message in (
        (["--epochs", "3"], "holds results for settings"),
        (["--trained", "9"], "holds results for settings"),
    ):
        assert main(words(folder, *more, out="plan")) == 2
        assert message in capsys.readouterr().err
    assert main(["continual", str(folder / "none.jsonl"), "--out", str(folder / "x")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main([*words(folder, out="y"), "--encoder", "nowhere"]) == 2
