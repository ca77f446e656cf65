"""A run with each optimizer: it learns, resumes bit for bit, and the table of levels names what it remembers."""

import math

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.optim import DMGD, M3, DeltaMomentum
from nestlearn.optim.by_rule import ByRule
from nestlearn.train import config as config_module
from nestlearn.train.build import build_model, build_optimizer
from nestlearn.train.checkpoint import find_checkpoint
from nestlearn.train.optimizers import OPTIMIZERS
from nestlearn.train.step import set_learning_rate
from nestlearn.train.tables import level_table
from tests.train.tiny import STEP, config, metrics, run

CLASSES = {"adamw": torch.optim.AdamW, "muon": ByRule, "m3": M3, "delta_momentum": DeltaMomentum, "dmgd": DMGD}


def test_every_optimizer_of_the_config_is_there():
    assert tuple(OPTIMIZERS) == config_module.OPTIMIZERS == tuple(CLASSES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learns_and_resumes_bit_for_bit(name, tmp_path):
    settings = config(tmp_path, optimizer=name)
    run(settings, tmp_path / "whole")
    whole = find_checkpoint(tmp_path / "whole")
    lines = metrics(tmp_path / "whole")
    assert lines[-1]["loss_bits_per_byte"] < lines[0]["loss_bits_per_byte"]
    run(settings, tmp_path / "whole", tmp_path / "whole" / f"checkpoint-{8 * STEP:08d}")
    weights = (whole / "model.safetensors").read_bytes()
    assert (find_checkpoint(tmp_path / "whole") / "model.safetensors").read_bytes() == weights
    assert metrics(tmp_path / "whole") == lines


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_config_reaches_the_optimizer(name, tmp_path):
    settings = config(tmp_path, optimizer=name, beta2=0.9, adamw_scale=0.5, learning_rate=0.01)
    model = build_model(settings, 256)
    optimizer = build_optimizer(settings, model)
    assert type(optimizer.inner) is CLASSES[name]
    set_learning_rate(optimizer, 0.02)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.02 * (0.5 if group["rule"] == "adamw" else 1)
        if group["rule"] == "adamw":
            assert group["betas" if name in ("adamw", "muon") else "betas_adamw"] == (0.9, 0.9)


def test_the_settings_reach_the_optimizer_and_a_wrong_one_is_named(tmp_path):
    settings = config(tmp_path, optimizer="m3", optimizer_settings={"slow_period": 7})
    optimizer = build_optimizer(settings, build_model(settings, 256))
    assert {group["slow_period"] for group in optimizer.param_groups} == {7}
    settings = config(tmp_path, optimizer="m3", optimizer_settings={"slow_periot": 7})
    with pytest.raises(UserError, match=r"'optimizer_settings.slow_periot' \(did you mean 'slow_period'\?\)"):
        build_optimizer(settings, build_model(settings, 256))
    with pytest.raises(UserError, match=r"optimizer is 'adam': must be one of .*did you mean 'adamw'"):
        config(tmp_path, optimizer="adam")


def rows(settings):
    with torch.device("meta"):
        model = build_model(settings, 256)
    return {(row.component, row.period): row.parameters for row in level_table(model, settings)}


def test_the_table_of_levels_names_the_optimizer_and_counts_each_parameter_once(tmp_path):
    settings = config(tmp_path, optimizer="m3", optimizer_settings={"slow_period": 4})
    table, model = rows(settings), build_model(settings, 256)
    total = sum(p.numel() for p in model.parameters())
    first = ("AdamW / first moment", "M3 / fast momentum")
    assert sum(count for (name, _), count in table.items() if name in first) == total
    for period in (STEP, 3 * STEP, 5 * STEP):
        assert table["M3 / slow momentum", 4 * period] == table["M3 / fast momentum", period] > 0
    in_tokens = {"slow_period": 4 * STEP, "slow_period_unit": "tokens"}
    table = rows(config(tmp_path, optimizer="m3", optimizer_settings=in_tokens))
    assert {period for name, period in table if name == "M3 / slow momentum"} == {4 * STEP, 5 * STEP}


def test_by_default_the_table_has_adamw_and_nothing_else(tmp_path):
    table = rows(config(tmp_path))
    names = {name.partition(" / ")[0] for name, period in table if " / " in name and period < math.inf}
    assert names == {"AdamW"}
