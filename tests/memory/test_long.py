"""What long sequences cost and where gradients stop: ``keep_every`` changes no number, ``truncate`` no output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.memory import SelfModifyingConfig, SelfModifyingMemory
from nestlearn.ops.inner_loop import storing
from tests.memory.test_recompute import outcome
from tests.memory.test_self_modifying import build, flat, scalar, tokens

LENGTH, CHUNK = 29, 4
CASES = [
    {"momentum": 0.0, "retain_to": "zero"},
    {"momentum": 0.6, "retain_to": "initial"},
    {"momentum": 0.6, "adaptive": ("v",), "retain_to": "initial"},
]


def made(**settings) -> SelfModifyingMemory:
    settings = {"objective": "l2", "target_norm": "l2", "scale": 0.8, "memory_chunk": CHUNK, **settings}
    return build(chunk=CHUNK, **settings)


def read(memory: SelfModifyingMemory, given, cuts, *, between=None) -> dict[str, Tensor]:
    """Outputs, end and gradients, the stream being read in pieces; ``between`` changes the state before each."""
    state, outputs = None, []
    for begin, end in zip(cuts, [*cuts[1:], LENGTH], strict=True):
        x, query, value_input = (t[:, begin:end] for t in given)
        if between is not None and state is not None:
            state = between(state)
        y, state = memory(x, query, state, value_input=value_input)
        outputs.append(y)
    assert state is not None
    results = flat(torch.cat(outputs, dim=1), state.weights, state.momenta)
    leaves = {"x": given[0], "query": given[1], "value_input": given[2], **dict(memory.named_parameters())}
    found = torch.autograd.grad(scalar(results), list(leaves.values()), materialize_grads=True)
    return results | {f"gradient of {name}": g for name, g in zip(leaves, found, strict=True)}


def inputs() -> list[Tensor]:
    return [t.requires_grad_() for t in tokens(2, LENGTH)]


def assert_equal(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name, value in right.items():
        assert (found[name] - value).norm() <= 1e-11 * (1 + value.norm()), name


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_truncated_gradients_are_those_of_a_state_detached_by_hand(settings, every, recompute):
    memory = made(**settings, truncate=every, recompute=recompute)
    plain = made(**settings, recompute=False)
    boundaries = list(range(0, LENGTH, every * CHUNK))
    right = read(plain, inputs(), boundaries, between=lambda state: plain.renewed(state.detach()))
    assert_equal(read(memory, inputs(), [0]), right)


def test_only_gradients_are_truncated():
    whole, cut = (read(made(truncate=n), inputs(), [0]) for n in (None, 2))
    for name, value in whole.items():
        if not name.startswith("gradient"):
            assert torch.equal(cut[name], value)
    assert not torch.allclose(cut["gradient of x"], whole["gradient of x"])
    assert_equal(read(made(truncate=100), inputs(), [0]), whole)


@pytest.mark.parametrize("cuts", [[0, 11, 16, 18], [0, 8, 16, 24], [0, *range(7, LENGTH)]], ids=str)
def test_a_stream_may_be_cut_anywhere(cuts):
    """Boundaries are counted from the start of the stream, whatever its pieces are, single tokens included."""
    settings = {"momentum": 0.6, "retain_to": "initial", "truncate": 2}
    assert_equal(read(made(**settings), inputs(), cuts), read(made(**settings), inputs(), [0]))


def test_rows_at_different_places():
    """Each row's boundaries are its own."""
    memory, given = made(truncate=2), tokens(2, LENGTH)
    x, query, value = given

    def gradient(rows, ends, together):
        heads = [memory(x[r : r + 1, :e], query[r : r + 1, :e], None, value[r : r + 1, :e])[1] for r, e in
                 zip(rows, ends, strict=True)]  # fmt: skip
        if together:
            state = type(heads[0]).cat(heads)
            y, _ = memory(x[:, 12:], query[:, 12:], state, value[:, 12:])
            total = y.square().sum()
        else:
            total = sum(
                memory(x[r : r + 1, 12:], query[r : r + 1, 12:], h, value[r : r + 1, 12:])[0].square().sum()
                for r, h in zip(rows, heads, strict=True)
            )
        return torch.autograd.grad(total, list(memory.parameters()), materialize_grads=True)

    for a, b in zip(gradient([0, 1], [8, 5], True), gradient([0, 1], [8, 5], False), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", [1, 3, 100, "sqrt", "all"])
def test_keeping_fewer_states_changes_no_number(keep):
    settings = {"momentum": 0.6, "chunk": 8, "memory_chunk": 8, "target_norm": "l2", "scale": 0.8}
    auto, found = (outcome(build(**settings, keep_every=k)) for k in ("auto", keep))
    for name, right in auto.items():
        assert (found[name] - right).norm() <= 1e-12 * (1 + right.norm()), name


def test_everything_kept_gives_the_same_bits_and_may_be_walked_twice():
    memory = build(momentum=0.6, chunk=8, memory_chunk=8, target_norm="l2", scale=0.8)
    x, query, value = tokens(2, LENGTH)

    def gradients() -> list[Tensor]:
        y: Tensor = memory(x, query, None, value)[0]
        loss = y.square().sum()
        first = torch.autograd.grad(loss, list(memory.parameters()), retain_graph=True, materialize_grads=True)
        again = torch.autograd.grad(loss, list(memory.parameters()), materialize_grads=True)
        assert all(map(torch.equal, first, again))
        return list(first)

    lean = gradients()
    with storing():
        assert all(map(torch.equal, lean, gradients()))


def test_keeping_fewer_states_takes_less_memory(monkeypatch):
    monkeypatch.setenv("NESTLEARN_KERNELS", "torch")  # C++ always runs chunks again

    def held(keep, length=LENGTH) -> int:
        sizes = []
        memory = build(chunk=2, memory_chunk=2, keep_every=keep)
        x, query, value = (t.requires_grad_() for t in tokens(2, length))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            memory(x, query, None, value)
        return sum(sizes)

    sizes = [held(keep) for keep in (1, 4, 16)]
    assert held("all") > sizes[0] > held("auto") == sizes[1] > sizes[2]
    lean, whole = (held("auto", 16), held("all", 16))
    with storing():  # the whole chunks of what is read: 14, and 8
        assert held("auto") < held("all")
        assert lean < held("auto", 16) == whole
    config = SelfModifyingConfig(2, 2, chunk=64, keep_every="sqrt")
    assert [config.kept_every(tokens) for tokens in (1, 64, 4096, 4097, 32768)] == [1, 1, 8, 8, 22]


@pytest.mark.parametrize("name", ["keep_every", "truncate"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "often"])
def test_bad_values_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        SelfModifyingConfig(2, 2, **{name: value})
