"""The self-modifying memory against the truth that differentiates its objectives, token by token.

Laws (streaming, forks, bounds) are in test_self_modifying_laws.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.memory import SelfModifyingConfig, SelfModifyingMemory
from tests.oracles import self_modifying as oracle

SLOW = ("k", "v", "eta", "alpha")
WIDTH, HIDDEN, HEADS = 4, 5, 2
LETTER = {
    "chunk": 16,
    "memory_chunk": 4,
    "rate_max": 0.3,
    "momentum": 0.6,
    "objective": "l2",
    "target_norm": "none",
    "adaptive": SLOW,
    "retain_to": "zero",
    "retention": True,
    "dgd": True,
}


def build(heads: int = HEADS, width: int = WIDTH, hidden: int = HIDDEN, seed: int = 0, scale: float = 1.0, **settings):
    """A float64 memory in which every parameter matters, α is about 0.9 and rates differ per memory by ``scale``."""
    torch.manual_seed(seed)
    config = SelfModifyingConfig(head_width=width, hidden_width=hidden, heads=heads, **{**LETTER, **settings})
    memory = SelfModifyingMemory(config).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, dtype=torch.float64))
        memory.retain_read.bias += 2.0
        for number, rate_scale in enumerate(memory.rate_scale.values()):
            rate_scale.fill_((-1) ** number * scale ** (number + 1))
    return memory


def tokens(
    batch: int, length: int, heads: int = HEADS, width: int = WIDTH, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """x, query (normalised), value_input."""
    generator = torch.Generator().manual_seed(seed)
    x, query, value = (
        torch.randn(batch, length, heads, width, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return x, torch.nn.functional.normalize(query, dim=-1), value


def settings_and_parameters(memory: SelfModifyingMemory) -> tuple[oracle.Setting, dict]:
    """What the truth needs to know, as plain values and dicts of the memory's own tensors."""
    setting = oracle.Setting(**{name: getattr(memory.config, name) for name in oracle.Setting.__dataclass_fields__})
    return setting, {
        "initial": {name: {"w1": network.w1, "w2": network.w2} for name, network in memory.initial.items()},
        "rate_weight": memory.rate_read.weight,
        "rate_bias": memory.rate_read.bias,
        "retain_weight": memory.retain_read.weight,
        "retain_bias": memory.retain_read.bias,
        "rate_scale": dict(memory.rate_scale.items()),
        "mix": {name: mix.logits for name, mix in memory.mix.items()},
    }


def truth(memory: SelfModifyingMemory, x: Tensor, query: Tensor, value_input: Tensor | None = None):
    setting, parameters = settings_and_parameters(memory)
    return oracle.run(x, query, parameters, setting, value_input)


def flat(y: Tensor, weights, momenta) -> dict[str, Tensor]:
    """Output and both layers of everything that is left at the end, by name; ours or the truth's."""

    def layer(network, name):
        return network[name] if isinstance(network, dict) else getattr(network, name)

    found = {"y": y}
    for kind, tree in (("weights", weights), ("momenta", momenta)):
        found |= {f"{kind} {n} {w}": layer(tree[n], w) for n in sorted(tree) for w in ("w1", "w2")}
    return found


