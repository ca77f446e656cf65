"""The registry says what runs and why; a forced one that cannot run is an error; nothing is silent."""

import warnings

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.memory.self_modifying import SelfModifyingConfig, SelfModifyingMemory
from nestlearn.ops import registry
from nestlearn.ops.inner_loop import inner_loop
from nestlearn.ops.native import loop as native
from nestlearn.ops.registry import Task, choose, loop_for

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def task(device=CPU, dtype=torch.float32, head_width=64, hidden_width=64, chunk=64, only_steps=None, read="before"):
    return Task(device, dtype, dtype, head_width, hidden_width, chunk, only_steps, read)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.delenv("NESTLEARN_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    registry._said.cache_clear()


def test_cpu_runs_the_compiled_version_without_a_word():
    if registry.native_missing():
        pytest.skip(str(registry.native_missing()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loop_for(task()) is native.inner_loop
    assert choose(task()).why == "first choice on cpu"


def test_without_a_compiler_cpu_runs_the_torch_version_and_says_so(monkeypatch):
    monkeypatch.setattr(registry, "native_missing", lambda: "no C++ compiler was found")
    with pytest.warns(UserWarning, match="native: no C\\+\\+ compiler was found; it runs as 'torch'"):
        assert loop_for(task()) is inner_loop


def test_gpu_runs_triton_within_its_limits_once_that_is_the_first_choice(monkeypatch):
    pytest.importorskip("triton")
    assert choose(task(GPU)).name == "torch"
    monkeypatch.setattr(registry, "TRITON_FIRST", True)
    assert choose(task(GPU)).name == "triton"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"head_width": 256}, "head_width up to 128, not 256"),
        ({"hidden_width": 512}, "hidden_width up to 256, not 512"),
        ({"chunk": 256}, "chunk up to 128, not 256"),
        ({"dtype": torch.float64}, "no float64"),
        ({"read": "after"}, "read before the write only"),
    ],
)
def test_a_limit_is_named_once_with_what_runs_instead(given, words, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(registry, "TRITON_FIRST", True)
    with pytest.warns(UserWarning, match=words) as said:
        assert loop_for(task(GPU, **given)) is inner_loop
    assert "runs as 'torch'" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop_for(task(GPU, **given))


def test_what_only_the_reference_can_do_goes_there():
    with pytest.warns(UserWarning, match="dgd is False.*runs as 'reference'"):
        assert loop_for(task(only_steps="dgd is False")) is None


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("triton", {}, "need a GPU, not cpu"),
        ("triton", {"device": GPU, "chunk": 200}, "chunk up to 128, not 200"),
        ("torch", {"only_steps": "detach_writes is True"}, "detach_writes is True"),
        ("native", {"read": "after"}, "reads before the write only"),
        ("native", {"device": GPU}, "runs on CPUs, not on cuda"),
        ("trito", {}, "did you mean 'triton'"),
    ],
)
def test_a_forced_implementation_that_cannot_run_is_an_error(monkeypatch, name, given, words):
    pytest.importorskip("triton")
    monkeypatch.setenv("NESTLEARN_KERNELS", name)
    with pytest.raises(UserError, match=words):
        choose(task(**given))


def test_forcing_changes_what_the_memory_runs(monkeypatch):
    config = SelfModifyingConfig(8, 8, heads=2, chunk=4)
    memory, x = SelfModifyingMemory(config), torch.randn(1, 9, 2, 8)
    calls = []
    monkeypatch.setattr(registry, "inner_loop", lambda *given: calls.append("torch") or inner_loop(*given))
    monkeypatch.setenv("NESTLEARN_KERNELS", "torch")
    plain, _ = memory(x, x)
    assert calls == ["torch", "torch"]  # the whole chunks, then the short one
    monkeypatch.setenv("NESTLEARN_KERNELS", "reference")
    by_steps, _ = memory(x, x)
    assert len(calls) == 2
    torch.testing.assert_close(plain, by_steps)
    monkeypatch.setenv("NESTLEARN_KERNELS", "triton")
    with pytest.raises(UserError, match="NESTLEARN_KERNELS=triton is forced, but the Triton kernels need a GPU"):
        memory(x, x)
