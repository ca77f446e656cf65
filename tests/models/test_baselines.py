"""The baselines against the forms of their papers and against transformers' Qwen3-Next."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.memory.linear import LinearConfig, LinearMemory
from nestlearn.memory.titans import TitansConfig
from nestlearn.models.baselines import DeltaNetLayer, GatedDeltaNetLayer, RetNetLayer, TitansLayer, TTTLayer
from tests.oracles import linear_attention as oracle
from tests.oracles import titans as titans_oracle

pure_torch = pytest.mark.skipif(
    importlib.util.find_spec("fla") is not None and not torch.cuda.is_available(),
    reason="transformers takes flash-linear-attention's kernels where it is installed, which need a GPU",
)
BATCH, TOKENS, HEADS, WIDTH = 2, 37, 4, 32
HEAD, THETA, EPS = WIDTH // HEADS, 500.0, 1e-6


def heads(t: Tensor) -> Tensor:
    return t.unflatten(-1, (HEADS, HEAD))


def normed(t: Tensor) -> Tensor:
    return t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt()


@torch.no_grad()
def layer(kind: type, **settings) -> nn.Module:
    """In float64, no weight as it was initialised."""
    torch.manual_seed(0)
    made = kind(WIDTH, eps=EPS, **settings).double()
    for parameter in made.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    return made


def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def read(key: Tensor, value: Tensor, query: Tensor, run) -> Tensor:
    """``run(query, key, value, row, head)`` on every row (T, H, d) and head."""
    return torch.stack(
        [
            torch.stack([run(*(t[row, :, h] for t in (query, key, value)), row, h) for h in range(HEADS)], dim=1)
            for row in range(len(key))
        ]
    )


def framed(made: nn.Module, x: Tensor, mix) -> Tensor:
    """The frame written out: ``mix(key, value, query)`` on split, convolved inputs."""
    key, value, query, gate = F.linear(x, made.project.weight).chunk(4, dim=-1)
    inputs = torch.cat([key, value, query], dim=-1)
    if made.conv is not None:
        kernel = made.conv.weight.T[:, None]
        inputs = F.conv1d(F.pad(inputs.mT, (kernel.shape[-1] - 1, 0)), kernel, groups=3 * WIDTH).mT
    y = mix(*(heads(t) for t in inputs.chunk(3, dim=-1)))
    y = y * (y.square().mean(-1, keepdim=True) + EPS).rsqrt() * made.norm.weight
    return F.linear(y.flatten(-2) * F.silu(gate), made.out.weight)


@torch.no_grad()
def test_retnet_is_its_parallel_form():
    made, x = (
        layer(RetNetLayer, heads=HEADS, chunk=8, rope_theta=THETA),
        tokens(),
    )

    def one(query: Tensor, key: Tensor, value: Tensor, row: int, head: int) -> Tensor:
        query, key = (oracle.rotated(t, THETA) for t in (query, key))
        return oracle.retention(query, key, value, 1 - 2.0 ** (-5 - head))

    truth = framed(made, x, lambda key, value, query: read(key, value, query, one))
    assert (made(x)[0] - truth).abs().max() <= 1e-6  # the angles are float32
    slower = framed(made, x, lambda k, v, q: read(k, v, q, lambda *given: one(*given[:4], given[4] + 1)))
    assert (made(x)[0] - slower).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", [DeltaNetLayer, GatedDeltaNetLayer])
def test_the_delta_nets_are_their_recurrent_form(kind):
    made, x = layer(kind, heads=HEADS, chunk=8, conv_width=4), tokens()
    beta = torch.sigmoid(F.linear(x, made.rate_read.weight, made.rate_read.bias))
    alpha = torch.ones_like(beta)
    if kind is GatedDeltaNetLayer:
        decay = made.decay
        alpha = torch.exp(-decay.log_speed.exp() * F.softplus(F.linear(x, decay.weight, decay.bias)))
        assert alpha.min() < 0.5

    def one(query: Tensor, key: Tensor, value: Tensor, row: int, head: int) -> Tensor:
        empty = torch.zeros(HEAD, HEAD, dtype=torch.float64)
        return oracle.gated_delta(query, key, value, alpha[row, :, head], beta[row, :, head], empty)[0]

    def mix(*inputs: Tensor) -> Tensor:
        key, value, query = (t * torch.sigmoid(t) for t in inputs)
        return read(normed(key), value, normed(query), one)

    assert (made(x)[0] - framed(made, x, mix)).abs().max() <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize("kind", [TitansLayer, TTTLayer])
def test_the_deep_memories_are_their_objective(kind):
    laws = {"inner_norm": True} if kind is TTTLayer else {"bounded": True, "retain_to": "initial"}
    config = TitansConfig(HEAD, 6, HEADS, chunk=8, **laws)
    made, x = layer(kind, conv_width=4, config=config), tokens()

    def gate(name: str, otherwise: float) -> Tensor:
        if not hasattr(made, name):
            return torch.full((BATCH, TOKENS, HEADS), otherwise, dtype=torch.float64)
        return torch.sigmoid(F.linear(x, getattr(made, name).weight, getattr(made, name).bias))

    momentum = gate("momentum_read", 0)
    gates = ((1 - momentum) * gate("rate_read", 0) / 8, gate("retain_read", 1), momentum)
    initial, norm = made.memory.initial, made.memory.norm

    def one(query: Tensor, key: Tensor, value: Tensor, row: int, head: int) -> Tensor:
        network = {"w1": initial.w1[head], "w2": initial.w2[head]}
        inner = norm and titans_oracle.Norm(norm.weight[head, 0], norm.bias[head, 0])
        given = (key, value, *(g[row, :, head] for g in gates), query)
        ours = kind is TitansLayer
        return titans_oracle.run(given, network, 8, inner, bounded=ours, anchored=ours)[0] - query

    def mix(*inputs: Tensor) -> Tensor:
        key, value, query = inputs if kind is TTTLayer else (F.silu(t) for t in inputs)
        return read(normed(key), value, normed(query), one)

    assert (made(x)[0] - framed(made, x, mix)).abs().max() <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize("bias", [-3.0, 0.0, 3.0])
def test_titans_stays_bounded_on_a_constant_stream_at_its_largest_rate(bias):
    """Identical tokens add up: without its bounds the explicit step would diverge."""
    torch.manual_seed(0)
    made = TitansLayer(WIDTH, TitansConfig(HEAD, HEAD, HEADS, chunk=32), conv_width=4, eps=EPS)
    made.rate_read.bias.fill_(10)
    made.momentum_read.bias.fill_(bias)
    _, state = made(torch.randn(1, 1, WIDTH).expand(1, 2000, WIDTH))
    assert max(state.memory.w1.abs().max(), state.memory.w2.abs().max()) < 10


@torch.no_grad()
@pytest.mark.parametrize("retain_to", ["initial", "zero"])
def test_a_titans_model_reads_on_with_weights_that_no_free_step_could_bear(retain_to):
    """Of a model, whose bound is on; with it off the same stream is not finite any more."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = HopeForCausalLM(HopeConfig(mixer="titans", memory={"chunk": 16, "retain_to": retain_to}, **sizes))
    layer = next(m for m in model.modules() if isinstance(m, TitansLayer))
    layer.rate_read.bias.fill_(10)
    for initial in layer.memory.initial.parameters():
        initial.mul_(8)
    text = torch.randint(256, (1, 4)).repeat(1, 300)
    assert layer.memory.config.retain_to == retain_to and model(text).logits.isfinite().all()
    layer.memory.config = replace(layer.memory.config, bounded=False)
    assert not model(text).logits.isfinite().all()


