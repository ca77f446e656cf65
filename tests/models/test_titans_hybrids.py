"""Window attention and the three Titans with attention, written out token by token and segment by segment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn import HopeConfig
from nestlearn.errors import UserError
from nestlearn.memory.titans import TitansConfig
from nestlearn.models.baselines import TitansLayer
from nestlearn.models.titans_hybrids import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from nestlearn.models.window_attention import WindowAttention
from tests.oracles import linear_attention, window_attention

BATCH, TOKENS, HEADS, WIDTH, SEGMENT, EPS, THETA = 2, 23, 2, 8, 5, 1e-6, 500.0
HEAD = WIDTH // HEADS


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attention(window: int, persistent: int = 3) -> WindowAttention:
    torch.manual_seed(0)
    return WindowAttention(WIDTH, HEADS, window=window, persistent=persistent, rope_theta=THETA).double()


@torch.no_grad()
def attended(made: WindowAttention, sources: list[Tensor]) -> Tensor:
    """By the oracle, every row and head by itself; the first source asks."""
    asks, keys, values = (w.view(HEADS, HEAD, WIDTH) for w in made.project.weight.chunk(3))
    outputs = torch.empty(BATCH, sources[0].shape[1], HEADS, HEAD, dtype=torch.float64)
    for b in range(BATCH):
        for h in range(HEADS):
            query = linear_attention.rotated(sources[0][b] @ asks[h].T, THETA)
            brought = [(linear_attention.rotated(s[b] @ keys[h].T, THETA), s[b] @ values[h].T) for s in sources]
            lasting = (made.persistent @ keys[h].T, made.persistent @ values[h].T)
            outputs[b, :, h] = window_attention.run(query, brought, lasting, made.window)
    return F.linear(outputs.flatten(-2), made.out.weight)


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize("recalled", [False, True])
def test_window_attention_sees_what_it_may(window, recalled):
    made, sources = attention(window), [tokens(), tokens(1)][: 1 + recalled]
    y, state = made(sources[0], None, sources[1] if recalled else None)
    assert (y - attended(made, sources)).abs().max() <= 1e-6  # the angles are float32
    assert state.key.shape == (BATCH, HEADS, 1 + recalled, window - 1, HEAD)


@torch.no_grad()
def test_a_token_beyond_the_window_is_forgotten():
    made, x = attention(4), tokens()
    other = x.clone()
    other[:, 3] += 1
    moved = (made(x)[0] - made(other)[0]).abs().amax((0, 2))
    assert (moved[3:7] > 1e-3).all() and moved[7:].max() == 0 == moved[:3].max()


@torch.no_grad()
def hybrid(kind: type, window: int = 4) -> nn.Module:
    titans = TitansLayer(WIDTH, TitansConfig(HEAD, 6, HEADS, SEGMENT), conv_width=3, eps=EPS)
    made = kind(attention(window), titans, WIDTH, EPS).double()
    for parameter in made.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    return made


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def gated(made: nn.Module, y: Tensor, m: Tensor) -> Tensor:
    return normed(y, made.norm.weight) * torch.sigmoid(normed(m, made.gate_norm.weight))


@torch.no_grad()
def test_memory_as_a_gate():
    made, x = hybrid(MemoryAsGate), tokens()
    expected = gated(made, attended(made.attention, [x]), made.titans(x)[0])
    assert (made(x)[0] - expected).abs().max() <= 1e-6


@torch.no_grad()
def test_memory_as_a_layer():
    made, x = hybrid(MemoryAsLayer), tokens()
    m = made.titans(x)[0]
    expected = m + attended(made.attention, [normed(x + m, made.norm.weight)])
    assert (made(x)[0] - expected).abs().max() <= 1e-6


@torch.no_grad()
def test_memory_as_a_context():
    """Segment by segment: what is recalled, then attention over all so far, then the memory over all of y so far."""
    made, x = hybrid(MemoryAsContext), tokens()
    initial = made.titans.memory.initial
    w1, w2 = (w.expand(BATCH, *w.shape) for w in (initial.w1, initial.w2))
    recalled, y, m = x[:, :0], x[:, :0], x[:, :0]
    for begin in range(0, TOKENS, SEGMENT):
        q = F.linear(x[:, begin : begin + SEGMENT], made.ask.weight).unflatten(-1, (HEADS, HEAD))
        q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        inner = F.silu(torch.einsum("bhij,bthj->bthi", w2, q))
        recalled = torch.cat([recalled, torch.einsum("bhij,bthj->bthi", w1, inner).flatten(-2)], dim=1)
        y = attended(made.attention, [x[:, : begin + SEGMENT], recalled])
        m, state = made.titans(y)
        w1, w2 = state.memory.w1[:, 0], state.memory.w2[:, 0]
    assert (w1 - initial.w1).abs().max() > 1e-3
    assert (made(x)[0] - gated(made, y, m)).abs().max() <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", [MemoryAsContext, MemoryAsGate, MemoryAsLayer])
def test_the_memory_reaches_beyond_the_window(kind):
    made, x = hybrid(kind), tokens()
    other = x.clone()
    other[:, 0] += 1
    assert (made(x)[0] - made(other)[0])[:, -1].abs().max() > 1e-6


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="window is 0"):
        HopeConfig(mixer="titans_mag", window=0)
    with pytest.raises(UserError, match="must be even"):
        HopeConfig(mixer="titans_mac", hidden_size=12)
