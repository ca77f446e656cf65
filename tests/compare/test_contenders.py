"""All contenders are equally large, and are named as the user named them."""

from dataclasses import replace

import pytest

from nestlearn.compare.contenders import count, enter, known_names, split_labels, with_shape
from nestlearn.errors import UserError
from nestlearn.models.hf import HopeConfig, HopeForCausalLM
from nestlearn.models.hope import MIXER_NAMES
from nestlearn.train.config import TrainConfig

BASE = TrainConfig(name="base", model={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2})


@pytest.mark.parametrize("label", [*known_names(), "hope:memory.dgd=false,levels=[1]", 'hope:connection="nested"'])
def test_every_model_has_the_parameters_asked_for(label):
    contender = enter(label, BASE, 80_000, 256)
    model = HopeForCausalLM(HopeConfig(vocab_size=256, **contender.config.model))
    assert sum(p.numel() for p in model.parameters()) == contender.parameters
    assert abs(contender.parameters / 80_000 - 1) <= 0.02


def test_a_dearer_mixer_has_a_narrower_mlp():
    widths = [enter(label, BASE, 80_000, 256).width for label in ("transformer", "titans", "hope")]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 3


def test_names_stand_for_mixers_and_levels():
    base = replace(BASE, tokens=1024 * BASE.tokens_per_step)
    hope, attention, transformer, titans = (
        HopeConfig(**enter(label, base, 80_000, 256).config.model)
        for label in ("hope", "hope_attention", "transformer", "titans")
    )
    steps = [BASE.tokens_per_step * n for n in (1, 4, 16)]
    assert [level["period"] for level in hope.levels] == [level["period"] for level in attention.levels] == steps
    assert (hope.mixer, attention.mixer) == ("self_modifying", "attention")
    assert len(transformer.levels) == len(titans.levels) == 1
    assert titans.mixer == "titans" and set(MIXER_NAMES) - set(known_names()) == {"self_modifying", "attention"}


@pytest.mark.parametrize("steps, expected", [(5000, (1, 4, 16)), (300, (1, 4, 4)), (130, (1, 2, 2)), (10, (1, 1, 1))])
def test_in_short_runs_slow_levels_step_more_often(steps, expected):
    base = replace(BASE, tokens=steps * BASE.tokens_per_step)
    levels = HopeConfig(**enter("hope", base, 80_000, 256).config.model).levels
    assert [level["period"] / BASE.tokens_per_step for level in levels] == list(expected)


def test_settings_of_a_label_reach_its_model_alone():
    changed = enter('hope:memory.momentum=0.9,memory.adaptive=["k","v"],levels=[1]', BASE, 80_000, 256).config.model
    own = {"hidden_width": 8, "momentum": 0.9, "adaptive": ["k", "v"]}
    assert (changed["memory"], changed["levels"]) == (own, [1])
    assert enter("hope", BASE, 80_000, 256).config.model["memory"] == {"hidden_width": 8}
    assert enter("hope:memory.hidden_width=12", BASE, 80_000, 256).config.model["memory"] == {"hidden_width": 12}
    assert "memory" not in enter("titans", BASE, 80_000, 256).config.model


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (["hope,titans", "retnet"], ["hope", "titans", "retnet"]),
        (["hope:a=1,b=[2,3],titans"], ["hope:a=1,b=[2,3]", "titans"]),
        (["hope", 'hope:memory={"momentum": 0.9, "chunk": 8},levels=[1]'], None),
    ],
)
def test_commas_part_names_and_settings(words, labels):
    assert split_labels(words) == tuple(labels or words)


@pytest.mark.parametrize("params", [100_000, 1_000_000, 3_000_000])
def test_the_shape_leaves_room_for_every_mlp_and_is_the_widest(params):
    labels = ("hope", "transformer")
    base = with_shape(labels, TrainConfig(name="base"), params, 256)
    hidden = base.model["hidden_size"]
    assert all(enter(label, base, params, 256).width >= hidden // 4 for label in labels)
    wider = hidden + (64 if hidden >= 64 else 16)
    model = dict(with_shape(labels, TrainConfig(name="w", model={"hidden_size": wider}), params, 256).model)
    config = TrainConfig(name="w", model=model | {"mixer": "self_modifying", "levels": [1], "intermediate_size": wider})
    transformer = config.model["num_hidden_layers"] * 12 * wider**2
    assert count(config, 256) > params or transformer > params  # the one is too large, or the rule's own


def test_a_shape_that_is_given_stays():
    given = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "initializer_range": 0.02}
    assert with_shape(["hope"], TrainConfig(name="base", model=given), 10**6, 256).model == given


@pytest.mark.parametrize(
    ("label", "params", "message"),
    [
        ("hoppe", 80_000, "did you mean 'hope'?"),
        ("hope:memory.momentun=0.5", 80_000, "did you mean 'momentum'?"),
        ("hope:mixr=1", 80_000, "did you mean 'mixer'?"),
        ("hope:levels", 80_000, "has no '='"),
        ("hope:intermediate_size=8", 80_000, "intermediate_size is the same for all or solved"),
        ('hope:levels=[{"name":"a","period":1,"hidden_size":8}]', 80_000, "leave hidden_size out"),
        ("hope", 20_000, "at the least feed-forward width, more than --params 20,000"),
    ],
)
def test_what_cannot_enter(label, params, message):
    with pytest.raises(UserError) as error:
        enter(label, BASE, params, 256)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["hope,hope"], [""], ["hope", "titans,hope"]])
def test_labels_are_some_and_each_once(words):
    with pytest.raises(UserError, match="--models names"):
        split_labels(words)


def test_too_few_parameters_for_any_width():
    with pytest.raises(UserError, match="too few for hope even at width 16"):
        with_shape(["hope"], TrainConfig(name="base"), 5_000, 256)
