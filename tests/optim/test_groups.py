"""parameter_groups: every parameter in one group, with its period, learning-rate scale and decay."""

import math

import pytest
import torch
from torch import nn

from nestlearn.errors import UserError
from nestlearn.optim import Leveled, parameter_groups, parameter_table


class Memory(nn.Module):
    def __init__(self):
        super().__init__()
        self.initial = nn.ParameterDict({"k": nn.Parameter(torch.zeros(2, 3, 4))})
        self.rate_scale = nn.ParameterDict({"k": nn.Parameter(torch.ones(2))})
        self.rate_read = nn.Linear(3, 2)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.memory = Memory()
        self.slow = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5, bias=False)

    def get_output_embeddings(self):
        return self.head


class Model(Plain):
    def parameter_periods(self):
        return {name: 64 if name.startswith("slow") else 1 for name, _ in self.named_parameters()}

    def parameter_lr_scales(self):
        return {name: 0.5 if name.startswith("slow") else 1.0 for name, _ in self.named_parameters()}


def by_name(groups):
    return {name: group for group in groups for name in group["param_names"]}


def test_nothing_is_skipped_and_nothing_is_twice():
    model = Model()
    names = [name for group in parameter_groups(model, lr=1.0) for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_kinds_periods_scales_and_decay():
    table = by_name(parameter_groups(Model(), lr=0.1, weight_decay=0.2))
    kinds = {"embedding.weight": "embedding", "memory.initial.k": "state", "memory.rate_scale.k": "gate",
             "memory.rate_read.weight": "gate", "slow.weight": "matrix", "slow.bias": "vector",
             "norm.weight": "vector", "head.weight": "head"}  # fmt: skip
    assert {name: table[name]["kind"] for name in kinds} == kinds
    assert {name for name in table if table[name]["weight_decay"] == 0.2} == {"slow.weight", "head.weight"}
    assert table["slow.weight"]["period"] == 64 and table["norm.weight"]["period"] == 1
    assert table["slow.weight"]["lr"] == pytest.approx(0.05) and table["head.weight"]["lr"] == 0.1


def test_any_module_will_do_and_a_tied_head_is_an_embedding():
    model = Plain()
    model.head.weight = model.embedding.weight
    table = by_name(parameter_groups(model))
    assert table["embedding.weight"]["kind"] == "embedding" and "head.weight" not in table
    assert "lr" not in table["slow.weight"] and "weight_decay" not in table["slow.weight"]


def test_untrained_parameters_never_step():
    model = Model()
    model.slow.requires_grad_(False)
    table = by_name(parameter_groups(model, lr=0.1))
    assert table["slow.weight"]["period"] == math.inf
    assert Leveled(torch.optim.AdamW, parameter_groups(model, lr=0.1))


def test_a_forgotten_parameter_is_named():
    model = Model()
    model.parameter_periods = lambda: {"norm.weight": 1}  # pyright: ignore
    with pytest.raises(UserError, match=r"parameter_periods\(\) lacks 'embedding.weight'"):
        parameter_groups(model, lr=0.1)


def test_scales_need_a_rate():
    with pytest.raises(UserError, match="give lr="):
        parameter_groups(Model())


def test_the_table_counts_everything():
    model = Model()
    table = parameter_table(parameter_groups(model, lr=0.1))
    assert f"{sum(p.numel() for p in model.parameters()):,}" in table.splitlines()[-1]
    assert "64" in table and "memory.initial.k" in table
