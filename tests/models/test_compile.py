"""torch.compile takes every model whole, without a graph break, and finds the same numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.memory.self_modifying import SelfModifyingConfig, SelfModifyingMemory
from nestlearn.models.hope import MIXER_NAMES, mixers_in_turn

MEMORIES = [
    {},
    {"momentum": 0.6},
    {"objective": "mix", "retain_to": "initial", "retain_start": 0.9},
    {"adaptive": ("v", "q"), "momentum": 0.3, "read": "after"},
    {"retention": False, "adaptive": ()},
    {"dgd": False},
    {"memory_chunk": 4},
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(module, **options):
    return torch.compile(module, fullgraph=True, backend="aot_eager", **options)


def make_model(mixer):
    torch.manual_seed(0)
    layers = len(mixers_in_turn(mixer))
    shape = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 24}
    memory = {"chunk": 8} if mixer == "self_modifying" else None
    return HopeForCausalLM(HopeConfig(**shape, mixer=mixer, memory=memory, window=8, initializer_range=0.2))


def outcome(call, module, *given, gradients=True):
    """Every result, then every gradient of the sum of the results' squares."""
    leaves = [*(t for t in given if t.is_floating_point()), *module.parameters()]
    results = call(*given)
    if not gradients:
        return [t.detach() for t in results]
    found = torch.autograd.grad(sum(r.square().sum() for r in results), leaves, allow_unused=True)
    return [t.detach() for t in (*results, *found) if t is not None]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", MEMORIES, ids=str)
def test_a_memory_is_one_graph(settings):
    torch.manual_seed(0)
    config = SelfModifyingConfig(head_width=6, hidden_width=4, heads=2, chunk=8, rate_max=2.0, **settings)
    memory = SelfModifyingMemory(config)
    x, query = (torch.randn(2, 21, 2, 6, requires_grad=True) for _ in range(2))

    def call(x, query):
        y, state = memory(x, query)
        return y, state.w1, state.w2

    assert_equal(outcome(compiled(call), memory, x, query), outcome(call, memory, x, query))


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_a_model_is_one_graph(mixer):
    model, ids = make_model(mixer), torch.randint(0, 256, (2, 21))

    def call(ids):
        return (model(ids, use_cache=False).logits,)

    # with this backend, not with inductor, torch 2.13 views a gradient of mamba2's expanded keys and fails
    gradients = "mamba2" not in mixers_in_turn(mixer)
    assert_equal(
        outcome(compiled(call), model, ids, gradients=gradients), outcome(call, model, ids, gradients=gradients)
    )


def test_one_graph_serves_sequences_of_several_lengths():
    model, graphs = make_model("self_modifying"), []

    def count(graph, _):
        graphs.append(graph)
        return graph

    step = torch.compile(model, fullgraph=True, backend=count, dynamic=True)
    with torch.no_grad():
        for length in (16, 24, 40):  # whole chunks
            ids = torch.randint(0, 256, (2, length))
            assert torch.equal(step(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert len(graphs) == 1


def test_a_stream_is_decoded_without_compiling_at_every_position():
    model, graphs = make_model("self_modifying").eval(), []

    def count(graph, _):
        graphs.append(graph)
        return graph

    step = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        cache = other = model(torch.randint(0, 256, (2, 12)), use_cache=True).past_key_values
        for position in range(6):  # across the end of a chunk
            token = torch.full((2, 1), position)
            ours, theirs = (f(token, past_key_values=c, use_cache=True) for f, c in ((step, cache), (model, other)))
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
            cache, other = ours.past_key_values, theirs.past_key_values
    assert len(graphs) <= 2  # the second is for any position


def test_an_optimizer_step_moves_the_same():
    ends = []
    for compile_it in (False, True):
        model = make_model("self_modifying")
        call, ids = compiled(model) if compile_it else model, torch.arange(42).view(2, 21)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            F.cross_entropy(call(ids, use_cache=False).logits.mT, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(list(model.parameters()))
    assert_equal(*ends)
