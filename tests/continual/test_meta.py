"""Meta-learning: both orders against everything unrolled, and the laws that hold without an oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestlearn import MetaLearner, OnlineLearner, OnlineLevel, online_levels
from nestlearn.errors import UserError
from tests.continual.models import MLPS, VOCABULARY, gpt2, hope, levels, text
from tests.oracles import meta as oracle


def window():
    return hope(mixer="window_attention", window=6)


def lean_hope():
    return hope(memory={"chunk": 4, "recompute": False})


MODELS = {"gpt2": gpt2, "window": window, "hope": lean_hope}
SETTINGS = {
    "plain": {},
    "clip, bound and retention": {"clip": 0.05, "bound": 0.004, "retention": 0.9},
    "momentum": {"rule": "momentum", "decay": 0.6, "bound": math.inf, "lr": 0.2},
}


def made(kind, **settings):
    """A model in float64 and its levels."""
    model = MODELS[kind]().double()
    own = levels(kind, **settings) if kind == "gpt2" else list(online_levels(model, **{"lr": 0.5, **settings}))
    return model, own


def gradients(model):
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def close(ours, theirs, tolerance=1e-8):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).abs().max() <= tolerance, name


CONNECTED = [("sequential", kind, settings) for kind in MODELS for settings in SETTINGS]
CONNECTED += [("nested", "gpt2", "clip, bound and retention"), ("nested", "hope", "momentum")]


@pytest.mark.parametrize("order", ["first", "exact"])
@pytest.mark.parametrize("connection, kind, settings", CONNECTED)
def test_equals_everything_unrolled(connection, kind, settings, order):
    model, own = made(kind, **SETTINGS[settings])
    learner, tokens = MetaLearner(model, own, order=order, connection=connection), text(2, 19)
    learner.backward(tokens)
    told = [
        {"period": int(level.period), "names": [f"{w}.weight" for w in level.weights], "rule": level.rule,
         "decay": level.decay, "clip": level.clip, "retention": level.retention, "bound": level.bound}
        for level in own
    ]  # fmt: skip
    how = {"constant": order == "first", "functional": kind != "hope", "nested": connection == "nested"}
    with sdpa_kernel(SDPBackend.MATH):
        expected, rates = oracle.gradient(model, learner.log_rates, tokens, told, **how)
    close(gradients(model), expected)
    assert (learner.log_rates.grad - rates).abs().max() <= 1e-8
    assert rates.abs().max() > 1e-8


@pytest.mark.parametrize("connection", ["sequential", "nested"])
@pytest.mark.parametrize("order", ["first", "exact"])
@pytest.mark.parametrize("kind", MODELS)
def test_reads_as_the_online_learner_does(kind, order, connection):
    model, own = made(kind, spike=math.inf)
    learner, tokens = MetaLearner(model, own, order=order, connection=connection), text(3, 19)
    losses = learner.backward(tokens)
    read = OnlineLearner(model, learner.levels, connection=connection).read(tokens)
    assert torch.allclose(losses.float(), read[:, 1:], atol=2e-6)


@pytest.mark.parametrize("order", ["first", "exact"])
@pytest.mark.parametrize("absent", [{"lr": 0.0}, {"period": math.inf}])
@pytest.mark.parametrize("kind", MODELS)
def test_without_levels_it_is_the_ordinary_gradient(kind, absent, order):
    model, own = made(kind)
    tokens = text(2, 19)
    MetaLearner(model, [replace(level, **absent) for level in own], order=order).backward(tokens)
    ours = gradients(model)
    model.zero_grad()
    logits = model(input_ids=tokens[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    close(ours, gradients(model), 1e-12)


@pytest.mark.parametrize("kind", MODELS)
def test_exact_at_rate_zero_is_the_ordinary_gradient_through_all_pieces(kind):
    model, own = made(kind)
    tokens = text(2, 19)
    MetaLearner(model, own, order="exact").backward(tokens, rate_scale=0.0)
    ours = gradients(model)
    model.zero_grad()
    logits = model(input_ids=tokens[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    close(ours, gradients(model), 1e-12)


@pytest.mark.parametrize("order", ["first", "exact"])
@pytest.mark.parametrize("kind", MODELS)
def test_rows_do_not_leak(kind, order):
    model, own = made(kind)
    tokens, other = text(3, 19), text(3, 19, seed=1)
    other[1] = tokens[1]
    learner = MetaLearner(model, own, order=order)
    assert torch.equal(learner.backward(tokens)[1], learner.backward(other)[1])
    model.zero_grad()
    learner.log_rates.grad = None
    learner.backward(tokens)
    together, rates = gradients(model), learner.log_rates.grad
    model.zero_grad()
    learner.log_rates.grad = None
    for row in tokens:
        learner.backward(row[None])
    close(together, {name: g / 3 for name, g in gradients(model).items()}, 1e-12)
    assert torch.allclose(rates, learner.log_rates.grad / 3, atol=1e-12)


@pytest.mark.parametrize("rule", ["delta_momentum", "m3"])
def test_the_learned_rate_of_the_other_rules(rule):
    """∂L/∂λ in the first order, against a finite difference of the loss with the gradients held as they are."""
    model, own = made("window", rule=rule, bound=math.inf, lr=1e-3)
    own = own[:1]
    learner, tokens = MetaLearner(model, own, order="first"), text(2, 8)  # one change that is read with
    learner.backward(tokens)
    step, losses = 1e-4, []
    for sign in (1, -1):
        moved = replace(own[0], lr=own[0].lr * math.exp(sign * step))
        losses.append(MetaLearner(model, [moved], order="first").backward(tokens).mean())
    expected = (losses[0] - losses[1]) / (2 * step)
    assert float(expected) != 0
    assert torch.allclose(learner.log_rates.grad[0], expected, rtol=1e-4, atol=0)


def test_a_context_that_is_emptied():
    model, own = made("window", spike=math.inf)
    learner = MetaLearner(model, own, order="exact", context=6)
    losses = learner.backward(text(2, 19))
    read = OnlineLearner(model, own, context=6).read(text(2, 19))
    assert torch.allclose(losses.float(), read[:, 1:], atol=2e-6)


def test_clear_errors():
    model, own = made("window")
    with pytest.raises(UserError, match=r"order is 'second', must be one of \['first', 'exact'\]"):
        MetaLearner(model, own, order="second")
    with pytest.raises(UserError, match=r"periods are \[4, 8, 16\], but a sequence has 4 tokens"):
        MetaLearner(model, own).backward(text(2, 4))
    with pytest.raises(UserError, match="period is 0.5"):
        OnlineLevel("fast", 0.5, own[0].weights)
    with pytest.raises(UserError, match="order them from the fastest"):
        MetaLearner(model, own[::-1])
    with pytest.raises(UserError, match="nested levels have the periods"):
        MetaLearner(model, [own[0], replace(own[1], period=6)], connection="nested")
    with pytest.raises(UserError, match=r"tokens are \(19,\)"):
        MetaLearner(model, own).backward(text(1, 19)[0])
    with pytest.raises(UserError, match="rule 'm3' has no second order"):
        MetaLearner(model, [replace(own[0], rule="m3")], order="exact")
    with pytest.raises(UserError, match=r"recompute=True.*memory=\{'recompute': False\}"):
        MetaLearner(hope(), order="exact")
    with pytest.raises(UserError, match="has a weight of torch.bfloat16, must be float32"):
        MetaLearner(hope(mixer="window_attention").bfloat16())


def test_exact_above_memories_that_are_differentiated_once():
    """Levels of the last block alone: no memory lies between them and the loss, so HOPE's fast loop does."""
    shares = [{"name": "fast", "period": 4, "layers": 0.5, "hidden_size": 12}, {"name": "slow", "period": 8}]
    found = []
    for recompute in (True, False):
        model = hope(memory={"chunk": 4, "recompute": recompute}, levels=shares).double()
        own = [level for level in online_levels(model, lr=0.5, bound=math.inf) if level.name == "fast"]
        learner = MetaLearner(model, own, order="exact")
        learner.backward(text(2, 19))
        found.append(gradients(model) | {"rates": learner.log_rates.grad})
    assert max(float(g.abs().max()) for g in found[0].values()) > 1e-3
    close(*found)


def test_other_memories_say_what_they_lack():
    model = hope(mixer="ttt_mlp")
    with pytest.raises(UserError, match="cannot be differentiated twice.*set order='first'"):
        MetaLearner(model, online_levels(model), order="exact").backward(text(1, 9) % VOCABULARY)


def test_levels_may_share_weights():
    model = gpt2().double()
    both = [OnlineLevel("fast", 4, MLPS["gpt2"][0]), OnlineLevel("slow", 8, MLPS["gpt2"][0], rule="momentum")]
    losses = MetaLearner(model, both, order="exact").backward(text(2, 19))
    read = OnlineLearner(model, both).read(text(2, 19))
    assert torch.allclose(losses.float(), read[:, 1:], atol=2e-6)
