"""parameter_groups: every parameter in one group, with its period, learning-rate scale and decay."""

import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from nestlearn import HopeConfig, HopeForCausalLM
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


def test_the_rule_of_each_kind():
    table = by_name(parameter_groups(Model(), lr=0.1))
    memory = {name for name in table if table[name]["rule"] == "memory"}
    assert memory == {"memory.initial.k", "slow.weight"}
    table = by_name(parameter_groups(Model(), lr=0.1, states="adamw"))
    assert table["memory.initial.k"]["rule"] == "adamw" and table["slow.weight"]["rule"] == "memory"
    assert {group["rule"] for group in table.values()} == {"memory", "adamw"}


def test_adamw_has_a_rate_of_its_own():
    model = Model()
    model.parameter_lr_scales = lambda: {name: 0.5 for name, _ in model.named_parameters()}  # pyright: ignore
    table = by_name(parameter_groups(model, lr=0.1, adamw_lr=0.02))
    assert table["slow.weight"]["lr"] == 0.05 and table["norm.weight"]["lr"] == 0.01


class Odd(nn.Module):
    """What is not a plain matrix, though it has two dimensions or more."""

    def __init__(self):
        super().__init__()
        self.position_embeddings = nn.Parameter(torch.zeros(1, 7, 4))
        self.image = nn.Conv2d(3, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.sound = nn.Conv1d(4, 4, 3)
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.LayerNorm((2, 4))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.experts = nn.Parameter(torch.zeros(5, 4, 4))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        self.classifier = nn.Linear(4, 2)


def test_the_kinds_of_odd_parameters():
    table = by_name(parameter_groups(Odd(), heads=["body.1"]))
    kinds = {"position_embeddings": "embedding", "image.weight": "matrix", "depthwise.weight": "filter",
             "sound.weight": "filter", "conv.weight": "matrix", "norm.weight": "vector", "experts": "matrix",
             "attention.in_proj_weight": "matrix", "attention.bias_k": "vector", "scale": "vector",
             "body.0.weight": "matrix", "body.1.weight": "head", "body.1.bias": "vector",
             "classifier.weight": "head"}  # fmt: skip
    assert {name: table[name]["kind"] for name in kinds} == kinds


@pytest.mark.parametrize("mixer", ["self_modifying", "attention", "gated_delta"])
def test_hope_sends_every_matrix_to_the_memory_and_nothing_else(mixer):
    settings = {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 32}
    model = HopeForCausalLM(HopeConfig(**settings, levels=[1, 64], mixer=mixer))
    table = by_name(parameter_groups(model))
    assert table.keys() == dict(model.named_parameters()).keys()
    memory = {name for name in table if table[name]["rule"] == "memory"}
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    expected = {n for n in table if n in linear or ".initial." in n} - {"lm_head.weight"}
    assert memory == {name for name in expected if "_read" not in name} and len(memory) >= 5
    if mixer != "attention":
        assert table["model.blocks.0.mixer.conv.weight"]["kind"] == "filter"


def test_hugging_face_models_of_others():
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=9)
    table = by_name(parameter_groups(GPT2LMHeadModel(config)))
    assert table["transformer.wte.weight"]["kind"] == table["transformer.wpe.weight"]["kind"] == "embedding"
    assert table["transformer.h.0.mlp.c_fc.weight"]["rule"] == "memory" and "lm_head.weight" not in table
    table = by_name(parameter_groups(GPT2ForSequenceClassification(config)))
    assert table["score.weight"]["kind"] == "head" and table["score.weight"]["rule"] == "adamw"


@pytest.mark.parametrize("bad", [{"states": "admw"}, {"heads": ["body.2"]}])
def test_bad_arguments_name_the_nearest(bad):
    with pytest.raises(UserError, match=r"'(admw|body.2)'.*did you mean '(adamw|body.[01])'"):
        parameter_groups(Odd(), **bad)


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
    rule = {line.split()[1]: line.split()[2] for line in table.splitlines()[1:-1]}
    assert rule["state"] == "memory" and rule["vector"] == "adamw"
