"""Every preset builds, and has as many parameters as its name says."""

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.recipes import NAMES, load_recipe
from nestlearn.train.build import build_model, vocabulary


@pytest.mark.parametrize("name", NAMES)
def test_builds_on_the_meta_device(name):
    config = load_recipe(name)
    assert config.name == name
    with torch.device("meta"):
        model = build_model(config, vocabulary(config))
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name, size", [("hope-340m", 340e6), ("hope-760m", 760e6), ("hope-1.3b", 1.3e9)])
def test_within_3_percent_of_the_name(name, size):
    config = load_recipe(name)
    with torch.device("meta"):
        model = build_model(config, vocabulary(config))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(size, rel=0.03)
    assert vocabulary(config) == 32_000


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match="unknown preset 'hope-340'.*did you mean 'hope-340m'"):
        load_recipe("hope-340")