def compare(
    memory: SelfModifyingMemory, length: int, batch: int = 1, bound: float = 1e-10, single: float = 1e-4
) -> None:
    """float64 within ``bound`` of the truth, float32 within ``single`` of it, relatively; outputs and final state."""
    x, query, value_input = tokens(batch, length, memory.config.heads, memory.config.head_width)
    with torch.no_grad():
        expected = flat(*truth(memory, x, query, value_input))
        y, state = memory(x, query, memory.init_state(batch), value_input=value_input)
        for name, ours in flat(y, state.weights, state.momenta).items():
            assert (ours - expected[name]).abs().max() <= bound, name
        memory.float()
        y, state = memory(x.float(), query.float(), memory.init_state(batch), value_input=value_input.float())
        for name, ours in flat(y, state.weights, state.momenta).items():
            error = (ours.double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
            assert error <= single, name


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("objective", ["l2", "dot", "mix"])
@pytest.mark.parametrize("chunk, memory_chunk", [(1, 1), (16, 4), (16, 16), (64, 8)])
def test_equals_the_truth(chunk, memory_chunk, objective, momentum):
    memory = build(chunk=chunk, memory_chunk=memory_chunk, objective=objective, momentum=momentum)
    compare(memory, length=75 if chunk == 64 else 37)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize(
    "change",
    [
        {"target_norm": "l2"},
        {"objective": "dot", "target_norm": "l2", "rate_max": 8.0},
        {"retain_to": "initial"},
        {"retain_to": "initial", "dgd": False},
        {"dgd": False},
        {"retention": False, "target_norm": "l2"},
        {"adaptive": ()},
        {"adaptive": ("k",)},
        {"adaptive": ("eta", "v")},
        {"adaptive": ("alpha",), "memory_chunk": 16},
        {"adaptive": (*SLOW, "q"), "target_norm": "l2"},
        {"adaptive": ("q",)},
        {"scale": 0.7},
        {"scale": 0.7, "memory_chunk": 16},
        {"recompute": False},
        {"objective": "mix", "target_norm": "l2", "adaptive": ("eta", "v"), "retain_to": "initial"},
        {"objective": "mix", "dgd": False, "scale": 0.7},
        {"read": "after"},
        {"read": "after", "memory_chunk": 16, "scale": 0.7},
        {"read": "after", "memory_chunk": 16, "retain_to": "initial", "adaptive": ("k", "q")},
        {"read": "after", "chunk": 1, "memory_chunk": 1},
        {"read": "after", "dgd": False, "retention": False, "target_norm": "l2"},
    ],
    ids=str,
)
def test_every_switch_equals_the_truth(change, momentum):
    compare(build(momentum=momentum, **change), length=37)


def test_batches_and_a_default_value_input_equal_the_truth():
    memory = build()
    x, query, _ = tokens(3, 21)
    with torch.no_grad():
        expected = flat(*truth(memory, x, query))
        y, state = memory(x, query, memory.init_state(batch=3))
        fresh, _ = memory(x, query)
    assert torch.equal(y, fresh)
    for name, ours in flat(y, state.weights, state.momenta).items():
        assert (ours - expected[name]).abs().max() <= 1e-10, name


def scalar(results: dict[str, Tensor]) -> Tensor:
    """A number on which every entry of output and final state has its own influence."""
    return sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in results.values())


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"objective": "dot", "target_norm": "l2"},
        {"momentum": 0.0, "memory_chunk": 16},
        {"retain_to": "initial", "adaptive": ("k", "alpha")},
        {"dgd": False, "adaptive": (*SLOW, "q")},
        {"objective": "mix", "target_norm": "l2", "adaptive": ("k", "alpha")},
        {"read": "after", "memory_chunk": 16},
        {"read": "after", "memory_chunk": 16, "momentum": 0.0, "retain_to": "initial"},
    ],
    ids=str,
)
def test_gradients_equal_the_truths(change, recompute):
    """Of every parameter and every input, through output and final state: trained through the inner updates."""
    memory = build(**{"scale": 0.8, "recompute": recompute, **change})
    given = [t.requires_grad_() for t in tokens(1, 37)]
    leaves = [*given, *memory.parameters()]
    expected = torch.autograd.grad(scalar(flat(*truth(memory, *given))), leaves, materialize_grads=True)
    y, state = memory(given[0], given[1], None, value_input=given[2])
    found = torch.autograd.grad(scalar(flat(y, state.weights, state.momenta)), leaves, materialize_grads=True)
    names = ["x", "query", "value_input", *(name for name, _ in memory.named_parameters())]
    for name, ours, right in zip(names, found, expected, strict=True):
        assert (ours - right).norm() <= 1e-10 * (1 + right.norm()), name


