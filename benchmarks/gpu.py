"""Everything of this library that only a GPU can tell, in one command; what is finished is not run again.

    python benchmarks/gpu.py                    # all outstanding stages, then the table of targets
    python benchmarks/gpu.py --stage train-340m-2048 decode-340m
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --smoke            # every stage at a tiny size, on CPU too: does the program run?

Needs torch, Triton, transformers and numpy; the package itself need not be installed. Each stage runs in a process of
its own and takes ten minutes at most; its result is written to benchmarks/results/gpu-DATE.json (``--out``) at once. A
stage that failed, or was cut off, runs again next time. Correctness comes first: the kernels' speed is refused until
their checks have passed, and models run on the plain-torch loop until then (each result says on which; once the checks
pass, those stages are outstanding again). The targets are printed last as met, missed or not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "src"))
if "--smoke" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before Triton is imported
    os.environ.setdefault("NESTLEARN_KERNELS", "torch")

import torch  # noqa: E402

from benchmarks.gpu_stages import kernels, models, quality  # noqa: E402
from benchmarks.gpu_stages.common import LIMIT, Run  # noqa: E402

SIZES, LENGTHS = ("340m", "760m"), (2048, 8192, 32_768)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHECKS = {
    f"check-{group}-{name}": (lambda run, g=group, d=dtype: kernels.correct(g, d, run))
    for group in kernels.GRID
    for name, dtype in DTYPES.items()
}
STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "environment": kernels.environment,
    **CHECKS,
    "kernel-speed": kernels.speed,
    "syncs": models.syncs,
    **{
        f"train-{size}-{length}": (lambda run, s=size, n=length: models.train(s, n, run))
        for size in SIZES
        for length in LENGTHS
    },
    **{f"decode-{size}": (lambda run, s=size: models.decode(s, run)) for size in SIZES},
    "optimizers": models.optimizers,
    **{f"text-{mixer}": (lambda run, m=mixer: quality.text(m, run)) for mixer in quality.MIXERS},
    "parity": quality.parity,
}
NEEDED = [name for name in CHECKS if name.startswith("check-usual")]  # the shapes of the presets
ALONE = {"environment", "optimizers", *CHECKS}  # stages in which no model's inner loop runs


def passed(results: dict[str, Any]) -> bool:
    """Whether the kernels have shown that they compute the right thing, at the presets' shapes."""
    return all(results.get(check, {}).get("passed") for check in NEEDED)


def refusal(name: str, results: dict[str, Any], run: Run) -> str | None:
    """Why a stage may not run: no speed without correctness."""
    if name == "kernel-speed" and not run.smoke and not passed(results):
        return f"{' and '.join(NEEDED)} must pass before the kernels' speed is measured"
    return None


def implementation(name: str, results: dict[str, Any]) -> str | None:
    """What a stage's models run on, None where it has none."""
    return None if name in ALONE or name == "kernel-speed" else "triton" if passed(results) else "torch"


def run_stage(name: str, run: Run) -> dict[str, Any]:
    """The result of a stage, or what went wrong."""
    begin = time.monotonic()
    try:
        found = STAGES[name](run)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:1000], "traceback": traceback.format_exc()[-3000:]}
    return found | {"stage seconds": round(time.monotonic() - begin, 1)}


def run_apart(name: str, args: argparse.Namespace, kernels_used: str | None) -> dict[str, Any]:
    """The same in a process of its own: a GPU that faults, or a stage that hangs, takes nothing else with it."""
    environment = {**os.environ, **({"NESTLEARN_KERNELS": kernels_used} if kernels_used else {})}
    command = [sys.executable, __file__, "--child", name, *(["--compile"] if args.compile else [])]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT, env=environment)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {LIMIT} s"}
    except (IndexError, ValueError):
        return {"error": f"the process ended with code {done.returncode} and no result"}


def finished(name: str, results: dict[str, Any]) -> bool:
    """Whether a stage has a result, on what its models would run on now."""
    found = results.get(name, {})
    return bool(found) and "error" not in found and found.get("kernels") == implementation(name, results)


