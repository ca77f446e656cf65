"""Compiles the C++ of this folder once for each machine and source, and loads it.

The library lies in the user's cache ($XDG_CACHE_HOME, else ~/.cache), under a name made of all that it depends on. Two
processes that compile at once write the same file, each whole, under its final name last.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp-simd", "-fPIC", "-shared")
FOLDER = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")


class Unavailable(Exception):
    """Why there is no library."""


@cache
def missing() -> str | None:
    """Why the library cannot be used here, None where it can; compiles it where that was not done yet."""
    try:
        library()
    except Unavailable as why:
        return str(why)
    return None


@cache
def library() -> ctypes.CDLL:
    """The loaded library; `Unavailable` where there is none."""
    compiler = _compiler()
    sources = sorted((*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")))
    parts = [path.read_bytes() for path in sources] + [
        part.encode() for part in (*FLAGS, _version(compiler), _machine())
    ]
    name = f"inner_loop-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    try:
        folder = _folder()
        if not (folder / name).exists():
            _compile(compiler, folder / name)
        return ctypes.CDLL(str(folder / name))
    except OSError as error:
        raise Unavailable(f"the compiled inner loop could not be loaded: {error}") from error


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise Unavailable(f"no C++ compiler was found (CXX, {', '.join(COMPILERS)})")


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return done.stdout


def _machine() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _folder() -> Path:
    """Where libraries are kept: the cache, or a folder of this process where that cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nestlearn"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="nestlearn-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="nestlearn-"))


def _compile(compiler: str, path: Path) -> None:
    handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-o", unfinished, str(FOLDER / "inner_loop.cpp")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
            raise Unavailable(f"{compiler} could not compile the inner loop: {errors[0].strip()}")
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
