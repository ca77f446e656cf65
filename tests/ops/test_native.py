"""The inner loop in C++ against the reference memory, differentiated by autograd, and what only it promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nestlearn.memory.self_modifying import SelfModifyingConfig
from nestlearn.ops.native import build, call
from nestlearn.ops.registry import forcing
from tests.ops.memories import memory_of

if build.missing():
    pytest.skip(str(build.missing()), allow_module_level=True)

BASE = SelfModifyingConfig(
    head_width=12, hidden_width=20, heads=2, chunk=16, rate_max=4.0, rate_start=0.4, retain_start=(0.97, 0.8),
    retain_to="initial", slow_rate_scale=0.5, w1_scale=0.5, w2_scale=2.0,
)  # fmt: skip
ALL = ("k", "v", "eta", "alpha", "q")
CASES: dict[str, tuple[SelfModifyingConfig, int]] = {  # configuration, tokens
    "hope": (BASE, 37),
    "momentum": (replace(BASE, momentum=0.7), 45),
    "momentum, forgets to zero": (replace(BASE, momentum=0.9, retain_to="zero"), 33),
    "l2, adaptive query": (replace(BASE, objective="l2", adaptive=ALL, heads=1), 19),
    "mix": (replace(BASE, objective="mix", momentum=0.5), 37),
    "static, letter": (replace(BASE, adaptive=("v",), target_norm="none", retention=False, rate_max=0.5, heads=1), 18),
    "nothing adapts, static query": (replace(BASE, adaptive=(), retention=False), 40),
    "forgets at once": (replace(BASE, retain_start=1e-4, momentum=0.6), 40),
    "one token a chunk": (replace(BASE, chunk=1, memory_chunk=1), 9),
    "one token": (BASE, 1),
    "chunks of 128": (replace(BASE, chunk=128, memory_chunk=128, heads=1), 150),
    "wide": (replace(BASE, head_width=128, hidden_width=256, heads=1), 20),
    "narrow": (replace(BASE, head_width=3, hidden_width=1), 20),
    "odd chunk": (replace(BASE, chunk=23, memory_chunk=23, momentum=0.5), 60),
}


def draw(config: SelfModifyingConfig, tokens: int, rows: int = 2) -> list[Tensor]:
    """x, query, value_input and the weights of the loss."""
    generator = torch.Generator().manual_seed(11)
    shape = (rows, tokens, config.heads, config.head_width)
    x, query, value, dy = (torch.randn(shape, generator=generator, dtype=torch.double) for _ in range(4))
    return [x, torch.nn.functional.normalize(query, dim=-1), value, dy]


def pieces(length: int, cuts: tuple[int, ...]) -> list[slice]:
    edges = [0, *(c for c in cuts if c < length), length]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def outcome(
    config: SelfModifyingConfig,
    dtype: torch.dtype,
    given: list[Tensor],
    name: str = "native",
    cuts: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """Output, end of the state and the gradients of every input and parameter, of a stream read in pieces."""
    memory = memory_of(replace(config, recompute=name != "reference"), dtype)
    x, query, value, dy = (t.to(dtype) for t in given)
    leaves = [t.clone().requires_grad_() for t in (x, query, value)]
    out, state = [], None
    with forcing(name):
        for piece in pieces(x.shape[1], cuts):
            y, state = memory(leaves[0][:, piece], leaves[1][:, piece], state, leaves[2][:, piece])
            out.append(y)
    assert state is not None
    ends = {n: getattr(state, n) for n in ("w1", "w2", "m1", "m2")}
    if state.seen[0] % config.chunk:
        ends |= {n: getattr(state, n) for n in ("start1", "start2")}
    y = torch.cat(out, dim=1)
    ((y * dy).sum() + sum(t.square().sum() for t in ends.values())).backward()
    grads = {n: t.grad for n, t in zip(("dx", "dq", "dv"), leaves, strict=True)}
    grads |= {n: p.grad for n, p in memory.named_parameters()}
    return {n: t.detach() for n, t in {"y": y, **ends, **grads}.items() if t is not None}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cuts", [(), (16,), (7, 9, 36), (15,)])
def test_everything_equals_the_reference(case, cuts):
    config, tokens = CASES[case]
    given = draw(config, tokens)
    right = outcome(config, torch.float64, given, "reference", cuts)
    for dtype, most in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        found = outcome(config, dtype, given, cuts=cuts)
        assert found.keys() >= right.keys()
        for name, t in found.items():
            truth = right.get(name, torch.zeros_like(t))  # what autograd found unused
            assert (t.double() - truth).norm() <= most * truth.norm() + 1e-12, (name, dtype)


@pytest.mark.parametrize("keep", [2, 4, "sqrt", "all"])
def test_what_is_kept_changes_no_bit(keep):
    config, given = replace(BASE, momentum=0.5), draw(BASE, 150)
    once, again = (outcome(replace(config, keep_every=k), torch.float32, given) for k in (1, keep))
    assert all(torch.equal(once[n], again[n]) for n in once)


def test_threads_and_rows_beside_it_change_no_bit():
    given, threads = draw(BASE, 50, rows=3), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = outcome(BASE, torch.float32, [t[1:2] for t in given])
        together = outcome(BASE, torch.float32, given)
        torch.set_num_threads(4)
        threaded = outcome(BASE, torch.float32, given)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(together[n], threaded[n]) for n in together)
    for name in ("y", "w1", "w2", "dx", "dq", "dv"):
        assert torch.equal(alone[name], together[name][1:2])


def test_what_is_not_finite_stays_in_its_row():
    x, query, value, dy = draw(BASE, 40)
    right = outcome(BASE, torch.float32, [x, query, value, dy])
    x[0, 7] = float("nan")
    found = outcome(BASE, torch.float32, [x, query, value, dy])
    assert found["y"][0, 8:].isnan().all() and found["w1"][0].isnan().any()
    assert all(torch.equal(found[n][1], right[n][1]) for n in ("y", "w1", "w2", "dx"))


def test_large_numbers_end_in_no_nan():
    x, query, value, dy = draw(BASE, 40)
    found = outcome(BASE, torch.float32, [x * 1e4, query * 1e4, value * 1e4, dy])
    assert all(t.isfinite().all() for t in found.values())


def test_only_first_derivatives_and_says_so():
    memory, (x, query, _, _) = memory_of(BASE, torch.float64), draw(BASE, 20)
    x.requires_grad_()
    with forcing("native"):
        y, _ = memory(x, query)
    with pytest.raises(RuntimeError, match="first derivatives only|recompute"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_no_compiler_and_a_failing_one_are_reasons(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    with pytest.raises(build.Unavailable, match="no C\\+\\+ compiler was found"):
        build.library.__wrapped__()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'x.cpp:1: error: out of sorts' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.Unavailable, match="could not compile the inner loop: x.cpp:1: error: out of sorts"):
        build.library.__wrapped__()
    assert not list((tmp_path / "nestlearn").iterdir())


def test_it_is_compiled_once_for_each_machine_and_source(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.__wrapped__()
    (made,) = (tmp_path / "nestlearn").iterdir()
    monkeypatch.setattr(build, "_compile", lambda *given: pytest.fail("compiled again"))
    build.library.__wrapped__()
    assert made.exists()


def test_a_tensor_of_another_dtype_is_refused_before_it_is_read():
    memory = memory_of(BASE, torch.float32)
    memory.rate_read.weight.data = memory.rate_read.weight.data.double()
    x = torch.randn(1, 5, 2, 12)
    with forcing("native"), torch.no_grad():
        _, state = memory(x, x)
        with pytest.raises(TypeError, match="given torch.float64 on cpu, expected torch.float32"):
            memory(x[:, :1], x[:, :1], state)


def test_no_memory_to_work_in_is_said(monkeypatch):
    memory, x = memory_of(BASE, torch.float32), torch.randn(1, 5, 2, 12)
    monkeypatch.setattr(call, "function", lambda name, dtype: lambda *given: False)
    with forcing("native"), torch.no_grad(), pytest.raises(MemoryError, match="found no memory to work in"):
        memory(x, x)
