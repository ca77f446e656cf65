"""dgd_chunk and dgd_steps against the solved truth, and the laws of the recurrence."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlearn.errors import UserError
from nestlearn.ops.dgd_chunk import dgd_chunk, dgd_steps, dgd_write
from tests.oracles import dgd as oracle

ROUNDING = 1e-10


def case(batch=2, tokens=37, heads=2, width=5, out=4, retain_from=0.5, dtype=torch.float64, seed=0):
    """Arguments of dgd_chunk, momentum under way, retentions in (retain_from, 1), rates over 4 decades."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform() -> torch.Tensor:
        return torch.rand(batch, tokens, heads, generator=generator, dtype=torch.float64)

    maps = [random(batch, heads, out, width), 0.3 * random(batch, heads, out, width)]
    rows = [random(batch, tokens, heads, width), random(batch, tokens, heads, out)]
    gates = [10 ** (4 * uniform() - 2), retain_from + (1 - retain_from) * uniform()]
    return [t.to(dtype) for t in (*maps, *rows, *gates, random(batch, tokens, heads, width))]


def relative_error(ours, truth) -> float:
    return max(((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(ours, truth, strict=True))


def largest_error(ours, truth) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("mu", [0.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 4, 7, 16, 37, 64])
def test_chunks_equal_the_truth(chunk, mu):
    arguments = case()
    assert largest_error(dgd_chunk(*arguments, mu=mu, chunk=chunk), oracle.run(*arguments, mu=mu)) <= ROUNDING


@pytest.mark.parametrize("mu", [0.0, 0.6])
def test_steps_equal_the_truth(mu):
    arguments = case()
    assert largest_error(dgd_steps(*arguments, mu=mu), oracle.run(*arguments, mu=mu)) <= ROUNDING


@pytest.mark.parametrize("mu", [0.0, 0.6])
@pytest.mark.parametrize("retain_from", [1e-4, 0.5, 1 - 1e-4])
def test_float32_stays_within_1e_4(mu, retain_from):
    arguments = case(tokens=131, retain_from=retain_from)
    truth = oracle.run(*arguments, mu=mu)
    single = [t.float() for t in arguments]
    assert relative_error([t.double() for t in dgd_chunk(*single, mu=mu, chunk=64)], truth) <= 1e-4
    assert relative_error([t.double() for t in dgd_steps(*single, mu=mu)], truth) <= 1e-4


@pytest.mark.parametrize("mu", [0.0, 0.6])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, ROUNDING), (torch.float32, 1e-4)])
def test_every_retention_at_1e_4_neither_overflows_nor_loses_digits(mu, dtype, bound):
    """64 tokens at 1e-4 leave 1e-256 of the state: a ratio formed by division would be 0/0."""
    arguments = case(tokens=100)
    arguments[5] = torch.full_like(arguments[5], 1e-4)
    ours = dgd_chunk(*[t.to(dtype) for t in arguments], mu=mu, chunk=64)
    assert relative_error([t.double() for t in ours], oracle.run(*arguments, mu=mu)) <= bound


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (3, 30, 3, 6, 6))),
    chunk=st.integers(1, 40),
    mu=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 2**20),
)
def test_any_shape(shape, chunk, mu, seed):
    arguments = case(*shape, seed=seed)
    results = dgd_chunk(*arguments, mu=mu, chunk=chunk)
    truth = oracle.run(*arguments, mu=mu)
    assert [r.shape for r in results] == [t.shape for t in truth]
    assert largest_error(results, truth) <= 1e-8  # absolute, and at mu = 0.9 the reads are large


