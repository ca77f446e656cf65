"""Two commits are compared in turns, and a part whose tests fail has no speed."""

from pathlib import Path

import pytest

from benchmarks.speed import compare_commits
from benchmarks.speed.compare_commits import TESTS, compare, measurements, passing

ROOT = Path(__file__).resolve().parents[2]
TREES = [Path("first"), Path("second")]


def test_every_part_is_measured_and_has_tests():
    assert list(measurements()) == list(TESTS)
    for name, files in TESTS.items():
        assert any((ROOT / file).exists() for file in files), name


def test_commits_take_turns_and_ratios_are_of_medians(monkeypatch):
    turns, seconds = [], {"first": iter([3.0, 9.0, 4.0]), "second": iter([2.0, 1.0, 2.0])}
    monkeypatch.setattr(compare_commits, "passing", lambda tree, wanted: dict.fromkeys(wanted))

    def turn(tree, wanted):
        turns.append(tree.name)
        return {name: next(seconds[tree.name]) for name in wanted}

    monkeypatch.setattr(compare_commits, "turn", turn)
    (row,) = compare(TREES, ["op: Newton–Schulz"], 3)
    assert turns == ["first", "second"] * 3
    assert row["first ms"] == 4000 and row["second ms"] == 2000 and row["ratio"] == 2


def test_a_part_whose_tests_fail_in_either_commit_is_refused(monkeypatch):
    monkeypatch.setattr(compare_commits, "_passes", lambda tree, path: tree.name == "first" or "m3" not in path)
    trees = [Path("first"), Path("second")]
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert passing(trees[1], ["optimizer: M3"]) == {"optimizer: M3": "tests/optim/test_m3.py"}
    monkeypatch.setattr(compare_commits, "turn", lambda tree, wanted: dict.fromkeys(wanted, 1.0))
    rows = {row["part"]: row for row in compare(trees, ["optimizer: M3", "op: Newton–Schulz"], 1)}
    assert rows["optimizer: M3"] == {"part": "optimizer: M3", "refused": "tests/optim/test_m3.py fails"}
    assert rows["op: Newton–Schulz"]["ratio"] == 1


def test_a_failing_test_file_is_seen(tmp_path):
    (tmp_path / "test_wrong.py").write_text("def test_wrong():\n    assert False\n")
    (tmp_path / "test_right.py").write_text("def test_right():\n    pass\n")
    assert not compare_commits._passes(tmp_path, "test_wrong.py")
    assert compare_commits._passes(tmp_path, "test_right.py")


@pytest.mark.slow
def test_a_turn_measures_what_it_is_asked():
    found = compare_commits.turn(ROOT, ["op: Newton–Schulz", "decode: HOPE, one token"])
    assert set(found) == {"op: Newton–Schulz", "decode: HOPE, one token"} and min(found.values()) > 0
