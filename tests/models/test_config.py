"""A configuration that cannot be built is refused when it is made, with one line that names value, rule and fix."""

import json

import pytest
import torch

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.errors import UserError
from nestlearn.models.hope import MIXER_NAMES
from nestlearn.models.mamba2 import Mamba2Layer
from nestlearn.models.window_attention import WindowAttention

WRONG = [
    ({"hidden_size": 30}, "hidden_size is 30 and num_attention_heads 4"),
    ({"vocab_size": -1}, "vocab_size is -1"),
    ({"vocab_size": "many"}, "vocab_size is 'many'"),
    ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ({"mixer": "self_modifing"}, "did you mean 'self_modifying'"),
    ({"mixer": ["attention"]}, "mixer is"),
    ({"connection": "sequentially"}, "did you mean 'sequential'"),
    ({"mixer": "attention", "hidden_size": 12}, "must be even"),
    ({"hiden_size": 64}, "did you mean 'hidden_size'"),
    ({"memory": "big"}, "memory is 'big'"),
    ({"memory": {"momentun": 0.9}}, "did you mean 'momentum'"),
    ({"memory": {"heads": 3}}, "unknown key 'heads'"),
    ({"memory": {"chunk": 10, "memory_chunk": 4}}, "chunk must be a multiple of memory_chunk"),
    ({"memory": {"chunk": 2.5}}, "is 2.5"),
    ({"memory": {"momentum": "much"}}, "momentum is 'much', must be a number"),
    ({"memory": {"objective": "l3"}}, "objective is 'l3'"),
    ({"mixer": "samba", "num_hidden_layers": 1}, "must be at least 2 with mixer 'samba'"),
    ({"mixer": "sambo"}, "did you mean 'samba'"),
    ({"levels": []}, "levels is empty"),
    ({"levels": "4096"}, "levels is '4096'"),
    ({"levels": 4096}, "levels is 4096"),
    ({"levels": ["often"]}, "period is 'often'"),
    ({"levels": [0]}, "period is 0"),
    ({"levels": [64, 8]}, "order them from the fastest"),
    ({"levels": [{"name": "a"}]}, "no period"),
    ({"levels": [{"period": 4, "hiden_size": 8}]}, "did you mean 'hidden_size'"),
    ({"levels": [("a.b", 4)]}, "without dots"),
    ({"levels": [("a", 4), ("a", 8)]}, "unique"),
    ({"levels": [{"name": "a", "period": 4, "hidden_size": 7}]}, "must be the sum over the levels"),
    ({"levels": [{"name": "a", "period": 4, "hidden_size": 384}, 8]}, "at least 1 for each"),
    ({"levels": [1, 2], "connection": "nested", "intermediate_size": 33}, "must be equal"),
]


@pytest.mark.parametrize("given, message", WRONG)
def test_a_wrong_value_is_one_line(given, message):
    with pytest.raises(UserError, match=message) as caught:
        HopeConfig(**given)
    assert "\n" not in str(caught.value)


def test_the_defaults_make_a_model_without_touching_memory():
    with torch.device("meta"):
        model = HopeForCausalLM(HopeConfig(hidden_size=4096, num_attention_heads=32, vocab_size=500_000))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_levels_default_to_hopes_continuum_or_to_one_mlp(mixer, tmp_path):
    """Saved in full; levels that are given are kept, also those that another mixer has by default."""
    own = [4096, 16384, 65536] if mixer in ("self_modifying", "attention") else [1]
    for given, expected in ((None, own), ([4096, 16384, 65536], [4096, 16384, 65536]), ([1], [1]), ([8, 64], [8, 64])):
        config = HopeConfig(mixer=mixer, levels=given)
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        for levels in (config.levels, saved["levels"], HopeConfig.from_pretrained(tmp_path).levels):
            assert [level["period"] for level in levels] == expected
        assert saved["mixer"] == mixer


@pytest.mark.parametrize(
    "said, saved",
    [
        ("hope", "self_modifying"), ("hope-attention", "attention"), ("hope_attention", "attention"),
        ("ttt-mlp", "ttt_mlp"), ("titans-mac", "titans_mac"), ("transformer", "transformer"),
    ],
)  # fmt: skip
def test_other_spellings_of_a_mixer_are_saved_as_one(said, saved):
    assert HopeConfig(mixer=said).to_dict() == HopeConfig(mixer=saved).to_dict()
    assert HopeConfig(mixer=said).mixer == saved


def test_the_layers_of_samba_take_turns():
    model = HopeForCausalLM(HopeConfig(mixer="samba", num_hidden_layers=5))
    kinds = [type(block.mixer) for block in model.model.layers]
    assert kinds == [Mamba2Layer, WindowAttention, Mamba2Layer, WindowAttention, Mamba2Layer]
