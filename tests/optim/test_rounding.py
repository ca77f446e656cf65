"""keep_rounding: bfloat16 parameters step as float32 ones do, resume bit for bit."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from nestlearn.optim import M3, Leveled

OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, lr=1e-4), "m3": partial(M3, lr=1e-4)}


def run(parameter, optimizer, steps):
    for step in steps:
        g = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        parameter.grad = g.to(torch.bfloat16).to(parameter.dtype)
        optimizer.step(tokens=4)


def start(dtype):
    return nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(99)).to(torch.bfloat16).to(dtype))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_and_rest_are_the_float32_weight(name):
    low, wide = start(torch.bfloat16), start(torch.float32)
    kept = Leveled(OPTIMIZERS[name], [low], keep_rounding=True)
    run(low, kept, range(20))
    run(wide, Leveled(OPTIMIZERS[name], [wide]), range(20))
    assert low.dtype == torch.bfloat16 and low.grad.dtype == torch.bfloat16
    assert torch.equal(low.detach(), wide.detach().bfloat16())
    assert (low.float() + kept.state[low]["rounded_off"] - wide).abs().max() < 1e-7


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("at", [5, 8])
def test_resumes_bit_for_bit(name, at):
    one = start(torch.bfloat16)
    first = Leveled(OPTIMIZERS[name], [{"params": [one], "period": 16}], keep_rounding=True)
    run(one, first, range(at))
    two, saved = nn.Parameter(one.detach().clone()), copy.deepcopy(first.state_dict())
    second = Leveled(OPTIMIZERS[name], [{"params": [two], "period": 16}], keep_rounding=True)
    second.load_state_dict(saved)
    run(one, first, range(at, 20))
    run(two, second, range(at, 20))
    assert torch.equal(one, two) and torch.equal(first.state[one]["rounded_off"], second.state[two]["rounded_off"])
