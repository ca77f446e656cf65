"""How the C++ of this folder is called: structures, threads."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nestlearn.ops.native.build import library


def structure(name: str, fields: Mapping[Any, Any]) -> Any:
    """A C structure of these fields."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


@cache
def function(name: str, dtype: torch.dtype) -> Callable[..., bool]:
    """The library's function for float32 or float64; False where it found no memory to work in."""
    found = getattr(library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    found.restype = ctypes.c_bool
    return found


def run(name: str, dtype: torch.dtype, programs: int, *given: Any, threads: int | None = None) -> None:
    """All programs, dealt out to torch's number of threads or to ``threads``."""
    call, pointers = function(name, dtype), [ctypes.byref(t) for t in given]
    workers = min(torch.get_num_threads() if threads is None else threads, programs)

    def part(begin: int, end: int) -> bool:
        return call(*pointers, ctypes.c_int64(begin), ctypes.c_int64(end))

    if workers <= 1:
        done = [part(0, programs)]
    else:
        edges = [programs * i // workers for i in range(workers + 1)]
        done = list(_pool(os.getpid(), workers).map(part, edges[:-1], edges[1:]))
    if not all(done):
        raise MemoryError(
            "the inner loop in C++ found no memory to work in: use shorter chunks, or a smaller keep_every"
        )


def ready(t: Tensor, dtype: torch.dtype, *, strided: bool = False) -> Tensor:
    """With its numbers in order, ``strided``: those of its last dimension. C++ would not notice a wrong dtype."""
    if t.dtype is dtype and t.is_cpu and t.is_contiguous():
        return t
    if t.dtype != dtype or not t.is_cpu:
        raise TypeError(f"C++ was given {t.dtype} on {t.device}, expected {dtype} on cpu, as its other tensors are")
    return t if strided and t.stride(-1) == 1 else t.contiguous()


def address(t: Tensor | None) -> int | None:
    """Where its first number is."""
    return None if t is None else t.data_ptr()


@cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(workers, thread_name_prefix=f"nestlearn-{process}")
