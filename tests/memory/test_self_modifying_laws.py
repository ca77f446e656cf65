"""Laws of the self-modifying memory: streams, forks, reach and bounds. Values are in test_self_modifying.py."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nestlearn.memory import SelfModifyingConfig, SelfModifyingMemory
from tests.contracts.memory import check_memory, cut
from tests.memory.test_self_modifying import build, tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"chunk": 1, "memory_chunk": 1},
        {"chunk": 4, "memory_chunk": 2},
        {"chunk": 8, "memory_chunk": 8, "retain_to": "initial"},
        {"chunk": 64, "memory_chunk": 8},
        {"chunk": 4, "memory_chunk": 2, "momentum": 0.0, "objective": "dot", "adaptive": ("v", "q")},
        {"chunk": 4, "memory_chunk": 1, "dgd": False, "adaptive": ()},
        {"chunk": 4, "memory_chunk": 1, "objective": "mix"},
        {"chunk": 8, "memory_chunk": 8, "read": "after"},
        {"chunk": 4, "memory_chunk": 2, "read": "after"},
    ],
    ids=str,
)
def test_contract(settings, tmp_path):
    memory = build(**{"target_norm": "l2", "scale": 0.9, **settings})
    check_memory(lambda given, state: memory(*given[:2], state, value_input=given[2]), tokens(3, 21), tmp_path)


@pytest.mark.parametrize("at", [3, 8, 11])
def test_gradients_flow_across_a_cut(at):
    """Two pieces with the state between them are trained exactly as the whole."""
    memory = build(chunk=8, target_norm="l2")
    given = tokens(2, 21)
    parameters = list(memory.parameters())
    whole = torch.autograd.grad(memory(given[0], given[1])[0].square().sum(), parameters)
    first, state = memory(*cut(given[:2], 0, at))
    second, _ = memory(*cut(given[:2], at), state)
    parts = torch.autograd.grad(first.square().sum() + second.square().sum(), parameters)
    for ours, right in zip(parts, whole, strict=True):
        assert (ours - right).norm() <= 1e-10 * (1 + right.norm())


def test_a_detached_state_stops_the_gradient():
    memory = build(target_norm="l2")
    x, query, _ = tokens(1, 21)
    x.requires_grad_()
    _, state = memory(x, query)
    y, _ = memory(x.detach(), query, state.detach())
    y.sum().backward()
    assert x.grad is None and memory.rate_read.bias.grad is not None


def test_heads_are_independent():
    memory = build(target_norm="l2")
    x, query, _ = tokens(2, 37)
    changed = x.clone()
    changed[:, :, 0] *= -1
    before, after = memory(x, query)[0], memory(changed, query)[0]
    assert torch.equal(before[:, :, 1], after[:, :, 1]) and not torch.equal(before[:, :, 0], after[:, :, 0])


def test_a_token_changes_what_is_read_hundreds_of_positions_later():
    config = SelfModifyingConfig(head_width=8, hidden_width=16, heads=1, chunk=64, retain_start=0.9999)
    torch.manual_seed(0)
    memory = SelfModifyingMemory(config).double()
    x, query, _ = tokens(1, 800, heads=1, width=8)
    changed = x.clone()
    changed[:, 3] *= -1
    difference = (memory(x, query)[0] - memory(changed, query)[0]).abs().amax(dim=(0, 2, 3))
    assert difference[:4].max() == 0 and difference[700:].max() > 1e-4


def test_rate_zero_never_writes():
    memory = build(rate_max=0.0, retention=False)
    x, query, _ = tokens(2, 37)
    y, state = memory(x, query)
    initial = memory.initial["memory"]
    hidden = torch.nn.functional.silu(torch.einsum("hnd,bthd->bthn", initial.w2, query))
    assert torch.allclose(y, query + torch.einsum("hdn,bthn->bthd", initial.w1, hidden), atol=1e-12)
    assert all(torch.allclose(state.weights[n].w1, memory.initial[n].w1.expand(2, -1, -1, -1)) for n in state.names)


def test_detached_writes_read_the_same_and_still_train_the_initial_states():
    x, query, _ = tokens(1, 37)
    exact, cheap = build(target_norm="l2"), build(target_norm="l2", detach_writes=True)
    assert torch.equal(exact(x, query)[0], cheap(x, query)[0])
    cheap(x, query)[0].square().sum().backward()
    assert cheap.initial["memory"].w1.grad is not None and cheap.initial["memory"].w1.grad.any()


# Boundedness. Every input below must leave output and state finite and no larger than a fixed multiple of the start.

WIDTH, HIDDEN = 4, 6


def constant(batch: int, length: int) -> Tensor:
    return torch.randn(batch, 1, 1, WIDTH).expand(batch, length, 1, WIDTH)


def zeros(batch: int, length: int) -> Tensor:
    return torch.zeros(batch, length, 1, WIDTH)


def white_noise(batch: int, length: int) -> Tensor:
    return 1000 * torch.randn(batch, length, 1, WIDTH)


def alternating(batch: int, length: int) -> Tensor:
    signs = 1.0 - 2.0 * (torch.arange(length) % 2)
    return signs.view(1, -1, 1, 1) * constant(batch, length)


def text(batch: int, length: int) -> Tensor:
    """Bytes of the standard library's top-level modules, each row from its own place, under a random embedding."""
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))
    source = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    starts = torch.randint(len(source), (batch, 1))
    return torch.randn(256, 1, WIDTH)[source[(starts + torch.arange(length)) % len(source)].long()]


