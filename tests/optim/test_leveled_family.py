"""Leveled around every optimizer that is a memory, and around torch's: schedulers, scaler, clipping, exact resume."""

import copy
import io
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from nestlearn import optim
from nestlearn.errors import UserError
from nestlearn.optim import Leveled, parameter_groups
from nestlearn.optim.by_rule import ByRule


def muon(groups):
    return ByRule(groups, partial(torch.optim.Muon, lr=0.01), partial(torch.optim.AdamW, lr=0.01))


FAMILY = {
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "Muon": muon,
    "M3": partial(optim.M3, lr=0.01, slow_period=2),
    "M3, tokens": partial(optim.M3, lr=0.01, slow_period=60, slow_period_unit="tokens"),
    "M3, paper": partial(optim.M3, lr=0.01, slow_period=3, style="paper", eps=0.1),
    "DeltaMomentum": partial(optim.DeltaMomentum, lr=0.01, values="diagonal"),
    "PreconditionedMomentum": partial(optim.PreconditionedMomentum, lr=0.01, decay=0.9),
    "GeneralizedMomentum": partial(optim.GeneralizedMomentum, lr=0.01),
    "DMGD": partial(optim.DMGD, lr=0.01),
}
MEMBERS = pytest.mark.parametrize("member", FAMILY)


class Levels(nn.Module):
    """A matrix at every step, one every 30 tokens, and what AdamW steps."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.fast, self.slow, self.norm = nn.Linear(6, 5), nn.Linear(5, 4), nn.LayerNorm(4)
        self.to(dtype)

    def forward(self, x):
        return self.norm(self.slow(torch.tanh(self.fast(x))))

    def parameter_periods(self):
        return {name: 30 if name.startswith("slow") else 1 for name, _ in self.named_parameters()}


def build(member, **settings):
    model = Levels(**settings)
    return model, Leveled(FAMILY[member], parameter_groups(model, lr=0.01), tokens_per_step=10)


def loss_at(model, step):
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(step)).to(model.norm.weight.dtype)
    y = torch.randn(10, 4, generator=torch.Generator().manual_seed(100 + step)).to(x.dtype)
    return nn.functional.mse_loss(model(x), y)


def learn(model, optimizer, steps, after=lambda: None):
    for step in steps:
        loss_at(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        after()
        optimizer.zero_grad()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@MEMBERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [2, 4])
def test_resumes_mid_chunk_bit_for_bit(member, dtype, cut):
    whole, optimizer = build(member, dtype=dtype)
    learn(whole, optimizer, range(9))
    first, before = build(member, dtype=dtype)
    learn(first, before, range(cut))
    chunks = [state for state in before.state.values() if "chunk_gradient" in state]
    assert len(chunks) == 2 and all(state["chunk_gradient"].dtype == torch.float32 for state in chunks)
    file = io.BytesIO()
    torch.save((first.state_dict(), before.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second, after = build(member, dtype=dtype)
    second.load_state_dict(weights)
    after.load_state_dict(state)
    learn(second, after, range(cut, 9))
    assert same(whole, second)


@MEMBERS
def test_each_level_moves_when_it_is_due_and_learns(member):
    model, optimizer = build(member)
    before = sum(loss_at(model, step).item() for step in range(12))
    slow = [model.slow.weight.detach().clone()]
    learn(model, optimizer, list(range(12)) * 6, lambda: slow.append(model.slow.weight.detach().clone()))
    moved = [not torch.equal(a, b) for a, b in zip(slow, slow[1:], strict=False)]
    assert moved == [(step + 1) % 3 == 0 for step in range(72)]
    assert sum(loss_at(model, step).item() for step in range(12)) < before


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=9, cycle_momentum=False),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 6)], [2]
    ),
}


@MEMBERS
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_sets_the_rate_and_resumes(member, name):
    whole, optimizer = build(member)
    scheduler = SCHEDULERS[name](optimizer)
    rates = []

    def after(scheduler=scheduler):
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])

    with warnings.catch_warnings():  # torch's own SequentialLR calls its parts in the way that torch deprecates
        warnings.simplefilter("ignore", UserWarning)
        learn(whole, optimizer, range(6), after)
        first, optimizer_1 = build(member)
        scheduler_1 = SCHEDULERS[name](optimizer_1)
        learn(first, optimizer_1, range(4), scheduler_1.step)
        second, optimizer_2 = build(member)
        scheduler_2 = SCHEDULERS[name](optimizer_2)
        second.load_state_dict(first.state_dict())
        optimizer_2.load_state_dict(optimizer_1.state_dict())
        scheduler_2.load_state_dict(scheduler_1.state_dict())
        learn(second, optimizer_2, range(4, 6), scheduler_2.step)
    assert len(set(rates)) > 2 and same(whole, second)


@MEMBERS
def test_plateau_scheduler(member):
    model, optimizer = build(member)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    learn(model, optimizer, range(4), lambda: scheduler.step(1.0))
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.01 * 0.1**3)


@MEMBERS
def test_a_scaler_changes_nothing_and_skips_what_overflowed(member):
    plain, optimizer = build(member)
    scaled, other = build(member)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(7):
        learn(plain, optimizer, [step])
        loss = loss_at(scaled, step)
        scaler.scale(loss).backward()
        scaler.unscale_(other)
        nn.utils.clip_grad_norm_(scaled.parameters(), 0.5)
        scaler.step(other)
        scaler.update()
        other.zero_grad()
    assert same(plain, scaled)  # the scale is a power of two
    seen = other.tokens_seen
    scaler.scale(loss_at(scaled, 8) * torch.inf).backward()
    scaler.step(other)
    scaler.update()
    assert same(plain, scaled) and other.tokens_seen == seen == 70 and scaler.get_scale() == 2.0**7


def test_a_period_in_tokens_is_a_period_of_each_level():
    """M3's slow memory writes every 60 tokens. The fast level sees 10 at a time, the slow one 30."""
    model, optimizer = build("M3, tokens")
    writes = {"fast": [], "slow": []}

    def after():
        for name in writes:
            state = optimizer.state[getattr(model, name).weight]
            open_period = state.get("slow_steps")
            writes[name].append(open_period)

    learn(model, optimizer, range(12), after)
    assert writes["fast"] == [1, 2, 3, 4, 5, 0] * 2
    assert writes["slow"] == [None, None, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0]


