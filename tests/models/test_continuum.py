"""Continuum memory against its equations, written out in numpy from the blocks' weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.errors import UserError
from nestlearn.levels import parse_levels
from nestlearn.models.continuum import Continuum

WIDTH, HIDDEN, LEVELS = 6, 12, parse_levels([("fast", 4), ("middle", 16), ("slow", math.inf)])


def build(connection: str) -> Continuum:
    torch.manual_seed(0)
    system = Continuum(WIDTH, HIDDEN, LEVELS, connection).double()
    if system.weights is not None:
        torch.nn.init.normal_(system.weights)
    return system


def block(system: Continuum, name: str, x: np.ndarray) -> np.ndarray:
    """down(silu(gate n) * up n), n = x / rms(x)."""
    gate, up, down = (
        dict(system.named_parameters())[f"blocks.{name}.{layer}.weight"].detach().numpy()
        for layer in ("gate", "up", "down")
    )
    n = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    z = n @ gate.T
    return (z / (1 + np.exp(-z)) * (n @ up.T)) @ down.T


@pytest.mark.parametrize("connection", ["sequential", "nested"])
def test_a_chain(connection):
    """NL Eq. 70, with residual blocks, fastest first."""
    system, x = build(connection), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    y = x.numpy()
    for name in ("fast", "middle", "slow"):
        y = y + block(system, name, y)
    assert np.abs(system(x).detach().numpy() - y).max() < 1e-12


def test_independent_levels_are_summed():
    """NL Eq. 74: every block sees the same input."""
    system, x = build("independent"), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    assert system.weights is not None
    weights = system.weights.detach().numpy()
    parts = [block(system, name, x.numpy()) for name in ("fast", "middle", "slow")]
    y = x.numpy() + sum(w * part for w, part in zip(weights, parts, strict=True))
    assert np.abs(system(x).detach().numpy() - y).max() < 1e-12


def test_nested_levels_restart_from_the_next_slower_one():
    """NL Eq. 72: when a level has stepped, all faster levels begin again from it; slower ones stay."""
    system = build("nested")
    before = {name: p.detach().clone() for name, p in system.named_parameters()}
    system.restart({16.0})
    for name, now in system.named_parameters():
        source = name.replace("fast", "middle")
        assert torch.equal(now, before[source])
    system.restart({4.0})
    assert all(torch.equal(p, before[n.replace("fast", "middle")]) for n, p in system.named_parameters())


@pytest.mark.parametrize("connection", ["sequential", "independent"])
def test_only_nested_levels_restart(connection):
    system = build(connection)
    before = [p.detach().clone() for p in system.parameters()]
    system.restart({4.0, 16.0})
    assert all(torch.equal(a, b) for a, b in zip(before, system.parameters(), strict=True))


def test_a_system_has_the_parameters_of_one_gated_mlp():
    assert sum(p.numel() for p in build("sequential").parameters()) == 3 * WIDTH * HIDDEN


def test_bad_connections_and_widths_are_named():
    with pytest.raises(UserError, match="connection is 'nestde'"):
        Continuum(WIDTH, HIDDEN, LEVELS, "nestde")
    with pytest.raises(UserError, match="must be equal"):
        Continuum(WIDTH, HIDDEN + 1, LEVELS, "nested")


def test_nested_levels_of_a_new_model_start_equal():
    """NL Eq. 72: a faster level's initial state is the next slower one."""
    config = HopeConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=24, levels=[1, 8, 64], connection="nested"
    )
    for block in HopeForCausalLM(config).model.layers:
        first, *others = (list(mlp.parameters()) for _, mlp in block.cms.by_level())
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
