"""save_pretrained and from_pretrained: every weight comes back, nothing is left as memory happened to be."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.errors import UserError
from tests.contracts.model import initialised, tokens
from tests.models.test_contract import SMALL

MIXED = (
    {"mixer": "gated_deltanet"},
    {"mixer": "ttt_mlp"},
    {"mixer": "titans_mag"},
    {"mixer": "attention", "connection": "independent"},
    {"memory": {"chunk": 8, "objective": "mix", "mix_start": [0.2, 0.9]}},
)
SHAPES = [{"tie_word_embeddings": tied, **shape} for tied in (True, False) for shape in ({}, *MIXED)]


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def changed(**shape):
    """A model none of whose weights is as initialised."""
    model = initialised(HopeConfig(**{**SMALL, "memory": {"chunk": 8}, **shape}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def same(model, other):
    assert dict(model.named_parameters()).keys() == dict(other.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
    assert not list(other.named_buffers()), "a buffer needs a test of its own"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_comes_back(shape, tmp_path, poisoned):
    model = changed(**shape)
    model.save_pretrained(tmp_path)
    loaded, info = HopeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    same(model, loaded)
    ids = tokens(model.config, 2, 40)
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    tied = shape["tie_word_embeddings"]
    assert (loaded.lm_head.weight is loaded.embedding.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)


@pytest.mark.parametrize("shape", SHAPES[:5])
def test_a_missing_weight_is_initialised_and_no_other_is_touched(shape, tmp_path, poisoned):
    model = changed(**shape)
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    for missing in whole:
        rest = {name: tensor for name, tensor in whole.items() if name != missing}
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded = HopeForCausalLM.from_pretrained(tmp_path)
        for name, parameter in loaded.named_parameters():
            if name == missing:
                assert parameter.isfinite().all() and not torch.equal(parameter, whole[name]), name
            else:
                assert torch.equal(parameter, whole[name]), (missing, name)


def test_in_bfloat16(tmp_path, poisoned):
    model = changed()
    model.save_pretrained(tmp_path)
    half = HopeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    same(model.to(torch.bfloat16), half)
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    ids = tokens(model.config, 2, 40)
    assert again.dtype == torch.bfloat16 and torch.equal(half(ids).logits, again(ids).logits)


def test_the_auto_classes_know_it(tmp_path):
    model = changed()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is HopeConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is HopeForCausalLM
    assert type(AutoModelForCausalLM.from_config(model.config)) is HopeForCausalLM


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_the_configuration_round_trips_through_strict_json(tmp_path):
    config = HopeConfig(**{**SMALL, "levels": [8, ("slow", 64), float("inf")], "memory": {"adaptive": ("k", "v")}})
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text, parse_constant=refuse)["levels"][-1]["period"] == "inf"
    loaded = HopeConfig.from_pretrained(tmp_path)
    assert loaded.shape() == config.shape() and loaded.to_dict() == {**config.to_dict(), **new(loaded)}
    assert loaded.shape().levels[-1].period == float("inf")


def new(config):
    """What Hugging Face writes down when it saves."""
    return {key: config.to_dict()[key] for key in ("transformers_version", "_name_or_path") if key in config.to_dict()}


def test_a_checkpoint_does_not_depend_on_the_readers_defaults(tmp_path, monkeypatch):
    config = HopeConfig(**SMALL)
    config.save_pretrained(tmp_path)
    monkeypatch.setattr("nestlearn.models.config.HOPE_MEMORY", {"chunk": 2, "momentum": 0.123})
    assert HopeConfig.from_pretrained(tmp_path).shape() == config.shape()


def test_a_bad_file_is_one_clear_error(tmp_path):
    HopeConfig(**SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 5'))
    with pytest.raises(UserError, match="divisible"):
        HopeConfig.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="divisible"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
