"""What the stages share: the scale of a run, time on the device, peak memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

LIMIT = 600  # seconds a stage may take
_STARTED = time.monotonic()


@dataclass(frozen=True)
class Run:
    """device; smoke: tiny sizes that only show that the program runs; compile: torch.compile for every model."""

    device: torch.device
    smoke: bool = False
    compile: bool = False

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def late(self, begin: float) -> bool:
        """Whether a stage begun at ``begin`` should measure nothing more."""
        return time.monotonic() - begin > 0.8 * LIMIT


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device idle before and after."""
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - begin


def peak_gigabytes(call: Callable[[], Any], device: torch.device) -> float | None:
    """Most memory that tensors took during a call; None on CPU, where it is not counted."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.reset_peak_memory_stats()
    timed(call, device)
    return torch.cuda.max_memory_allocated() / 2**30


def free() -> None:
    """Give back what a measurement held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError)