@pytest.mark.parametrize(
    "chunk, memory_chunk, objective, target_norm, retain_to",
    [
        (4, 2, "l2", "none", "zero"),
        (4, 2, "dot", "l2", "initial"),
        (3, 3, "dot", "l2", "zero"),
        (3, 3, "l2", "none", "initial"),
        (2, 1, "mix", "l2", "zero"),
    ],
)
def test_gradcheck_through_everything(chunk, memory_chunk, objective, target_norm, retain_to):
    """Finite differences on every initial state, read-out, rate scale and input."""
    memory = build(
        heads=1, width=2, hidden=3, chunk=chunk, memory_chunk=memory_chunk, scale=0.9,
        objective=objective, target_norm=target_norm, retain_to=retain_to,
    )  # fmt: skip
    given = [t.requires_grad_() for t in tokens(1, 6, heads=1, width=2)]
    names = [name for name, _ in memory.named_parameters()]

    def run(x, query, value_input, *parameters):
        replaced = dict(zip(names, parameters, strict=True))
        y, state = torch.func.functional_call(memory, replaced, (x, query), {"value_input": value_input})
        return tuple(flat(y, state.weights, state.momenta).values())

    assert torch.autograd.gradcheck(run, (*given, *memory.parameters()))


def test_gradients_of_every_parameter_are_not_zero():
    memory = build()
    x, query, value_input = tokens(2, 37)
    memory(x, query, value_input=value_input)[0].square().sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().min() > 0, name


def test_a_memory_that_does_not_adapt_stays_its_initial_state():
    memory = build(adaptive=("v",))
    x, query, _ = tokens(2, 37)
    _, state = memory(x, query)
    for name in ("k", "eta", "alpha"):
        for layer in ("w1", "w2"):
            initial = getattr(memory.initial[name], layer)
            assert torch.equal(getattr(state.weights[name], layer), initial.expand(2, *initial.shape))
            assert not getattr(state.momenta[name], layer).any()
    for name in ("v", "memory"):
        assert not torch.allclose(state.weights[name].w1, memory.initial[name].w1)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"chunk": 16, "memory_chunk": 5}, "multiple of memory_chunk"),
        ({"chunk": 0}, "chunk is 0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"rate_max": -1.0}, "rate_max is -1.0"),
        ({"objective": "dto"}, "did you mean 'dot'"),
        ({"target_norm": "l1"}, "target_norm is 'l1'"),
        ({"retain_to": "start"}, "retain_to is 'start'"),
        ({"adaptive": ("key",)}, "adaptive names 'key'"),
        ({"adaptive": "eta"}, "must be a list of names"),
        ({"adaptive": None}, "adaptive is None"),
        ({"rate_max": float("inf")}, "rate_max is inf"),
        ({"rate_max": "high"}, "rate_max is 'high', must be a number"),
        ({"chunk": 2.5}, "chunk is 2.5, must be a whole number"),
        ({"w1_scale": float("nan")}, "w1_scale is nan"),
        ({"retain_start": 1.0}, "retain_start is 1.0"),
        ({"retain_start": (0.9, 1.0)}, "must be between 0 and 1, both excluded, or a list"),
        ({"rate_start": ()}, "rate_start is .*or a list"),
        ({"dgd": "no"}, "dgd is 'no', must be True or False"),
        ({"mix_start": 1.0}, "mix_start is 1.0"),
        ({"read": "befor"}, "did you mean 'before'"),
    ],
)
def test_bad_configurations_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        build(**settings)


