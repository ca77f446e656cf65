"""Leveled: every level steps on its own period, with its chunk's mean gradient, and resumes bit for bit."""

import io
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nestlearn.errors import UserError
from nestlearn.optim import Leveled

ADAMW = partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1)
SGD = partial(torch.optim.SGD, lr=1.0)


def parameter(*shape, dtype=torch.float32, seed=0):
    return nn.Parameter(torch.randn(*shape or (4, 3), generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradients(step, p, index=0):
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + index)).to(p.dtype)


def run(optimizer, parameters, steps, tokens=10):
    """Gradients are a function of the step, so that two runs see the same ones."""
    for step in steps:
        for index, p in enumerate(parameters):
            p.grad = gradients(step, p, index)
        optimizer.step(tokens=tokens)
        optimizer.zero_grad()


@settings(deadline=None, max_examples=60)
@given(period=st.integers(1, 90), tokens=st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_steps_at_the_first_boundary_after_each_multiple_with_the_weighted_mean(period, tokens):
    p = parameter(2, 3, dtype=torch.float64)
    start = p.detach().clone()
    optimizer = Leveled(SGD, [{"params": [p], "period": period}])
    expected, chunk, seen, clock = start.clone(), torch.zeros_like(start), 0, 0
    for step, n in enumerate(tokens):
        p.grad = gradients(step, p)
        chunk, seen = chunk + n * p.grad, seen + n
        due = any(multiple % period == 0 for multiple in range(clock + 1, clock + n + 1))
        clock += n
        if due:
            expected, chunk, seen = expected - chunk / seen, torch.zeros_like(start), 0
        before = p.detach().clone()
        optimizer.step(tokens=n)
        assert due or torch.equal(p.detach(), before)
        assert optimizer.fired == (frozenset({period}) if due else frozenset())
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_between_its_periods_nothing_of_a_level_changes_by_one_bit():
    fast, slow = parameter(seed=1), parameter(seed=2)
    optimizer = Leveled(ADAMW, [{"params": [fast]}, {"params": [slow], "period": 40}])
    run(optimizer, [fast, slow], range(4))
    assert optimizer.fired == {1, 40}
    kept = slow.detach().clone()
    moments = {name: value.clone() for name, value in optimizer.state[slow].items()}
    run(optimizer, [fast, slow], range(4, 7))
    assert torch.equal(slow.detach(), kept)
    assert all(torch.equal(optimizer.state[slow][name], value) for name, value in moments.items())
    run(optimizer, [fast, slow], [7])
    assert not torch.equal(slow.detach(), kept)


def test_period_up_to_one_step_equals_the_plain_optimizer_bit_for_bit():
    leveled, plain = parameter(), parameter()
    optimizer, reference = Leveled(ADAMW, [{"params": [leveled], "period": 10}]), ADAMW([plain])
    for step in range(9):
        leveled.grad = gradients(step, leveled)
        plain.grad = gradients(step, plain)
        optimizer.step(tokens=10)
        reference.step()
    assert torch.equal(leveled, plain)
    assert set(optimizer.state[leveled]) == set(reference.state[plain])


def test_the_chunk_is_in_the_state_and_grad_is_left_alone():
    p = parameter()
    optimizer = Leveled(ADAMW, [{"params": [p], "period": 30}], tokens_per_step=10)
    for step in range(3):
        p.grad = gradients(step, p)
        optimizer.step()
        assert torch.equal(p.grad, gradients(step, p))
    assert "chunk_gradient" not in optimizer.state[p] and "exp_avg" in optimizer.state[p]
    p.grad = None
    optimizer.step()
    p.grad = gradients(9, p)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["chunk_gradient"], 10 * gradients(9, p))
    assert optimizer.param_groups[0]["chunk_tokens"] == 20


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_mid_period_bit_for_bit(cut, dtype):
    def build():
        ps = [parameter(seed=1, dtype=dtype), parameter(seed=2, dtype=dtype), parameter(seed=3, dtype=dtype)]
        periods = [1, 25, math.inf]
        return ps, Leveled(ADAMW, [{"params": [p], "period": period} for p, period in zip(ps, periods, strict=True)])

    whole, optimizer = build()
    run(optimizer, whole, range(9))
    first, optimizer_1 = build()
    run(optimizer_1, first, range(cut))
    file = io.BytesIO()
    torch.save(optimizer_1.state_dict(), file)
    file.seek(0)
    second, optimizer_2 = build()
    optimizer_2.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for a, b in zip(second, first, strict=True):
            a.copy_(b)
    run(optimizer_2, second, range(cut, 9))
    for a, b in zip(whole, second, strict=True):
        assert torch.equal(a, b)
        assert optimizer.state.get(a, {}).keys() == optimizer_2.state.get(b, {}).keys()
        assert all(torch.equal(value, optimizer_2.state[b][name]) for name, value in optimizer.state.get(a, {}).items())


def test_accumulates_bfloat16_in_float32():
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = Leveled(SGD, [{"params": [p], "period": 10_000}], tokens_per_step=1)
    for _ in range(9_999):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["chunk_gradient"].item() == 9_999  # bfloat16 would have stopped at 256


def test_frozen_level_never_changes_and_holds_no_state():
    p, start = parameter(), parameter().detach()
    optimizer = Leveled(ADAMW, [{"params": [p], "period": math.inf}])
    run(optimizer, [p], range(20))
    assert torch.equal(p, start) and not optimizer.state.get(p) and optimizer.state_dict()["state"] == {}


def test_works_under_a_scheduler_and_clipping():
    fast, slow = parameter(seed=1), parameter(seed=2)
    optimizer = Leveled(SGD, [{"params": [fast]}, {"params": [slow], "period": 20, "lr": 0.5}], tokens_per_step=10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = slow.detach().clone()
    chunk = []
    for step in range(2):
        fast.grad, slow.grad = gradients(step, fast), gradients(step, slow, 1)
        torch.nn.utils.clip_grad_norm_([fast, slow], 0.1)
        chunk.append(slow.grad.clone())
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.125]
    torch.testing.assert_close(slow.detach(), before - 0.25 * (chunk[0] + chunk[1]) / 2)  # lr at the moment of the step


def test_closure_and_a_group_added_later():
    first, second = parameter(seed=1), parameter(seed=2)
    optimizer = Leveled(SGD, [first], tokens_per_step=10)

    def closure():
        optimizer.zero_grad()
        loss = (first**2).sum() + (second**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    optimizer.add_param_group({"params": [second], "period": 20})
    assert optimizer.step(closure) is not None and optimizer.fired == {1, 20} and optimizer.tokens_seen == 20


@pytest.mark.parametrize("period", [0, -5, 2.5, math.nan])
def test_refuses_a_bad_period(period):
    with pytest.raises(UserError, match="period of a parameter group is .*whole number of tokens"):
        Leveled(SGD, [{"params": [parameter()], "period": period}])


def test_refuses_a_step_without_tokens_where_a_level_needs_them():
    p = parameter()
    optimizer = Leveled(SGD, [{"params": [p], "period": 20}])
    p.grad = gradients(0, p)
    with pytest.raises(UserError, match="call step\\(tokens=...\\) or set tokens_per_step"):
        optimizer.step()
    with pytest.raises(UserError, match="tokens of one step is 0"):
        optimizer.step(tokens=0)
    assert optimizer.tokens_seen == 0