def targets(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Issue by issue line: what is wanted, what was found, and met, missed or not measured."""
    rows = [worst_check(results, name) for name in DTYPES]
    for size in SIZES:
        for length, wanted in zip(LENGTHS, (0.5, 0.8, 1.5), strict=True):
            found = results.get(f"train-{size}-{length}", {}).get("models", {})
            label = f"{size} at {length}"
            rows.append(verdict(f"training, HOPE / Transformer, {label}", ratio(found, "tokens/s"), wanted, "least"))
            rows.append(verdict(f"peak memory, HOPE / Transformer, {label}", ratio(found, "peak GB"), 1.3, "most"))
            rows.append(verdict(f"utilisation, {label}", found.get("hope", {}).get("utilisation"), 0.3, "least"))
        found = results.get(f"decode-{size}", {}).get("models", {})
        rows.append(
            verdict(f"decoding step, HOPE / Transformer, {size} at 2048", ratio(found, "step ms at 2048"), 2, "most")
        )
        mine = found.get("hope", {})
        flat = divided(mine.get("step ms at 32768"), mine.get("step ms at 256"))
        rows.append(verdict(f"decoding step at 32768 / at 256, {size}", flat, 1.1, "most"))
        graph = mine.get("graph")
        rows.append(
            (
                f"decoding as a CUDA graph, {size}",
                "yes",
                verdict_of(graph.get("captured") if isinstance(graph, dict) else None),
            )
        )
    speed = results.get("kernel-speed", {}).get("rows", {})
    for kind in ("forward", "step"):
        rows.append(
            verdict(
                f"kernel over its floor, bfloat16, {kind}",
                speed.get(f"triton bfloat16, {kind}", {}).get("times floor"),
                2,
                "most",
            )
        )
    synced = results.get("syncs", {}).get("host syncs")
    rows.append(
        (
            "host syncs in a training step",
            "none",
            verdict_of(None if synced in (None, "needs a GPU") else synced == "none"),
        )
    )
    return rows


def worst_check(results: dict[str, Any], dtype: str) -> tuple[str, str, str]:
    found = [results.get(name, {}) for name in CHECKS if name.endswith(dtype)]
    known = all("passed" in f for f in found)
    worst = f"{max(f['worst'] for f in found):.1e}" if known else "?"
    return (
        f"kernels against float64, {dtype}",
        f"{worst} wanted <= {kernels.LIMITS[DTYPES[dtype]]}",
        verdict_of(all(f["passed"] for f in found) if known else None),
    )


def ratio(found: dict[str, Any], key: str) -> float | None:
    return divided(found.get("hope", {}).get(key), found.get("transformer", {}).get(key))


def divided(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def verdict(label: str, value: float | None, wanted: float, kind: str) -> tuple[str, str, str]:
    met = None if value is None else value >= wanted if kind == "least" else value <= wanted
    return (
        label,
        f"{'?' if value is None else f'{value:.3g}'} wanted {'>=' if kind == 'least' else '<='} {wanted}",
        verdict_of(met),
    )


def verdict_of(met: bool | None) -> str:
    return "not measured" if met is None else "met" if met else "missed"


def print_table(results: dict[str, Any], *, smoke: bool) -> None:
    if smoke:
        print("smoke run: tiny sizes, the table only shows that it can be printed")
        results = {}
    for label, value, result in targets(results):
        print(f"{label:52s} {value:28s} {result}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the stages and which are finished")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, CPU allowed; results go to --out only if given"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile for every model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=list(STAGES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.smoke else "cpu")
    run = Run(device, args.smoke, args.compile)
    if args.child:
        print(json.dumps(run_stage(args.child, run)))
        return 0
    out = args.out or (
        None if args.smoke else ROOT / "benchmarks" / "results" / f"gpu-{time.strftime('%Y-%m-%d')}.json"
    )
    results: dict[str, Any] = json.loads(out.read_text()) if out and out.exists() else {}
    if args.list:
        for name in STAGES:
            print(f"{name:28s} {'finished' if finished(name, results) else 'outstanding'}")
        return 0
    if not run.gpu and not run.smoke:
        print("gpu.py: there is no GPU here: run it on a machine with one, or with --smoke", file=sys.stderr)
        return 2
    failed = False
    # the groups of shapes differ in size only, so a smoke run has one of them
    for name in args.stage or [s for s in STAGES if not (args.smoke and s.startswith(("check-usual", "check-large")))]:
        if finished(name, results):
            continue
        why, used = refusal(name, results, run), "torch" if run.smoke else implementation(name, results)
        found = {"error": why} if why else run_stage(name, run) if run.smoke else run_apart(name, args, used)
        results[name] = found | ({} if implementation(name, results) is None else {"kernels": used})
        failed |= "error" in found
        print(f"{name}: {found.get('error') or 'finished'} ({found.get('stage seconds', 0)} s)", flush=True)
        if out:
            out.write_text(json.dumps(results, indent=1) + "\n")
    print_table(results, smoke=args.smoke)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
