"""The deep memory against DGD on each layer, gradients by autograd of the stated objective, one token at a time."""

from __future__ import annotations

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.memory import DeepConfig, DeepMemory
from nestlearn.memory.deep import WriteRule

H, D, HIDDEN, T = 2, 5, 7, 21


def truth(memory, given, objective, momentum, chunk):
    """One row and head: reads, and the weights after the last token."""
    key, value, rate, retain, query = given
    w = [memory.initial.w1, memory.initial.w2]
    m = [torch.zeros_like(x) for x in w]
    reads, start = [], w
    for t in range(len(key)):
        if t % chunk == 0:
            start = w
        k, hidden = key[t], torch.nn.functional.silu(w[1] @ query[t])
        reads.append(query[t] + w[0] @ hidden)
        leaves = [x.detach().requires_grad_() for x in start]
        a = torch.nn.functional.silu(leaves[1] @ k)
        out = k + leaves[0] @ a
        loss = -(out * value[t]).sum() if objective == "dot" else 0.5 * (out - value[t]).square().sum()
        grads = torch.autograd.grad(loss, leaves)
        for i, x in enumerate((a.detach(), k)):
            gain = rate[t] / (1 + rate[t] * x @ x)
            m[i] = momentum * m[i] - gain * grads[i]
            w = [*w]
            w[i] = w[i] @ (retain[t] * torch.eye(len(x), dtype=x.dtype) - gain * torch.outer(x, x)) + m[i]
    return torch.stack(reads), w


def build(objective="dot", momentum=0.0, chunk=4):
    torch.manual_seed(0)
    rule = WriteRule(objective, momentum, target_norm="none")
    return DeepMemory(DeepConfig(D, HIDDEN, H, chunk, rule)).double()


def tokens(batch=2):
    torch.manual_seed(1)
    key, value, query = (torch.randn(batch, T, H, D, dtype=torch.float64) for _ in range(3))
    rate, retain = (
        torch.rand(batch, T, H, dtype=torch.float64),
        0.5 + 0.5 * torch.rand(batch, T, H, dtype=torch.float64),
    )
    return torch.nn.functional.normalize(key, dim=-1), value, rate, retain, query


@pytest.mark.parametrize("objective", ["dot", "l2"])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_equals_dgd_on_each_layer(objective, momentum, chunk):
    memory, given = build(objective, momentum, chunk), tokens()
    reads, state = memory(*given)
    for row, head in ((0, 0), (1, 1)):
        one = [t[row, :, head] for t in given]
        single = build(objective, momentum, chunk)
        single.initial.w1.data, single.initial.w2.data = memory.initial.w1.data[head], memory.initial.w2.data[head]
        expected, (w1, w2) = truth(single, one, objective, momentum, chunk)
        assert (reads[row, :, head] - expected).abs().max() <= 1e-10
        assert (state.weights["memory"].w1[row, head] - w1).abs().max() <= 1e-10
        assert (state.weights["memory"].w2[row, head] - w2).abs().max() <= 1e-10


def test_a_stream_may_be_cut_anywhere():
    memory, given = build(momentum=0.6), tokens()
    whole, _ = memory(*given)
    state, pieces = None, []
    for begin, end in ((0, 1), (1, 2), (2, 9), (9, 20), (20, 21)):
        read, state = memory(*(t[:, begin:end] for t in given), state)
        pieces.append(read)
    assert (torch.cat(pieces, dim=1) - whole).abs().max() <= 1e-12


def test_initial_weights_are_trained_through_the_writes():
    memory, given = build(), tokens()
    memory(*given)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in memory.parameters())


def test_the_mixed_objective_is_refused():
    with pytest.raises(UserError, match='choose "dot" or "l2" here'):
        build("mix")


def test_wrong_shapes_are_named():
    memory, (key, value, rate, retain, query) = build(), tokens()
    with pytest.raises(UserError, match="value has the shape"):
        memory(key, value[..., :2], rate, retain, query)
    with pytest.raises(UserError, match="rate has the shape"):
        memory(key, value, rate[..., :1], retain, query)


def test_a_retention_of_zero_stays_finite():
    memory, (key, value, rate, retain, query) = build(), tokens()
    reads, state = memory(key, value, rate, torch.zeros_like(retain), query)
    assert reads.isfinite().all() and all(t.isfinite().all() for t in state.tensors())


def test_the_state_of_other_streams_is_refused():
    memory, given = build(), tokens()
    with pytest.raises(UserError, match="state holds 3 streams but key has 2 rows"):
        memory(*given, memory.init_state(3))
