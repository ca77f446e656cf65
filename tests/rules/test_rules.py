"""Every rule passes the contract of its kind against its own objective; then what each rule is for."""

from __future__ import annotations

import pytest
import torch

from nestlearn import rules
from tests.contracts.rule import case, check_rule
from tests.oracles import rules as oracle
from tests.oracles.dgd import write

ONE_TOKEN = ["hebbian", "delta", "gated_delta", "oja", "dgd"]


@pytest.mark.parametrize("name", ONE_TOKEN)
def test_contract(name):
    check_rule(getattr(rules, name), getattr(oracle, name), window=None)


@pytest.mark.parametrize("window", [1, 4])
def test_contract_of_omega(window):
    check_rule(rules.omega, oracle.omega, window)


def test_every_rule_is_listed_and_tested():
    assert set(rules.__all__) == {*ONE_TOKEN, "omega", "dgd_momentum"}


def test_dgd_momentum_equals_the_solved_steps():
    state, key, error, rate, retain = case(None)
    momentum = torch.randn_like(state)
    ours = rules.dgd_momentum(state, momentum, key, error, rate, retain, 0.6)
    for b in range(len(state)):
        for h in range(state.shape[1]):
            truth = write(*(t[b, h] for t in (state, momentum, key, error, rate, retain)), mu=0.6)
            assert all((o[b, h] - t).abs().max() <= 1e-12 for o, t in zip(ours, truth, strict=True))


def test_omega_with_a_window_of_one_is_the_delta_rule():
    state, key, value, rate, retain = case(None)
    window = rules.omega(state, key[..., None, :], value[..., None, :], rate[..., None], retain)
    assert torch.allclose(window, rules.delta(state, key, value, rate, retain), atol=1e-14)


def test_the_delta_rule_stores_a_pair_with_one_full_step():
    state, key, value, _, retain = case(None)
    full = 1 / key.square().sum(-1)
    written = rules.delta(state, key, value, full, torch.ones_like(retain))
    assert torch.allclose((written @ key[..., None]).squeeze(-1), value, atol=1e-12)


@pytest.mark.parametrize("name, target", [("dgd", "value"), ("oja", "key")])
def test_a_huge_rate_solves_the_objective(name, target):
    """The proximal step at an infinite rate: M k = v for DGD, Mᵀ v = k for Oja."""
    state, key, value, rate, retain = case(None)
    written = getattr(rules, name)(state, key, value, torch.full_like(rate, 1e12), torch.ones_like(retain))
    if target == "value":
        assert torch.allclose((written @ key[..., None]).squeeze(-1), value, atol=1e-9)
    else:
        assert torch.allclose((written.mT @ value[..., None]).squeeze(-1), key, atol=1e-9)


def test_oja_is_ojas_rule_to_first_order_in_the_rate():
    """Oja (1982, 1989): ΔM = η y (x − Mᵀ y)ᵀ with y = v, x = k."""
    state, key, value, _, retain = case(None)
    rate = torch.full_like(retain, 1e-7)
    change = rules.oja(state, key, value, rate, torch.ones_like(retain)) - state
    classic = torch.einsum("bho,bhi->bhoi", value, key - torch.einsum("bhoi,bho->bhi", state, value))
    assert torch.allclose(change / 1e-7, classic, rtol=1e-5, atol=1e-5)


def test_oja_finds_the_principal_direction():
    """With the output not clamped, v = M k, the rule is Oja's own: M converges to the first principal component."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([2.0, 0.5, 0.3], dtype=torch.float64)
    state = torch.tensor([[0.3, 0.5, -0.4]], dtype=torch.float64)
    for _ in range(3000):
        key = spread * torch.randn(3, generator=generator, dtype=torch.float64)
        state = rules.oja(state, key, state @ key, torch.tensor(0.01), torch.tensor(1.0))
    assert abs(state[0, 0]) > 0.99 and abs(state.norm() - 1) < 0.05


@pytest.mark.parametrize("name", ["dgd", "oja"])
def test_proximal_rules_are_bounded_for_every_rate(name):
    rule, generator = getattr(rules, name), torch.Generator().manual_seed(0)
    state = torch.zeros(4, 5)
    for _ in range(2000):
        key, value = torch.randn(5, generator=generator), torch.randn(4, generator=generator)
        state = rule(state, key, value, torch.tensor(1e6), torch.tensor(1.0))
    assert state.isfinite().all() and state.norm() < 1e3
