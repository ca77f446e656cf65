"""What a longer context costs: training tokens/s and peak memory of every model against T = 512 … 32K.

    python benchmarks/speed/scaling.py --out runs/scaling                     # batch 1
    python benchmarks/speed/scaling.py --out runs/scaling-equal --tokens-per-step 32768 --limit 12
    python benchmarks/speed/scaling.py --out runs/scaling --models hope transformer --lengths 512 1024 --rounds 1

Models of equal size (3 million parameters, solved as in `nestlearn compare`), random bytes, float32; a step is forward,
backward and AdamW. Every point is a process of its own in every round, the models taking turns, in every second round
backwards; a figure is the median over the rounds, a ratio that of two medians. What would need more memory than
``--limit`` is stopped, said, and not tried at greater lengths; so is what takes longer than ``--seconds``. Goes on
where it was stopped. Writes OUT/scaling.json and OUT/scaling.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestlearn.compare.child import RESULT, Launch, do_unit
from nestlearn.compare.contenders import Contender, enter, with_shape
from nestlearn.compare.run import SPEED, folder_name
from nestlearn.train.config import TrainConfig, parse_count

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import about

MODELS = ("hope", "transformer", "retnet", "deltanet", "gated_deltanet", "titans", "ttt_mlp", "samba")
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
BYTES = 256

Table = dict[str, dict[int, dict[str, Any]]]


def limited(gigabytes: float, seconds: float) -> Launch:
    """Runs a unit in a process that may hold so much memory and take so long; else its result says what it was."""

    def launch(module: str, folder: Path) -> int:
        command = [sys.executable, "-m", "nestlearn.compare.child", module, str(folder)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE)  # the pipe ends it with this process
        begin = time.perf_counter()
        while child.poll() is None:
            time.sleep(0.05)
            late, large = time.perf_counter() - begin > seconds, resident(child.pid) > gigabytes * 2**30
            if late or large:
                child.kill()
                child.wait()
                why = f"takes more than {seconds:g} s" if late else f"needs more than {gigabytes:g} GiB"
                (folder / RESULT).write_text(json.dumps({"failed": why}))
                return 0
        return child.returncode

    return launch


def resident(process: int) -> int:
    """Bytes that a process holds, 0 where that cannot be seen."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def contenders(models: Sequence[str], params: int) -> list[Contender]:
    base = with_shape(models, TrainConfig(name="scaling"), params, BYTES)
    return [enter(label, base, params, BYTES) for label in models]


def measured(args: argparse.Namespace, launch: Launch) -> Table:
    """By model and length."""
    entered = contenders(args.models, parse_count(args.params, "parameters"))
    found: Table = {contender.label: {} for contender in entered}
    for length in args.lengths:
        rounds: dict[str, list[dict[str, Any]]] = {contender.label: [] for contender in entered}
        for number in range(1, args.rounds + 1):
            for contender in entered[:: 1 if number % 2 else -1]:
                if not stopped(contender.label, found, rounds):
                    rounds[contender.label].append(point(contender, length, number, args, launch))
        for label, results in rounds.items():
            found[label][length] = summed_up(results, found[label])
            print(json.dumps({"model": label, "length": length, **found[label][length]}), flush=True)
    return found


def point(contender: Contender, length: int, number: int, args: argparse.Namespace, launch: Launch) -> dict[str, Any]:
    batch = max(1, args.tokens_per_step // length)
    config = dataclasses.replace(contender.config, batch_size=batch, sequence_length=length)
    folder = args.out / "units" / folder_name(contender.label) / f"length-{length}-round-{number}"
    return do_unit(SPEED, folder, {"config": config.to_dict(), "steps": args.steps, "decode": 0}, launch)


def stopped(label: str, found: Table, rounds: Mapping[str, Sequence[dict[str, Any]]]) -> bool:
    earlier = (*found[label].values(), *rounds[label])
    return any("failed" in result for result in earlier)


def summed_up(results: Sequence[dict[str, Any]], shorter: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, or why there are none."""
    reasons = [result["failed"] for result in (*results, *shorter.values()) if "failed" in result]
    if reasons:
        return {"failed": reasons[0]}
    return {
        "tokens_per_second": round(statistics.median(r["train_tokens_per_second"] for r in results), 1),
        "peak_bytes": round(statistics.median(r["train_peak_bytes"] for r in results)),
        "rounds": len(results),
        "threads": results[0]["threads"],
    }


def table(found: Table, lengths: Sequence[int]) -> str:
    """Tokens/s and GiB at each length, and the speed at the greatest length that both have, over the Transformer's."""
    lines = ["| model | " + " | ".join(f"{length:,}" for length in lengths) + " | speed over transformer |"]
    lines.append("|---" * (len(lengths) + 2) + "|")
    for label, points in found.items():
        cells = [_cell(points[length]) for length in lengths]
        lines.append(f"| {label} | {' | '.join(cells)} | {_ratio(points, found.get('transformer', {}))} |")
    return "\n".join(lines)


def _cell(point: Mapping[str, Any]) -> str:
    if "failed" in point:
        return point["failed"]
    return f"{point['tokens_per_second']:,.0f}, {point['peak_bytes'] / 2**30:.2f} GiB"


def _ratio(points: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]]) -> str:
    both = [n for n in points if "failed" not in points[n] and "failed" not in reference.get(n, {"failed": ""})]
    if not both:
        return "–"
    ratio = points[both[-1]]["tokens_per_second"] / reference[both[-1]]["tokens_per_second"]
    return f"{ratio:.2f} at {both[-1]:,}"


def picture(found: Table, path: Path) -> None:
    import matplotlib.pyplot as plt  # a dev dependency, for pictures only

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for label, points in found.items():
        kept = {length: p for length, p in points.items() if "failed" not in p}
        speed.plot(list(kept), [p["tokens_per_second"] for p in kept.values()], marker=".", label=label)
        memory.plot(list(kept), [p["peak_bytes"] / 2**30 for p in kept.values()], marker=".", label=label)
    for axes, title in ((speed, "training tokens/s"), (memory, "peak memory, GiB")):
        axes.set(xscale="log", yscale="log", xlabel="tokens in a sequence", title=title)
        axes.grid(alpha=0.3)
    speed.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--params", default="3M")
    parser.add_argument("--tokens-per-step", type=int, default=1, help="batches of so many tokens; else one sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="per round, after one that does not count")
    parser.add_argument("--limit", type=float, default=8.0, help="GiB a process may hold")
    parser.add_argument("--seconds", type=float, default=600.0, help="a process may take")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, launch: Launch | None = None) -> None:
    args = arguments(argv)
    args.lengths = sorted(set(args.lengths))
    found = measured(args, launch or limited(args.limit, args.seconds))
    result = {"about": about(), "settings": {k: v for k, v in vars(args).items() if k != "out"}, "models": found}
    (args.out / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    picture(found, args.out / "scaling.png")
    print(table(found, args.lengths))


if __name__ == "__main__":
    main()
