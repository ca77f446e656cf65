"""The table of equations tells the truth: every path in it exists, every rule is in it, every row has a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLE = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
ROWS = [line for line in TABLE.splitlines() if line.startswith("| NL") and "`src/" in line]
PATHS = sorted(set(re.findall(r"`((?:src|tests|docs)/[^`]+)`", TABLE)))


@pytest.mark.parametrize("path", PATHS)
def test_every_path_exists(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_row_names_a_source_and_a_test(row):
    _, _, _, source, test, _ = row.split("|")
    assert re.search(r"`src/[^`]+\.(py|h)`", source)
    assert re.search(r"`tests/(\w+/)*test_\w+\.py`", test)


def test_every_rule_is_in_the_table():
    rules = (p for p in (ROOT / "src" / "nestlearn" / "rules").glob("*.py") if p.name != "__init__.py")
    assert not {f"src/nestlearn/rules/{p.name}" for p in rules} - set(PATHS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_the_cited_equations_stand_in_the_source(row):
    """A reader who opens the file finds the number that the table sent them for, alone or inside a range."""
    cited = numbers(row.split("|")[1])
    for path in re.findall(r"`(src/[^`]+\.(?:py|h))`", row):
        assert cited & numbers((ROOT / path).read_text(encoding="utf-8")), path


def numbers(text: str) -> set[int | str]:
    """All equation numbers after "NL Eq.", ranges filled in, and all sections after "NL §"."""
    found: set[int | str] = set(re.findall(r"NL §(\d+(?:\.\d+)?)", text))
    for listed in re.findall(r"NL Eq\. ([\d–, -]+)", text):
        for part in re.findall(r"\d+(?:–\d+)?", listed):
            first, _, last = part.partition("–")
            found |= set(range(int(first), int(last or first) + 1))
    return found
