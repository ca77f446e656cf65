"""What holds the house together: public names, import floors, small files, a cited source for every rule."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import nestlearn

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src" / "nestlearn").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
RULES = [path for path in SOURCES if path.parent.name == "rules" and path.name != "__init__.py"]

PUBLIC = [
    "HopeConfig",
    "HopeForCausalLM",
    "Level",
    "MetaLearner",
    "OnlineLearner",
    "OnlineLevel",
    "OnlineState",
    "RolledBack",
    "__version__",
    "consolidate",
    "load_stacked",
    "online_levels",
    "stack_levels",
    "stacked_levels",
    "unstack",
]


def relative(path):
    return path.relative_to(ROOT).as_posix()


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_public_names():
    assert nestlearn.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(nestlearn))
    assert all(getattr(nestlearn, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'Hope'"):
        _ = nestlearn.Hope


def test_importing_the_library_is_cheap():
    heavy = "{name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'tyro', 'rich', 'pydantic'}"
    result = python(f"import sys, nestlearn; nestlearn.Level('fast', 1); print({heavy} or 'cheap')")
    assert result.stdout.strip() == "cheap", result.stdout + result.stderr


def test_version_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == nestlearn.__version__


def test_imports_point_down():
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", RULES, ids=relative)
def test_a_rule_cites_its_source(path):
    assert re.search(r"NL (Eq|§|App|Alg)|arXiv", path.read_text()), "name the equation or the paper that it comes from"


@pytest.mark.parametrize("path", [path for path in TESTS if path.parent.name == "oracles"], ids=relative)
def test_an_oracle_imports_nothing_of_ours(path):
    if not path.name.startswith("test_"):
        assert not re.search(r"^\s*(from|import) nestlearn", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=relative)
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= 400, "is this one room?"


def test_there_are_rules_and_oracles():
    assert len(RULES) >= 5 and any(path.parent.name == "oracles" for path in TESTS)
