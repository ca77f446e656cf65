"""Which implementation of the inner loop runs, and why.

    reference  chunk by chunk, differentiated by autograd (`dgd_chunk.py`): everything, higher derivatives too
    native     the same in C++ (`native/`): CPUs with a C++ compiler, which is run once
    torch      all chunks as one function with a backward pass by hand (`inner_loop.py`): any device, float32, float64
    triton     the same as two GPU kernels (`kernels/`): on CPU only in Triton's interpreter, to test them

The first of torch, reference that can run what is asked is used; NESTLEARN_KERNELS forces one, and it is an error if
that one cannot. Triton is to be the first choice on GPUs (TRITON_FIRST) once its checks in benchmarks/gpu.py have
passed on one; so far the kernels have run in the interpreter only, so there they must be asked for.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from nestlearn.errors import UserError, suggest
from nestlearn.ops.inner_chunk import LoopSpec
from nestlearn.ops.inner_loop import LoopInputs, LoopState, LoopTrained, inner_loop

NAMES = ("reference", "torch", "native", "triton")
VARIABLE = "NESTLEARN_KERNELS"
# What the Triton kernels are written for: tiles of one head must find room in one multiprocessor.
TRITON_LIMITS = {"head_width": 128, "hidden_width": 256, "chunk": 128}
TRITON_FIRST = False

Loop = Callable[[LoopInputs, LoopState, LoopTrained, LoopSpec], tuple[Tensor, LoopState]]


class Task(NamedTuple):
    """What is to be run.

    dtype   of the inner loop: float32 or float64;  operands  what the GPU's products may read: that or bfloat16
    only_steps  why only the reference can run it, None where it is not alone
    read        "before" or "after" a token's own write
    """

    device: torch.device
    dtype: torch.dtype
    operands: torch.dtype
    head_width: int
    hidden_width: int
    chunk: int
    only_steps: str | None = None
    read: str = "before"


class Choice(NamedTuple):
    """An implementation's name, why it runs, and what could not run before it."""

    name: str
    why: str
    passed: tuple[str, ...] = ()


def choose(task: Task) -> Choice:
    """The implementation for ``task``; UserError where a forced one cannot run it."""
    named = forced()
    if named is not None:
        limit = limit_of(named, task)
        if limit is not None:
            raise UserError(f"{VARIABLE}={named} is forced, but {limit}: unset {VARIABLE} or change what is asked")
        return Choice(named, f"{VARIABLE}={named}")
    passed = []
    for name in preferred(task.device):
        limit = limit_of(name, task)
        if limit is None:
            return Choice(name, f"first choice on {task.device.type}" if not passed else passed[0], tuple(passed))
        passed.append(f"{name}: {limit}")
    raise AssertionError("the reference runs everything")


def forced() -> str | None:
    """What NESTLEARN_KERNELS names, None where it is unset or empty."""
    named = os.environ.get(VARIABLE) or None
    if named is not None and named not in NAMES:
        raise UserError(f"{VARIABLE} is {named!r}, must be one of {list(NAMES)}{suggest(named, NAMES)}")
    return named


@contextmanager
def forcing(name: str) -> Iterator[None]:
    """As if NESTLEARN_KERNELS named ``name``."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})


def preferred(device: torch.device) -> tuple[str, ...]:
    """In the order they are tried."""
    if device.type == "cpu":
        return ("native", "torch", "reference")
    return ("triton", "torch", "reference") if TRITON_FIRST and device.type == "cuda" else ("torch", "reference")


def limit_of(name: str, task: Task) -> str | None:
    """Which limit keeps an implementation from a task, None where nothing does."""
    if name == "reference":
        return None
    if task.only_steps is not None:
        return task.only_steps
    if name == "native":
        return _native_limit(task)
    return _triton_limit(task) if name == "triton" else None


def _native_limit(task: Task) -> str | None:
    if task.device.type != "cpu":
        return f"the C++ loop runs on CPUs, not on {task.device.type}"
    if task.read == "after":
        return "read is 'after', the C++ loop reads before the write only"
    return native_missing()


@torch.compiler.assume_constant_result  # compiled code asks when it is compiled
def native_missing() -> str | None:
    """Why the C++ loop cannot run here, None where it can; it is compiled when this is asked for the first time."""
    from nestlearn.ops.native.build import missing

    return missing()


def _triton_limit(task: Task) -> str | None:
    missing = triton_missing(task.device)
    if missing is not None:
        return missing
    if task.dtype != torch.float32:
        return f"the Triton kernels have no {str(task.dtype).removeprefix('torch.')} (float32 states only)"
    if task.read == "after":
        return "read is 'after', the Triton kernels read before the write only"
    for name, most in TRITON_LIMITS.items():
        if getattr(task, name) > most:
            return f"the Triton kernels take {name} up to {most}, not {getattr(task, name)}"
    return None


def triton_missing(device: torch.device) -> str | None:
    """Why Triton cannot run on a device, None where it can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None if device.type == "cpu" else f"the Triton kernels do not run on {device.type}"
    return f"the Triton kernels need a GPU, not {device.type} (TRITON_INTERPRET=1 runs them on CPU, to test them)"


def loop_for(task: Task, *, quiet: bool = False) -> Loop | None:
    """The function that runs ``task``, None for the reference. What was passed over is said once, unless ``quiet``."""
    choice = choose(task)
    if choice.passed and not quiet:
        _say_once(f"{choice.passed[0]}; it runs as {choice.name!r}: slower, the same numbers")
    if choice.name == "triton":
        from nestlearn.ops.kernels.inner_loop import inner_loop as on_gpu

        return partial(on_gpu, operands=task.operands)
    if choice.name == "native":
        from nestlearn.ops.native.loop import inner_loop as on_cpu

        return on_cpu
    return inner_loop if choice.name == "torch" else None


@torch.compiler.assume_constant_result  # in compiled code it is said when that is compiled
def _say_once(message: str) -> None:
    _said(message)


@cache
def _said(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)
