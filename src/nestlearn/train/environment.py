"""Facts about the machine and the software that a run was made with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

import nestlearn


def hardware() -> str:
    """For example "2 x Intel Xeon Processor, 2 threads"."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} x {_processor()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    return {
        "nestlearn": nestlearn.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The commit of the checkout that this package is run from; None where it is installed from elsewhere."""
    here = Path(__file__).resolve().parent
    try:
        # ls-files fails where some other repository, say around a virtual environment, merely contains the folder
        command = ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(command, check=True, capture_output=True, timeout=10)
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, check=True, capture_output=True, timeout=10, text=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
