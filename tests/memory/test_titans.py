"""Titans' memory against its objective, differentiated token by token; its laws; TTT-MLP as its special case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.memory import TitansConfig, TitansMemory
from tests.contracts.memory import check_memory
from tests.oracles import titans as oracle

ROWS, TOKENS, HEADS, WIDTH, HIDDEN = 3, 21, 2, 5, 7


def build(chunk: int = 4, **kind: Any) -> TitansMemory:
    torch.manual_seed(0)
    config = TitansConfig(WIDTH, HIDDEN, HEADS, chunk, **kind)
    memory = TitansMemory(config)
    if memory.norm is not None:
        torch.nn.init.uniform_(memory.norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(memory.norm.bias, std=0.3)
    if memory.config.bounded:  # so large that the bound matters for a fifth of the tokens
        with torch.no_grad():
            memory.initial.w1.mul_(2)
    return memory.double()


def tokens(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """key, value, rate, retain, momentum, query; steps small enough for the explicit rule."""
    torch.manual_seed(1)
    key, value, query = (torch.randn(ROWS, TOKENS, HEADS, WIDTH, dtype=torch.float64) for _ in range(3))
    rate, retain, momentum = (torch.rand(ROWS, TOKENS, HEADS, dtype=torch.float64) for _ in range(3))
    key = torch.nn.functional.normalize(key, dim=-1)
    return tuple(t.to(dtype) for t in (key, value, 0.1 * rate, 0.9 + retain / 10, 0.9 * momentum, query))


def laws(config: TitansConfig) -> dict[str, bool]:
    return {"bounded": config.bounded, "anchored": config.retain_to == "initial"}


def truth(memory: TitansMemory, row: int, head: int, chunk: int):
    """Reads and last weights of one row and head."""
    network = {"w1": memory.initial.w1[head].detach(), "w2": memory.initial.w2[head].detach()}
    norm = memory.norm and oracle.Norm(memory.norm.weight[head, 0].detach(), memory.norm.bias[head, 0].detach())
    return oracle.run(tuple(t[row, :, head] for t in tokens()), network, chunk, norm, **laws(memory.config))


KINDS: list[dict[str, Any]] = [{}, {"inner_norm": True}, {"bounded": True}, {"bounded": True, "retain_to": "initial"}]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_equals_the_differentiated_objective(chunk, kind):
    memory = build(chunk, **kind)
    reads, state = memory(*tokens())
    single, _ = build(chunk, **kind).float()(*tokens(torch.float32))
    for row in range(ROWS):
        for head in range(HEADS):
            expected, network, momenta = truth(memory, row, head, chunk)
            assert (reads[row, :, head] - expected).abs().max() <= 1e-10
            assert (single[row, :, head] - expected).norm() <= 1e-5 * expected.norm()
            weights, moved = state.weights["memory"], state.momenta["memory"]
            for name in ("w1", "w2"):
                assert (getattr(weights, name)[row, head] - network[name]).abs().max() <= 1e-10
                assert (getattr(moved, name)[row, head] - momenta[name]).abs().max() <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind, tmp_path):
    memory = build(**kind)
    check_memory(lambda given, state: memory(*given, state), tokens(), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    memory = build(3, **kind, recompute=False)
    given = [t[:1, :5].clone().requires_grad_() for t in tokens()]
    assert torch.autograd.gradcheck(lambda *g: memory(*g)[0], given)


def test_recomputing_changes_no_gradient():
    found = []
    for recompute in (True, False):
        memory = build(recompute=recompute)
        memory(*tokens())[0].square().sum().backward()
        found.append([p.grad for p in memory.parameters()])
    assert all((a - b).abs().max() <= 1e-12 and a.abs().max() > 0 for a, b in zip(*found, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("large", ["weights", "values"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_bounded_steps_do_not_diverge_where_the_weights_or_values_are_large(large, noise):
    """Like keys at the largest θ, momentum that adds them up: without the bound this is not finite any more."""
    found = {}
    for bounded in (False, True):
        memory = build(32, bounded=bounded)
        key = torch.nn.functional.normalize(
            torch.ones(1, 640, HEADS, WIDTH).double() + noise * torch.randn(1, 640, HEADS, WIDTH), dim=-1
        )
        value = (30.0 if large == "values" else 1.0) * torch.randn(1, 640, HEADS, WIDTH, dtype=torch.float64)
        if large == "weights":
            for w in memory.parameters():
                w.mul_(8)
        ones = torch.ones(1, 640, HEADS, dtype=torch.float64)
        _, state = memory(key, value, 0.5 * ones / 32, ones, 0.5 * ones, key)
        found[bounded] = max(t.abs().max() for t in (state.w1, state.w2))
    assert found[True] < 50 and not found[False] < 1e6


@torch.no_grad()
def test_what_is_forgotten_entirely_leaves_the_initial_weights():
    key, value, rate, retain, momentum, query = tokens()
    memory = build(retain_to="initial")
    retain[:, 9], momentum[:, 9], rate[:, 9] = 0, 0, 0
    _, state = memory(*(t[:, :10] for t in (key, value, rate, retain, momentum, query)))
    assert (state.w1[:, 0] - memory.initial.w1).abs().max() <= 1e-12 and state.m1.abs().max() <= 1e-12
    with pytest.raises(UserError, match="retain_to is 'inital'.*'initial'"):
        build(retain_to="inital")


def test_bounded_and_a_layer_norm_exclude_each_other():
    with pytest.raises(UserError, match="bounded and inner_norm"):
        build(bounded=True, inner_norm=True)


def test_factors_of_zero_forget_and_stay_finite():
    key, value, rate, retain, momentum, query = tokens()
    retain[:, 9], momentum[:, 9] = 0, 0
    reads, state = build(1)(key, value, rate, retain, momentum, query)
    assert reads.isfinite().all() and all(t.isfinite().all() for t in state.tensors())
    _, after = build(1)(*(t[:, :10] for t in (key, value, 0 * rate, retain, momentum, query)))
    assert after.w1.abs().max() <= 1e-12 and after.m1.abs().max() <= 1e-12


def test_bad_shapes_are_named():
    key, value, rate, retain, momentum, query = tokens()
    with pytest.raises(UserError, match="momentum has the shape"):
        build()(key, value, rate, retain, momentum[:, :3], query)
    with pytest.raises(UserError, match="state holds 2 streams"):
        build()(key, value, rate, retain, momentum, query, build().init_state(2))
