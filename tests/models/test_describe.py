"""The table of levels and the trace of a passage say what the model really is and does."""

import math

import pytest
import torch
from torch.nn import functional as F

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.errors import UserError
from tests.contracts.model import gap, initialised, large, tokens
from tests.models.test_contract import SMALL, VARIANTS


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_counts_every_parameter_once(name, tied):
    model = HopeForCausalLM(HopeConfig(**{**SMALL, **VARIANTS[name], "tie_word_embeddings": tied}))
    rows = model.level_table()
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert all(row.parameters >= 0 and row.objective and row.context and row.rule for row in rows)
    assert len({row.component for row in rows}) == len(rows)
    periods = [row.period for row in rows if row.component.startswith("CMS")]
    assert periods == sorted(periods) == [64, 512]


def test_the_table_names_the_memories_and_their_periods():
    memory = {"chunk": 16, "memory_chunk": 4, "adaptive": ("k", "eta"), "momentum": 0.5}
    rows = {r.component: r for r in HopeForCausalLM(HopeConfig(**{**SMALL, "memory": memory})).level_table()}
    assert rows["memory"].period == 1 and rows["M_k"].period == rows["M_eta"].period == 16
    assert rows["M_v"].period == rows["M_alpha"].period == math.inf and rows["M_v"].rule == "static"
    assert rows["memory"].rule == "DGD, momentum 0.5" and "⟨M(k), v̂⟩" in rows["memory"].objective


def test_periods_and_learning_rates_reach_the_right_parameters():
    levels = [("fast", 8, None, 0.5), ("slow", math.inf)]
    model = HopeForCausalLM(HopeConfig(**{**SMALL, "levels": levels}))
    periods, scales = model.parameter_periods(), model.parameter_lr_scales()
    assert periods.keys() == scales.keys() == dict(model.named_parameters()).keys()
    for name, period in periods.items():
        expected = 8 if ".fast." in name else math.inf if ".slow." in name else 1
        assert period == expected and scales[name] == (0.5 if ".fast." in name else 1.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_trace_agrees_with_the_forward_pass(name):
    config = HopeConfig(**{**SMALL, **VARIANTS[name]})
    model, ids = large(config).float(), tokens(config, 1, 45)
    trace = model.trace(ids)
    logits = model(ids).logits.detach()
    assert gap(trace.loss, F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")) <= 1e-3
    slow = config.shape().memory.written if config.mixer == "self_modifying" else ()
    assert len(trace.signals) == 2 * (len(slow) + 2)
    for signal in trace.signals:
        series = [s for s in signal[2:] if s is not None]
        assert all(s.shape == (45,) and s.dtype == torch.float32 and s.isfinite().all() for s in series)
        assert len(series) == (1 if " / CMS " in signal.component else 4)
        if signal.retain is not None:
            assert ((signal.retain > 0) & (signal.retain <= 1)).all() and (signal.rate >= 0).all()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("connection", ["sequential", "independent"])
def test_the_surprise_of_a_level_is_the_gradient_at_its_output(connection):
    """By finite differences: the summed loss moves by ⟨surprise vector, nudge⟩ when a block's output is nudged."""
    config = HopeConfig(**{**SMALL, "connection": connection, "memory": {"chunk": 8}})
    model, ids, at, step = large(config), tokens(config, 1, 20), 6, 1e-5
    block = model.model.layers[0].cms.blocks["every-64"]
    gradient = torch.zeros(32, dtype=torch.float64)
    for channel in range(32):
        summed = []
        for sign in (1, -1):
            nudge = torch.zeros(1, 20, 32, dtype=torch.float64)
            nudge[0, at, channel] = sign * step
            hook = block.register_forward_hook(lambda module, given, output, nudge=nudge: output + nudge)
            with torch.no_grad():
                summed.append(F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
            hook.remove()
        gradient[channel] = (summed[0] - summed[1]) / (2 * step)
    signal = next(s for s in model.trace(ids).signals if s.component == "layer 0 / CMS every-64")
    assert gap(signal.surprise[at].double(), gradient.norm()) <= 1e-5 * gradient.norm()


def test_the_trace_wants_one_passage():
    model = initialised(HopeConfig(**SMALL))
    for shape in ((2, 10), (1, 1)):
        with pytest.raises(UserError, match=r"must be \(1, T\)"):
            model.trace(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("connection", ["sequential", "nested", "independent"])
def test_the_levels_together_have_the_parameters_of_one_mlp(connection):
    model = HopeForCausalLM(HopeConfig(**{**SMALL, "connection": connection}))
    levels = [row.parameters for row in model.level_table() if row.component.startswith("CMS")]
    assert sum(levels) == 2 * 3 * SMALL["hidden_size"] * SMALL["intermediate_size"]
