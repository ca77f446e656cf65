"""The HOPE block and the local convolution, written out again with nothing but torch's functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.memory import State
from nestlearn.models.memory_layer import CausalConv

WIDTH, EPS = 8, 1e-6


class KnownMixer(nn.Module):
    """A running sum of what it reads, so that order, norm and residual all show."""

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        return 0.3 * x.cumsum(1), State()


def normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def mlp(block: nn.Module, x: Tensor) -> Tensor:
    weights = {name.split(".")[0]: value for name, value in block.named_parameters()}
    return F.linear(F.silu(F.linear(x, weights["gate"])) * F.linear(x, weights["up"]), weights["down"])


@torch.no_grad()
@pytest.mark.parametrize("connection", ["sequential", "nested", "independent"])
def test_a_block_is_mixer_then_continuum(connection):
    torch.manual_seed(0)
    config = HopeConfig(
        hidden_size=WIDTH, num_attention_heads=2, num_hidden_layers=1, intermediate_size=12,
        levels=[1, 64], connection=connection, rms_norm_eps=EPS,
    )  # fmt: skip
    block = HopeForCausalLM(config).double().model.layers[0]
    block.mixer = KnownMixer()
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    o = x + 0.3 * (normed(x) * block.norm.weight).cumsum(1)
    fast, slow = block.cms.blocks.values()
    if connection == "independent":
        first, second = block.cms.weights
        expected = o + first * mlp(fast, normed(o)) + second * mlp(slow, normed(o))
    else:
        after_fast = o + mlp(fast, normed(o))
        expected = after_fast + mlp(slow, normed(after_fast))
    assert (block(x)[0] - expected).abs().max() <= 1e-11


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_convolution_is_depthwise_and_causal_and_streams(width):
    torch.manual_seed(0)
    conv = CausalConv(3, width).double()
    x = torch.randn(2, 11, 3, dtype=torch.float64)
    kernel = conv.weight.T[:, None]  # (channels, 1, width), the last entry on the current token
    expected = F.conv1d(F.pad(x.mT, (width - 1, 0)), kernel, groups=3).mT
    tail = conv.init_tail(2, x.dtype, x.device)
    assert (conv(x, tail)[0] - expected).abs().max() <= 1e-12
    outputs = []
    for piece in x.split([1, 1, 4, 5], dim=1):
        output, tail = conv(piece, tail)
        outputs.append(output)
    assert (torch.cat(outputs, dim=1) - expected).abs().max() <= 1e-12 and tail.shape == (2, width - 1, 3)


def test_the_tail_of_a_long_input_is_not_a_view_of_it():
    """A state that is kept must not keep the sequence."""
    conv = CausalConv(3, 4)
    x = torch.randn(1, 100, 3)
    _, tail = conv(x, conv.init_tail(1, x.dtype, x.device))
    assert tail.untyped_storage().nbytes() == 3 * 3 * 4 and torch.equal(tail, x[:, -3:])
