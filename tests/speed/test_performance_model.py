"""The performance model's FLOPs are those that the model's products really make."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.performance_model import memory_flops, parts, training_flops
from nestlearn import HopeConfig, HopeForCausalLM


def in_place(total, a, b, out_shape=None, **kwargs):
    """torch counts baddbmm but not baddbmm_."""
    return 2 * a[0] * a[1] * a[2] * b[2]


def counted(config, tokens):
    """FLOPs per token of a forward pass, by torch's own counter."""
    model, ids = HopeForCausalLM(config), torch.zeros(2, tokens, dtype=torch.long)
    mapping = {torch.ops.aten.baddbmm_: in_place}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(ids, use_cache=False)
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize(
    "memory",
    [{}, {"momentum": 0.6, "hidden_width": 32, "retain_to": "zero"}, {"adaptive": ["k", "v", "eta", "alpha", "q"]}],
)
def test_flops_are_those_of_the_products(memory, monkeypatch):
    monkeypatch.setenv("NESTLEARN_KERNELS", "torch")  # torch's counter does not see into C++
    config = HopeConfig(
        hidden_size=128,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=256,
        levels=[1, 64],
        memory=memory,
    )
    # the convolution is elementwise here, so the counter does not see it
    expected = sum(part.flops for part in parts(config, tokens=256) if part.name != "convolution")
    assert counted(config, 256) == pytest.approx(expected, rel=0.03)
    assert training_flops(config, 256) == pytest.approx(3 * expected, rel=0.01)


def test_decoding_has_no_chunk_to_solve():
    config = HopeConfig(hidden_size=128, num_attention_heads=2)
    memory = config.memory_config()
    assert memory_flops(memory, 1)["solves"] < memory_flops(memory)["solves"] / 20
    whole, one = (sum(p.bytes for p in parts(config, tokens=4096, decode=d)) for d in (False, True))
    assert one > 10 * whole  # a chunk shares its state's traffic, a single token does not