@pytest.mark.parametrize("mu", [0.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_gradcheck(chunk, mu):
    arguments = [t.requires_grad_() for t in case(batch=1, tokens=5, heads=1, width=3, out=2)]
    assert torch.autograd.gradcheck(partial(dgd_chunk, mu=mu, chunk=chunk), arguments)


@pytest.mark.parametrize("mu", [0.0, 0.6])
def test_gradients_equal_the_truths(mu):
    arguments = [t.requires_grad_() for t in case(tokens=21)]
    ours = torch.autograd.grad(scalar(dgd_chunk(*arguments, mu=mu, chunk=8)), arguments, materialize_grads=True)
    truth = torch.autograd.grad(scalar(oracle.run(*arguments, mu=mu)), arguments, materialize_grads=True)
    assert relative_error(ours, truth) <= ROUNDING


def scalar(results) -> torch.Tensor:
    """A number on which every entry has its own influence."""
    return sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in results)


@pytest.mark.parametrize("mu", [0.0, 0.6])
@pytest.mark.parametrize("token", [0, 7, 8, 22, 36])
def test_causality(token, mu):
    """A token's write changes no read up to and including its own, and every read after it."""
    arguments = case()
    changed = [t.clone() for t in arguments]
    for index in (2, 3, 4, 5):
        changed[index][:, token] *= 0.7
    before, after = (dgd_chunk(*a, mu=mu, chunk=8)[0] for a in (arguments, changed))
    difference = (before - after).abs().amax(dim=(0, 2, 3))
    assert difference[: token + 1].max() <= 1e-13
    assert (difference[token + 1 :] > 1e-12).all()


@pytest.mark.parametrize("mu", [0.0, 0.6])
@pytest.mark.parametrize("cut", [1, 5, 8, 16, 36])
def test_a_stream_may_be_cut_anywhere(cut, mu):
    state, momentum, *tokens = case()
    whole = dgd_chunk(state, momentum, *tokens, mu=mu, chunk=8)
    first, *carried = dgd_chunk(state, momentum, *(t[:, :cut] for t in tokens), mu=mu, chunk=8)
    second, *carried = dgd_chunk(*carried, *(t[:, cut:] for t in tokens), mu=mu, chunk=8)
    assert largest_error((torch.cat([first, second], dim=1), *carried), whole) <= 1e-12


def test_batch_rows_and_heads_are_independent():
    arguments = case(batch=3)
    whole = dgd_chunk(*arguments, mu=0.6, chunk=8)
    for row in range(3):
        alone = dgd_chunk(*(t[row : row + 1] for t in arguments), mu=0.6, chunk=8)
        assert largest_error(alone, [t[row : row + 1] for t in whole]) <= 1e-12
    state, momentum, *tokens = arguments
    alone = dgd_chunk(state[:, 1:], momentum[:, 1:], *(t[:, :, 1:] for t in tokens), mu=0.6, chunk=8)
    assert largest_error(alone, (whole[0][:, :, 1:], whole[1][:, 1:], whole[2][:, 1:])) <= 1e-12


def test_a_huge_rate_stores_orthonormal_keys_exactly():
    """With error −v and gain 1/‖k‖², S k = v: the consistent pair is a delta rule."""
    state, momentum, _, values, rate, retain, _ = case(tokens=5, width=5)
    keys = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0].expand(2, 2, 5, 5).transpose(1, 2)
    write = (keys, -values, torch.full_like(rate, 1e12), torch.ones_like(retain))
    _, state, _ = dgd_chunk(state, momentum, *write, keys, mu=0.0, chunk=3)
    read = torch.einsum("bhoi,bthi->btho", state, keys)
    assert torch.allclose(read, values, atol=1e-9)


@pytest.mark.parametrize("rate", [1e-6, 1.0, 1e6])
def test_bounded_for_every_rate(rate):
    """Unit keys and values, 3,000 tokens, no forgetting: each write is a contraction towards a bounded target."""
    state, momentum, keys, values, rates, retain, query = case(tokens=3000, dtype=torch.float32)
    keys, values = (torch.nn.functional.normalize(t, dim=-1) for t in (keys, values))
    write = (keys, -values, torch.full_like(rates, rate), torch.ones_like(retain))
    _, end, _ = dgd_chunk(torch.zeros_like(state), torch.zeros_like(momentum), *write, query, mu=0.0, chunk=64)
    assert end.norm(dim=(-2, -1)).max() < 3 * keys.shape[-1]


def test_one_write_is_one_step():
    state, momentum, inputs, errors, rate, retain, query = case(tokens=1)
    written = dgd_write(state, momentum, inputs[:, 0], errors[:, 0], rate[:, 0], retain[:, 0], 0.6)
    _, *stepped = oracle.run(state, momentum, inputs, errors, rate, retain, query, mu=0.6)
    assert largest_error(written, stepped) <= 1e-12


@pytest.mark.parametrize("bad, word", [({"chunk": 0, "mu": 0.0}, "chunk is 0"), ({"chunk": 4, "mu": 1.0}, "mu is 1")])
def test_bad_settings_name_the_value(bad, word):
    with pytest.raises(UserError, match=word):
        dgd_chunk(*case(), **bad)