STREAMS = {f.__name__: f for f in (constant, zeros, white_noise, alternating, text)}
BOUNDED = [{}, {"momentum": 0.6}, {"momentum": 0.6, "retain_to": "initial"}, {"momentum": 0.6, "retention": False}]
LARGEST = 500.0  # norms that these short streams reached were all below 120; the start is near 3


def trainable(seed: int = 0, **settings) -> SelfModifyingMemory:
    torch.manual_seed(seed)
    return SelfModifyingMemory(SelfModifyingConfig(head_width=WIDTH, hidden_width=HIDDEN, **{"chunk": 64, **settings}))


@torch.no_grad()
def largest(memory: SelfModifyingMemory, x: Tensor, pieces: int) -> list[float]:
    """Largest weight norm after each of ``pieces`` equal parts of the stream; NaN and inf are failures here."""
    query = torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype)
    state, norms = None, []
    for part, asked in zip(x.chunk(pieces, dim=1), query.chunk(pieces, dim=1), strict=True):
        y, state = memory(part, asked, state)
        assert y.isfinite().all() and all(t.isfinite().all() for t in state.tensors())
        norms.append(max(state.w1.norm(dim=(-2, -1)).max().item(), state.w2.norm(dim=(-2, -1)).max().item()))
    return norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("settings", BOUNDED, ids=str)
def test_bounded(settings, stream, dtype):
    memory = trainable(**settings)
    assert max(largest(memory, STREAMS[stream](4, 4096).to(dtype), pieces=4)) < LARGEST


@pytest.mark.parametrize("stream", STREAMS)
def test_the_mixed_objective_is_bounded_at_chunk_1(stream):
    """Each write subtracts what is stored now; a chunk that subtracts what was stored before may diverge."""
    memory = trainable(objective="mix", mix_start=0.9, chunk=1)
    assert max(largest(memory, STREAMS[stream](4, 400), pieces=1)) < LARGEST


@pytest.mark.parametrize("rate_max", [1e-3, 1e3, 1e6])
def test_bounded_for_every_rate(rate_max):
    """The step is proximal: one write moves a weight by at most η|x| / (1 + η|x|²) ≤ √η / 2 times its error."""
    norms = largest(trainable(rate_max=rate_max), text(4, 4096), pieces=4)
    assert max(norms) < LARGEST + 10 * rate_max**0.5


@pytest.mark.slow
def test_bounded_after_a_million_tokens():
    """Two streams side by side: text, and adversarial input that changes its kind every 16,384 tokens, the odd pieces
    rounded to bfloat16."""
    memory, state = trainable(momentum=0.6), None
    adversaries = [constant, white_noise, alternating, zeros]
    for number in range(62):
        hostile = adversaries[number // 2 % 4](1, 2**14)
        x = torch.cat([text(1, 2**14), hostile.bfloat16().float() if number % 2 else hostile])
        with torch.no_grad():
            y, state = memory(x, torch.nn.functional.normalize(x, dim=-1), state)
        assert y.isfinite().all() and all(t.isfinite().all() for t in state.tensors())
        assert max(w.norm(dim=(-2, -1)).max().item() for w in (state.w1, state.w2)) < LARGEST
    assert (state.seen > 1_000_000).all()