@pytest.mark.parametrize(
    "start, heads, expected",
    [
        (0.25, 3, [0.25, 0.25, 0.25]),
        ([0.5, 0.999], 1, [0.5]),
        ([0.5, 0.999], 3, [0.5, math.sqrt(999) / (1 + math.sqrt(999)), 0.999]),  # the mean of the logits
        ([0.9, 0.9, 0.9, 0.999], 4, [0.9, 0.9, 0.9, 0.999]),
        ([0.9, 0.9, 0.9, 0.999], 2, [0.9, 0.999]),
    ],
)
def test_several_starts_spread_the_heads_along_them(start, heads, expected):
    memory = build_heads(heads, rate_start=start, retain_start=start)
    for read in (memory.rate_read, memory.retain_read):
        assert torch.allclose(read.bias.sigmoid(), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("near, objective", [(1e-12, "dot"), (1 - 1e-12, "l2")])
def test_the_ends_of_the_mix_are_the_two_objectives(near, objective):
    x, query, _ = tokens(2, 21)
    mixed, pure = build(objective="mix", target_norm="l2"), build(objective=objective, target_norm="l2")
    mixed.load_state_dict(pure.state_dict(), strict=False)
    with torch.no_grad():
        for mix in mixed.mix.values():
            mix.logits.fill_(math.log(near / (1 - near)))
    assert (mixed(x, query)[0] - pure(x, query)[0]).abs().max() <= 1e-9


def test_the_mix_starts_where_it_is_told():
    memory = build_heads(2, objective="mix", mix_start=[0.25, 0.9], adaptive=("k",))
    assert sorted(memory.mix) == ["k", "memory"]
    for mix in memory.mix.values():
        assert torch.allclose(mix.logits.sigmoid(), torch.tensor([0.25, 0.9]))
    assert not build_heads(2).mix


def build_heads(heads: int, **settings) -> SelfModifyingMemory:
    return SelfModifyingMemory(SelfModifyingConfig(head_width=4, hidden_width=4, heads=heads, **settings))


@pytest.mark.parametrize("memory_chunk", [4, 16])
def test_a_read_after_the_write_is_that_of_the_next_token_before_its_own(memory_chunk):
    """With one query for all tokens and nothing normalised by position, y_t after is y_{t+1} before."""
    x, query, value = tokens(2, 37)
    query = query[:, :1].expand_as(query)
    before, after = (build(memory_chunk=memory_chunk, target_norm="l2", read=r) for r in ("before", "after"))
    with torch.no_grad():
        (y, _), (later, _) = (m(x, query, None, value_input=value) for m in (before, after))
    assert (later[:, :-1] - y[:, 1:]).abs().max() <= 1e-12 and (later - y).abs().max() > 1e-2


def test_bad_shapes_are_named():
    memory = build()
    x, query, _ = tokens(2, 5)
    with pytest.raises(UserError, match="query has the shape"):
        memory(x, query[:, :4])
    with pytest.raises(UserError, match="holds 3 streams"):
        memory(x, query, memory.init_state(batch=3))


@torch.no_grad()
@pytest.mark.parametrize("objective, dgd", [("dot", True), ("l2", True), ("l2", False), ("mix", True)])
def test_what_is_observed_equals_the_truth(objective, dgd):
    """At chunk 1 the weights before a token are its start: surprise, rates, α and norms follow from them."""
    memory = build(chunk=1, memory_chunk=1, objective=objective, dgd=dgd, target_norm="l2", scale=0.8)
    x, query, _ = tokens(1, 9)
    signals = memory.observe(x, query)
    setting, parameters = settings_and_parameters(memory)
    head, before = 1, memory.init_state(1)
    constants = oracle.one_head(parameters, head)
    for t in range(9):
        networks = {n: {"w1": w.w1[0, head], "w2": w.w2[0, head]} for n, w in before.weights.items()}
        key, value, rate, retain = oracle.step(x[0, t, head], x[0, t, head], networks, constants, setting)
        assert (signals.retain[0, 0, head, t] - retain).abs() <= 1e-10
        _, before = memory(x[:, t : t + 1], query[:, t : t + 1], before)
        for number, name in enumerate(signals.names):
            network, scale = networks[name], constants.rate_scale[name].abs()
            target = oracle.normalised(oracle.apply(network, value))
            inputs = oracle.layer_inputs(network, key)
            written = oracle.layer_errors(network, key, target, objective, constants.mix.get(name))["w1"]
            written = written + network["w1"] @ inputs["w1"] if dgd else written
            assert (signals.surprise[0, number, head, t] - written.norm()).abs() <= 1e-10
            assert (signals.rate[0, number, head, t] - rate * scale).abs() <= 1e-10
            after = torch.cat([w[0, head].flatten() for w in before.weights[name]])
            assert (signals.norm[0, number, head, t] - after.norm()).abs() <= 1e-10
