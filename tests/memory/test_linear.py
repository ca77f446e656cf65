"""A matrix memory equals its rule's truth token by token, for both read conventions, and keeps the contract."""

from __future__ import annotations

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.memory.linear import RULES, LinearConfig, LinearMemory
from tests.contracts.memory import check_memory
from tests.oracles import dgd as dgd_oracle
from tests.oracles import rules as oracle

BATCH, TOKENS, HEADS, IN, OUT = 3, 23, 2, 5, 4


def tokens(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """key, value, rate, retain, query; unit keys and rates below 1/4, where the explicit rules are stable."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, TOKENS, HEADS, *shape, generator=generator, dtype=torch.float64)

    key = torch.nn.functional.normalize(random(IN), dim=-1)
    rows = (key, random(OUT), random().sigmoid() / 4, 0.9 + random().sigmoid() / 10, random(IN))
    return tuple(t.to(dtype) for t in rows)


def memory(rule: str, **settings) -> LinearMemory:
    window = 3 if rule == "omega" else 1
    return LinearMemory(LinearConfig(IN, OUT, HEADS, rule=rule, window=window, **{"chunk": 8, **settings}))


def truth(rule: str, after: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One row and one head at a time; omega sees what there is of its window."""
    reads = torch.empty(BATCH, TOKENS, HEADS, OUT, dtype=torch.float64)
    ends = torch.empty(BATCH, HEADS, OUT, IN, dtype=torch.float64)
    for b in range(BATCH):
        for h in range(HEADS):
            key, value, rate, retain, query = (t[b, :, h] for t in tokens())
            state = torch.zeros(OUT, IN, dtype=torch.float64)
            for t in range(TOKENS):
                seen = slice(max(0, t - 2), t + 1) if rule == "omega" else t
                new = getattr(oracle, rule)(state, key[seen], value[seen], rate[seen], retain[t])
                reads[b, t, h] = (new if after else state) @ query[t]
                state = new
            ends[b, h] = state
    return reads, ends


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_truth(rule, after):
    reads, end = truth(rule, after)
    ours, state = memory(rule, read_after_write=after)(*tokens())
    assert (ours - reads).abs().max() <= 1e-10 and (state.weight - end).abs().max() <= 1e-10
    single, _ = memory(rule, read_after_write=after)(*tokens(torch.float32))
    assert (single.double() - reads).norm() / reads.norm() <= 1e-5


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_contract(rule, after, tmp_path):
    module = memory(rule, read_after_write=after)
    check_memory(lambda given, state: module(*given, state), tokens(), tmp_path)


def test_contract_with_momentum(tmp_path):
    module = memory("dgd", momentum=0.6)
    check_memory(lambda given, state: module(*given, state), tokens(), tmp_path)


def test_momentum_equals_the_truth():
    key, value, rate, retain, query = tokens()
    empty = torch.zeros(BATCH, HEADS, OUT, IN, dtype=torch.float64)
    reads, end, momentum = dgd_oracle.run(empty, empty, key, -value, rate, retain, query, mu=0.6)
    ours, state = memory("dgd", momentum=0.6, read_after_write=False)(*tokens())
    assert (ours - reads).abs().max() <= 1e-10
    assert (state.weight - end).abs().max() <= 1e-10 and (state.momentum - momentum).abs().max() <= 1e-10


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(rule):
    given = [t[:1, :5, :1].clone().requires_grad_() for t in tokens()]
    module = LinearMemory(LinearConfig(IN, OUT, rule=rule, chunk=3, window=2 if rule == "omega" else 1))
    assert torch.autograd.gradcheck(lambda *g: module(*g)[0], given)


@pytest.mark.parametrize("rule", ["delta", "gated_delta", "dgd"])
def test_recalls_what_it_stored(rule):
    """Orthonormal keys, full writes, no forgetting: every pair is read back, the newest included."""
    keys = torch.eye(IN, dtype=torch.float64)[None, :, None].repeat(1, 1, HEADS, 1)
    values, gates = torch.randn(1, IN, HEADS, OUT, dtype=torch.float64), torch.ones(1, IN, HEADS, dtype=torch.float64)
    rate = 1e12 * gates if rule == "dgd" else gates
    module = memory(rule)
    reads, state = module(keys, values, rate, gates, keys)
    assert torch.allclose(reads, values, atol=1e-9)
    again, _ = module(keys, values, 0 * gates + 1e-30, gates, keys, state)
    assert torch.allclose(again, values, atol=1e-9)


def test_a_retention_of_zero_forgets_and_stays_finite():
    key, value, rate, retain, query = tokens()
    retain[:, 9] = 0
    reads, state = memory("dgd", read_after_write=False)(key, value, rate, retain, query)
    later = [t[:, 10:] for t in (key, value, rate, retain, query)]
    assert reads.isfinite().all() and all(t.isfinite().all() for t in state.tensors())
    start = memory("dgd").init_state(BATCH, dtype=torch.float64)
    _, only = memory("dgd")(*(t[:, :9] for t in (key, value, rate, retain, query)), start)
    gone, _ = dgd_oracle.run(only.weight, start.momentum, *at(9, key, -value, rate, retain, query), mu=0.0)[1:]
    _, truth_end, _ = dgd_oracle.run(gone, start.momentum, later[0], -later[1], *later[2:], mu=0.0)
    assert (state.weight - truth_end).abs().max() <= 1e-10


def at(token: int, *rows: torch.Tensor) -> list[torch.Tensor]:
    return [t[:, token : token + 1] for t in rows]


def test_bfloat16_input_keeps_a_float32_state():
    reads, state = memory("dgd")(*tokens(torch.bfloat16))
    assert reads.dtype == torch.bfloat16 and state.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rule": "delat"}, "did you mean 'delta'"),
        ({"momentum": 0.5, "rule": "delta"}, "only rule 'dgd' has momentum"),
        ({"momentum": 1.0}, "must be in"),
        ({"window": 4}, "only rule 'omega' has a window"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_bad_configurations_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        LinearConfig(IN, OUT, **settings)


def test_bad_shapes_are_named():
    key, value, rate, retain, query = tokens()
    with pytest.raises(UserError, match="value has the shape"):
        memory("dgd")(key, key, rate, retain, query)
    with pytest.raises(UserError, match="state holds 2 streams"):
        memory("dgd")(key, value, rate, retain, query, memory("dgd").init_state(2))
