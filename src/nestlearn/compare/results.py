"""The numbers of a comparison, from the results of its units, and the table that shows them. Pure functions."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestlearn.compare.contenders import Contender
from nestlearn.compare.plan import Plan
from nestlearn.train.environment import commit, hardware, versions

if TYPE_CHECKING:
    from nestlearn.compare.run import Tuning

Runs = Mapping[str, Sequence[dict[str, Any]]]
COLUMNS = (
    "model", "bits per byte", "perplexity per token", "parameters", "FFN width", "rate", "training tokens/s",
    "peak memory", "decoding tokens/s", "state per stream",
)  # fmt: skip
STREAM_COLUMNS = ("as a stream", "learning from it", "at the rate")


def combine(
    plan: Plan,
    out: Path,
    contenders: Sequence[Contender],
    speeds: Runs,
    tunings: Mapping[str, Tuning],
    runs: Runs,
    online: Mapping[str, Tuning],
) -> dict[str, Any]:
    """What results.json holds. ``None`` stands for what broke down or cannot be said of a single seed."""
    return {
        "command": plan.command(out),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "plan": plan.settings(),
        "models": [
            _model(c, speeds[c.label], tunings[c.label], runs[c.label]) | streams(runs[c.label], online.get(c.label))
            for c in contenders
        ],
    }


def _model(
    contender: Contender, speeds: Sequence[dict[str, Any]], tuning: Tuning, runs: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "model": contender.label,
        "parameters": contender.parameters,
        "intermediate_size": contender.width,
        "settings": contender.config.model,
        "bits_per_byte": spread([run["bits_per_byte"] for run in runs]),
        "perplexity": spread([run.get("perplexity") for run in runs]),
        "rate": tuning.chosen,
        "tuning": _tried(tuning),
        "note": tuning.note,
        "speed": costs(speeds),
        "runs": list(runs),
    }


def streams(runs: Sequence[Mapping[str, Any]], online: Tuning | None) -> dict[str, Any]:
    """Whole documents read as streams, where they were: frozen and learning, and the rates that were tried."""
    if online is None:
        return {}
    read = {
        way: spread([run["stream"][way] and run["stream"][way]["bits_per_byte"] for run in runs if "stream" in run])
        for way in ("frozen", "learning")
    }
    return {"stream": {**read, "rate": online.chosen, "tuning": _tried(online), "note": online.note}}


def _tried(tuning: Tuning) -> list[dict[str, float | None]]:
    return [{"rate": rate, "bits_per_byte": bits} for rate, bits in tuning.rates.items()]


def costs(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of what was measured; ``failed`` alone where a round broke down."""
    broken = [one["failed"] for one in rounds if "failed" in one]
    if broken:
        return {"failed": broken[0]}
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def cost(model: Mapping[str, Any], key: str, shape: Callable[[float], str] = "{:,.0f}".format) -> str:
    """One of the medians as text."""
    return "broke down" if "failed" in model["speed"] else shape(model["speed"][key])


def spread(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Mean and sample standard deviation; the mean is None if any value is, the deviation of fewer than two too."""
    known = [value for value in values if value is not None]
    whole = len(known) == len(values) and len(known) > 0
    return {
        "mean": statistics.fmean(known) if whole else None,
        "std": statistics.stdev(known) if whole and len(known) > 1 else None,
        "seeds": len(values),
    }


def columns(results: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the table's columns."""
    return (*COLUMNS[:2], *(STREAM_COLUMNS if results["plan"]["online_rates"] else ()), *COLUMNS[2:])


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the table, best model first, what broke down last."""
    ranked = sorted(results["models"], key=lambda m: _or(m["bits_per_byte"]["mean"], math.inf))
    streamed = bool(results["plan"]["online_rates"])
    return [_cells(model, _stream_cells(model) if streamed else []) for model in ranked]


def _stream_cells(model: Mapping[str, Any]) -> list[str]:
    stream = model.get("stream", {"frozen": {"mean": None}, "learning": {"mean": None}, "rate": None})
    rate = "–" if stream["rate"] is None else f"{stream['rate']:g}"
    return [_spread(stream["frozen"], 4), _spread(stream["learning"], 4), rate]


def _cells(model: Mapping[str, Any], streamed: Sequence[str]) -> list[str]:
    return [
        model["model"],
        _spread(model["bits_per_byte"], 4),
        *streamed,
        _spread(model["perplexity"], 3),
        f"{model['parameters']:,}",
        f"{model['intermediate_size']:,}",
        "–" if model["rate"] is None else f"{model['rate']:g}",
        cost(model, "train_tokens_per_second"),
        cost(model, "train_peak_bytes", size),
        cost(model, "decode_tokens_per_second"),
        cost(model, "state_bytes", size),
    ]


def markdown(results: Mapping[str, Any]) -> str:
    """The table."""
    names = columns(results)
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows(results))])


def size(count: float) -> str:
    """2048 -> "2 KiB"."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}" if count / unit < 1000 else f"{count / unit:,.0f} {name}"
    return f"{count:.0f} B"


def _spread(value: Mapping[str, Any], decimals: int) -> str:
    if value["mean"] is None:
        return "broke down"
    deviation = "" if value["std"] is None else f" ± {value['std']:.{decimals}f}"
    return f"{value['mean']:.{decimals}f}{deviation}"


def _or(value: float | None, instead: float) -> float:
    return instead if value is None else value
