"""Speed of two commits, taking turns on one machine: medians, and the ratio of medians, of every op, layer and model.

    python benchmarks/speed/compare_commits.py main HEAD
    python benchmarks/speed/compare_commits.py main HEAD --only "inner loop" --turns 9

Each commit is checked out into a worktree of its own. First its tests of the measured parts run: a part whose tests
fail has no speed, only the word "refused". Then the commits take turns, a fresh process each time, and every part is
timed in it. A ratio above 1 says that the second commit is faster. Both commits must have every part that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The test files that must pass before a part's speed counts; files that a commit lacks are skipped.
_MEMORY = ["tests/ops/test_inner_loop.py", "tests/memory/test_self_modifying.py", "tests/memory/test_recompute.py"]
_MODEL = [*_MEMORY, "tests/models/test_block.py", "tests/models/test_continuum.py"]
TESTS = {
    "op: DGD chunk, forward and backward": ["tests/ops/test_dgd_chunk.py"],
    "op: Newton–Schulz": ["tests/ops/test_newton_schulz.py"],
    "layer: self-modifying memory, step": _MEMORY,
    "layer: continuum, step": ["tests/models/test_continuum.py"],
    "model: HOPE, training step": _MODEL,
    "model: HOPE, prefill": _MODEL,
    "decode: HOPE, one token": _MODEL,
    "optimizer: M3": ["tests/optim/test_m3.py"],
    "optimizer: DeltaMomentum": ["tests/optim/test_delta_momentum.py"],
}


def measurements() -> dict[str, Callable[[], Any]]:
    """The parts as closures, of whichever commit is on the path."""
    import torch

    from nestlearn import HopeConfig, HopeForCausalLM
    from nestlearn.memory.self_modifying import SelfModifyingConfig, SelfModifyingMemory
    from nestlearn.models.continuum import Continuum
    from nestlearn.ops.dgd_chunk import dgd_chunk
    from nestlearn.ops.newton_schulz import newton_schulz
    from nestlearn.optim import M3, DeltaMomentum

    torch.manual_seed(0)
    config = HopeConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, levels=[1, 4096])
    model, ids = HopeForCausalLM(config), torch.randint(0, 256, (2, 512))
    memory = SelfModifyingMemory(SelfModifyingConfig(64, 64, 2, retain_to="initial"))
    inputs = torch.nn.functional.normalize(torch.randn(2, 512, 2, 64), dim=-1)
    cms = Continuum(128, 384, config.shape().levels, "sequential", 1e-6)
    x, matrix = torch.randn(2, 512, 128), torch.randn(4, 256, 256)
    states = [torch.randn(2, 2, 64, 64).requires_grad_() for _ in range(2)]
    rate, retain = torch.rand(2, 512, 2), 0.9 + 0.1 * torch.rand(2, 512, 2)
    with torch.no_grad():
        cache = model(ids[:1], use_cache=True).past_key_values

    def optimizer(kind: Any) -> Callable[[], Any]:
        weights = [torch.nn.Parameter(torch.randn(256, 256)) for _ in range(4)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        return kind(weights, lr=1e-3).step

    def quiet(call: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(call)

    return {
        "op: DGD chunk, forward and backward": lambda: dgd_chunk(
            *states, inputs, inputs, rate, retain, inputs, mu=0.5, chunk=64
        )[0].sum().backward(),
        "op: Newton–Schulz": lambda: newton_schulz(matrix),
        "layer: self-modifying memory, step": lambda: memory(inputs, inputs)[0].sum().backward(),
        "layer: continuum, step": lambda: cms(x).sum().backward(),
        "model: HOPE, training step": lambda: model(ids, labels=ids, use_cache=False).loss.backward(),
        "model: HOPE, prefill": quiet(lambda: model(ids, use_cache=True)),
        "decode: HOPE, one token": quiet(lambda: model(ids[:1, :1], past_key_values=cache, use_cache=True)),
        "optimizer: M3": optimizer(M3),
        "optimizer: DeltaMomentum": optimizer(DeltaMomentum),
    }  # fmt: skip


def time_here(wanted: list[str]) -> dict[str, float]:
    """The child of `turn`: median seconds of every wanted part."""
    found = {}
    for name, call in measurements().items():
        if name in wanted:
            call()
            found[name] = statistics.median(_seconds(call) for _ in range(3))
    return found


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def turn(tree: Path, wanted: list[str]) -> dict[str, float]:
    """One commit's turn, in a fresh process that sees only its own source."""
    command = [sys.executable, __file__, "--child", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(tree), cwd=tree)
    if done.returncode:
        raise SystemExit(f"{tree.name} cannot be measured:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def passing(tree: Path, wanted: list[str]) -> dict[str, str | None]:
    """For each part None, or the test file that keeps its speed from being reported."""
    files = sorted({f for name in wanted for f in TESTS[name] if (tree / f).exists()})
    results = {f: _passes(tree, f) for f in files}
    return {name: next((f for f in TESTS[name] if not results.get(f, True)), None) for name in wanted}


def _passes(tree: Path, path: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", path, "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(tree), cwd=tree)
    return done.returncode == 0


def _environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{tree / 'src'}{os.pathsep}{tree}"}


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """A checkout of ``commit``, removed afterwards."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", "--quiet", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def compare(trees: list[Path], wanted: list[str], turns: int) -> list[dict[str, Any]]:
    """Rows of part, both medians in milliseconds and their ratio, or why there is none."""
    refused = [passing(tree, wanted) for tree in trees]
    wrong = {n: next((r[n] for r in refused if r[n]), None) for n in wanted}
    good = [n for n in wanted if wrong[n] is None]
    times: list[dict[str, list[float]]] = [{n: [] for n in good} for _ in trees]
    for _ in range(turns if good else 0):
        for tree, collected in zip(trees, times, strict=True):
            for name, seconds in turn(tree, good).items():
                collected[name].append(seconds)
    rows = []
    for name in wanted:
        if wrong[name] is not None:
            rows.append({"part": name, "refused": f"{wrong[name]} fails"})
            continue
        first, second = (1e3 * statistics.median(collected[name]) for collected in times)
        rows.append({"part": name, "first ms": first, "second ms": second, "ratio": first / second})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'part':40s}{'first ms':>12s}{'second ms':>12s}{'ratio':>8s}")
    for row in rows:
        if "refused" in row:
            print(f"{row['part']:40s}refused: {row['refused']}")
        else:
            print(f"{row['part']:40s}{row['first ms']:12.2f}{row['second ms']:12.2f}{row['ratio']:8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", metavar="COMMIT")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(time_here(args.child)))
        return
    wanted = [name for name in TESTS if args.only in name]
    if len(args.commits) != 2 or not wanted:
        parser.error(f"give two commits, and --only as part of one of: {', '.join(TESTS)}")
    with tempfile.TemporaryDirectory() as folder:
        first, second = (Path(folder) / name for name in ("first", "second"))
        with worktree(args.commits[0], first), worktree(args.commits[1], second):
            rows = compare([first, second], wanted, args.turns)
    show(rows)
    if args.out:
        args.out.write_text(json.dumps({"commits": args.commits, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