def test_a_chunk_is_one_batch_of_dgd_and_is_not_resumed_without_its_inputs():
    slow, plain = (nn.Linear(4, 3, bias=False, dtype=torch.float64) for _ in range(2))
    plain.load_state_dict(slow.state_dict())
    x, y = torch.randn(15, 4, dtype=torch.float64), torch.randn(15, 3, dtype=torch.float64)

    def backward(layer, rows):
        with optim.capture_inputs(layer):
            (layer(x[rows]) - y[rows]).square().sum(-1).mean().backward()

    groups = [{"params": list(slow.parameters()), "period": 15}]
    leveled, dgd = Leveled(partial(optim.DGD, lr=0.3), groups, tokens_per_step=5), optim.DGD(plain.parameters(), lr=0.3)
    for start in (0, 5, 10):
        backward(slow, slice(start, start + 5))
        leveled.step()
        leveled.zero_grad()
        if start == 5:
            saved = copy.deepcopy(leveled.state_dict())
    backward(plain, slice(0, 15))
    dgd.step()
    torch.testing.assert_close(slow.weight, plain.weight, rtol=0, atol=1e-12)
    with pytest.raises(UserError, match="DGD was saved within a chunk.*save where every level has just stepped"):
        Leveled(partial(optim.DGD, lr=0.3), groups, tokens_per_step=5).load_state_dict(saved)


def test_leveled_hands_over_the_state_of_the_optimizer_itself():
    model, optimizer = build("M3")
    learn(model, optimizer, range(3))
    assert optimizer.inner is not None
    assert optimizer.state is optimizer.inner.state and optimizer.param_groups is optimizer.inner.param_groups
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state is optimizer.inner.state and optimizer.param_groups is optimizer.inner.param_groups
