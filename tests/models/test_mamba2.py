"""The selective state space of Samba is transformers' Mamba 2 layer, weight for weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.models.mamba2 import Mamba2Layer

WIDTH, HEADS, KEYS, TOKENS = 32, 4, 12, 77


@torch.no_grad()
def pair(chunk: int) -> tuple[Mamba2Layer, nn.Module]:
    """Ours and theirs with the same weights, none as it was initialised; retention stays in what training knows."""
    torch.manual_seed(0)
    ours = Mamba2Layer(WIDTH, HEADS, KEYS, chunk=chunk, conv_width=4, eps=1e-5)
    for name, parameter in ours.named_parameters():
        parameter += (0.1 if "decay" in name else 0.3) * torch.randn_like(parameter)
    config = Mamba2Config(
        hidden_size=WIDTH, num_heads=HEADS, head_dim=2 * WIDTH // HEADS, state_size=KEYS, n_groups=1, expand=2,
        conv_kernel=4, use_bias=False, use_conv_bias=True, chunk_size=16, layer_norm_epsilon=1e-5, num_hidden_layers=1,
    )  # fmt: skip
    theirs: Any = Mamba2Mixer(config, layer_idx=0).eval()
    theirs.in_proj.weight.copy_(torch.cat([ours.project.weight, ours.decay.weight]))
    theirs.conv1d.weight.copy_(ours.conv.weight.T[:, None])
    theirs.conv1d.bias.copy_(ours.conv_bias)
    for their, our in (
        (theirs.dt_bias, ours.decay.bias), (theirs.A_log, ours.decay.log_speed), (theirs.D, ours.skip),
        (theirs.norm.weight, ours.norm.weight), (theirs.out_proj.weight, ours.out.weight),
    ):  # fmt: skip
        their.copy_(our)
    return ours, theirs


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_the_layer_is_transformers_mamba2(chunk):
    ours, theirs = pair(chunk)
    x = torch.randn(2, TOKENS, WIDTH)
    y = ours(x)[0]
    assert ours.decay(x).min() < 1e-2 and y.std() > 0.1 and (y - theirs(x)).abs().max() <= 1e-5


def test_the_gradients_are_theirs():
    ours, theirs = pair(16)
    x, towards = torch.randn(2, TOKENS, WIDTH), torch.randn(2, TOKENS, WIDTH)
    given = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for layer, inputs in zip((lambda t: ours(t)[0], theirs), given, strict=True):
        (layer(inputs) * towards).mean().backward()
    assert (given[0].grad - given[1].grad).abs().max() <= 1e-5 * given[1].grad.abs().max().clamp_min(1)
    slow = torch.cat([ours.project.weight.grad, ours.decay.weight.grad])
    for our, their in ((slow, theirs.in_proj.weight.grad), (ours.decay.log_speed.grad, theirs.A_log.grad)):
        assert their.abs().max() > 1e-4 and (our - their).abs().max() <= 1e-5 * max(1, their.abs().max())


def test_it_starts_with_memories_of_many_lengths():
    """Mamba 2's own ranges: A in [1, 16], Δ in [0.001, 0.1], s = 1, a convolution's bias of 0."""
    torch.manual_seed(0)
    layer = HopeForCausalLM(HopeConfig(mixer="mamba2", hidden_size=256, num_attention_heads=64)).model.layers[0].mixer
    step = nn.functional.softplus(layer.decay.bias)
    assert 1e-3 <= step.min() < 3e-3 and 0.03 < step.max() <= 0.1
    assert 1 <= layer.decay.log_speed.exp().min() < layer.decay.log_speed.exp().max() <= 16
    assert (layer.skip == 1).all() and not layer.conv_bias.any()
