"""TrainConfig: every number checked, unknown keys answered with the nearest, JSON there and back."""

import dataclasses
import json
import math
import shlex

import pytest

from nestlearn.errors import UserError
from nestlearn.train.config import TrainConfig, parse_count, parse_value

CONFIG = TrainConfig("test", model={"memory": {"chunk": 8}})


@pytest.mark.parametrize(
    "override, message",
    [
        ("lerning_rate=1", "unknown key 'lerning_rate' (did you mean 'learning_rate'?)"),
        ("learning_rate", "--set 'learning_rate' has no '='"),
        ("learning_rate=0", "learning_rate is 0: must be a number above 0 and at most 10 (per step, at its peak)"),
        ("learning_rate=nan", "learning_rate is nan: must be"),
        ("learning_rate=fast", "learning_rate is 'fast': must be"),
        ("batch_size=1.5", "batch_size is 1.5: must be a whole number of at least 1 (sequences per step)"),
        ("batch_size=true", "batch_size is True: must be"),
        ("tokens=-3", "tokens is -3: must be"),
        ("warmup=2", "warmup is 2: must be a number of at least 0 and at most 1"),
        ("beta1=1", "beta1 is 1: must be"),
        ("name.x=1", "'name' is 'test', it has no keys of its own"),
        ("model=3", "model is 3: must be a dictionary"),
        ("compare_rate_zero=maybe", "compare_rate_zero is 'maybe': must be true or false"),
    ],
)
def test_bad_values_are_named_with_rule_and_fix(override, message):
    with pytest.raises(UserError) as refusal:
        CONFIG.replace([override])
    assert message in str(refusal.value)


def test_every_number_has_a_unit_and_a_range():
    for f in dataclasses.fields(TrainConfig):
        if f.type in ("int", "float"):
            assert f.metadata["unit"] and f.metadata["low"] < f.metadata["high"]


def test_overrides_reach_into_the_model_and_leave_the_original_alone():
    changed = CONFIG.replace(["model.memory.rate_max=0.5", "model.levels=[1, 64]", "tokens=20k", "clip_norm=inf"])
    assert changed.model == {"memory": {"chunk": 8, "rate_max": 0.5}, "levels": [1, 64]}
    assert changed.tokens == 20_000 and changed.clip_norm == math.inf
    assert CONFIG.model == {"memory": {"chunk": 8}}


def test_json_there_and_back():
    config = CONFIG.replace(["clip_norm=inf", "learning_rate=1e-4", 'text=["a", "b"]'])
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


def test_the_command_makes_the_same_config():
    config = CONFIG.replace(["learning_rate=1e-4", 'text=["a b", "c"]', "clip_norm=inf", "tokens=12345"])
    words = shlex.split(config.command())
    settings = words[words.index("--set") + 1 :]
    assert words[:7] == ["nestlearn", "train", "--preset", "test", "--text", "a b", "c"]
    assert TrainConfig("test", text=("a b", "c")).replace(settings) == config


@pytest.mark.parametrize(
    "text, count",
    [("20k", 20_000), ("5M", 5_000_000), ("1.5G", 1_500_000_000), ("4096", 4096), ("2e6", 2_000_000)],
)
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "many", "0", "-5", "1.5", "k", "5 apples", "nan"])
def test_bad_counts(text):
    with pytest.raises(UserError, match="is not a number of tokens: write for example 4096, 20k or 5M"):
        parse_count(text)


def test_values():
    assert [parse_value(v) for v in ("1e-3", "[1, 2]", "true", "None", "a/b", "'x'")] == [
        1e-3,
        [1, 2],
        True,
        None,
        "a/b",
        "x",
    ]
