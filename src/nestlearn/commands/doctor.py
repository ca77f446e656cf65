"""``nestlearn doctor``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from nestlearn.ops.registry import Task


def doctor() -> None:
    """Print versions, device and threads, which implementation of the inner loop runs here and why, and check each."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from nestlearn import __version__
    from nestlearn.ops.registry import NAMES, TRITON_LIMITS, VARIABLE, choose, forced, limit_of

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"nestlearn {__version__}, python {platform.python_version()}")
    for package in ("torch", "triton", "transformers", "numpy"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed")
    print(f"device: {_device(device)}")
    print(f"threads: {torch.get_num_threads()} of {os.cpu_count()} processors")
    print(f"{VARIABLE}: {forced() or 'unset, the first of what can run is used'}")
    task = _task(device)
    choice = choose(task)
    print(f"inner loop here: {choice.name} ({choice.why})")
    print(f"limits of triton: float32 states, {', '.join(f'{n} up to {m}' for n, m in TRITON_LIMITS.items())}")
    print("limits of native: a CPU and a C++ compiler, reads before the write, and those of torch")
    print("limits of torch: one chunk for all memories, dgd=True, detach_writes=False, first derivatives")
    for name in NAMES:
        limit = limit_of(name, task)
        print(f"  {name:10s} {_self_check(name, device) if limit is None else f'not available: {limit}'}")


def _device(device: torch.device) -> str:
    import torch

    if device.type == "cpu":
        return f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"


def _task(device: torch.device) -> Task:
    """The heads of the preset hope-340m, in float32."""
    import torch

    from nestlearn.ops.registry import Task

    return Task(device, torch.float32, torch.float32, 64, 64, 64)


def _self_check(name: str, device: torch.device) -> str:
    """A tiny memory, forwards and backwards, against the reference in float64 on CPU."""
    import torch

    from nestlearn.memory.self_modifying import SelfModifyingConfig

    config = SelfModifyingConfig(16, 16, heads=2, chunk=16, recompute=name != "reference")
    truth = _run(
        SelfModifyingConfig(16, 16, heads=2, chunk=16, recompute=False), "reference", torch.device("cpu"), torch.float64
    )
    try:
        found = _run(config, name, device, torch.float32)
    except Exception as error:  # whatever it is, it is what a doctor is asked for
        return f"FAILED: {type(error).__name__}: {error}"
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))
    return f"{'ok' if worst < 1e-4 else 'WRONG'}: largest relative error {worst:.1e} (forward and gradient, float32)"


def _run(config: object, name: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """y, the state and the gradients of x and of every parameter, as float64 on CPU."""
    import torch

    from nestlearn.memory.self_modifying import SelfModifyingConfig, SelfModifyingMemory
    from nestlearn.ops.registry import forcing

    assert isinstance(config, SelfModifyingConfig)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        memory = SelfModifyingMemory(config)
        x = torch.randn(1, 20, config.heads, config.head_width)
    memory, x = memory.to(device, dtype), x.to(device, dtype).requires_grad_()
    with forcing(name):
        y, after = memory(x, torch.nn.functional.normalize(x, dim=-1))
    y.square().sum().backward()
    grads = [p.grad for p in memory.parameters()]
    return [t.detach().double().cpu() for t in (y, after.w1, after.w2, x.grad, *grads) if t is not None]