@pure_torch
@torch.no_grad()
@pytest.mark.parametrize("rule", ["delta", "gated_delta"])
@pytest.mark.parametrize("theirs", [qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule])
def test_the_memory_is_qwens_gated_delta_rule(rule, theirs):
    """From an empty memory and from a full one; "delta" with a decay of 0 in log space."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(BATCH, TOKENS, HEADS, HEAD) for _ in range(3))
    key, beta = normed(key), torch.rand(BATCH, TOKENS, HEADS)
    decay = -2 * torch.rand(BATCH, TOKENS, HEADS) if rule == "gated_delta" else torch.zeros(BATCH, TOKENS, HEADS)
    memory, state, full = LinearMemory(LinearConfig(HEAD, HEAD, HEADS, rule=rule, chunk=16)), None, None
    for _ in range(2):
        expected, full = theirs(query, key, value, g=decay, beta=beta, initial_state=full, output_final_state=True)
        y, state = memory(key, value, beta, decay.exp(), query * HEAD**-0.5, state)
        assert (y - expected).abs().max() <= 1e-5 and (state.weight - full.mT).abs().max() <= 1e-5


@pure_torch
@torch.no_grad()
def test_the_layer_is_qwens_gated_deltanet():
    config = Qwen3NextConfig(
        hidden_size=WIDTH, linear_num_key_heads=HEADS, linear_num_value_heads=HEADS, linear_key_head_dim=HEAD,
        linear_value_head_dim=HEAD, linear_conv_kernel_dim=4, num_hidden_layers=1, layer_types=["linear_attention"],
        rms_norm_eps=EPS,
    )  # fmt: skip
    made, theirs = (
        layer(GatedDeltaNetLayer, heads=HEADS, chunk=8, conv_width=4).float(),
        qwen.Qwen3NextGatedDeltaNet(config, 0),
    )
    key, value, query, gate = (w.view(HEADS, HEAD, WIDTH) for w in made.project.weight.chunk(4))
    theirs.in_proj_qkvz.weight.copy_(torch.cat([query, key, value, gate], dim=1).flatten(0, 1))
    made.rate_read.bias.zero_()  # theirs has none
    theirs.in_proj_ba.weight.copy_(torch.stack([made.rate_read.weight, made.decay.weight], dim=1).flatten(0, 1))
    key, value, query = made.conv.weight.chunk(3, dim=1)
    theirs.conv1d.weight.copy_(torch.cat([query, key, value], dim=1).T[:, None])
    for ours, weight in (
        (made.decay.bias, theirs.dt_bias), (made.decay.log_speed, theirs.A_log),
        (made.norm.weight, theirs.norm.weight), (made.out.weight, theirs.out_proj.weight),
    ):  # fmt: skip
        weight.copy_(ours)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    y = made(x)[0]
    assert y.std() > 0.1 and (y - theirs(x)).abs().max() <= 1e-5
