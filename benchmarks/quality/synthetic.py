"""What the benchmarks of made-up tasks share: models by name, training to a stop rule, results to go on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.common import about
from nestlearn import HopeConfig, HopeForCausalLM

BASELINES: dict[str, dict[str, Any]] = {
    "transformer": {"mixer": "transformer"},
    "retnet": {"mixer": "retnet"},
    "deltanet": {"mixer": "deltanet"},
    "gated_deltanet": {"mixer": "gated_deltanet"},
    "titans": {"mixer": "titans"},
    "ttt_mlp": {"mixer": "ttt_mlp"},
}
WARMUP = 20


def make_model(
    settings: Mapping[str, Any], *, vocabulary: int, width: int, layers: int, heads: int, seed: int
) -> HopeForCausalLM:
    """A model with one feed-forward block of twice the width in each layer."""
    torch.manual_seed(seed)
    return HopeForCausalLM(
        HopeConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=2 * width,
            levels=[1],
            initializer_range=width**-0.5,
            **settings,
        )
    )


def train(
    model: torch.nn.Module,
    loss_of: Callable[[], Tensor],
    solved: Callable[[], bool],
    *,
    rate: float,
    steps: int,
    enough: float,
    every: int = 25,
) -> dict[str, Any]:
    """AdamW, the rate warmed up and then falling to zero along a cosine; until the mean loss of ``every`` steps is
    below ``enough`` nats and ``solved()``, at most ``steps`` steps. Returns what happened."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    losses: list[float] = []
    begin, cpu, mean = time.perf_counter(), time.process_time(), float("inf")
    while len(losses) < steps:
        optimizer.param_groups[0]["lr"] = rate * pace(len(losses), steps)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % every == 0:
            mean = sum(losses[-every:]) / every
            if mean != mean or (mean < enough and solved()):
                break
    return {
        "steps": len(losses),
        "loss": mean,
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu seconds": round(time.process_time() - cpu, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": [round(sum(losses[i : i + every]) / every, 5) for i in range(0, len(losses), every)],
    }


def pace(step: int, steps: int) -> float:
    """Share of the learning rate: up over `WARMUP` steps, then half a cosine down."""
    return min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))


class Results:
    """Runs in a JSON file, each written when it is done, so that a broken-off benchmark goes on where it was."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings, self.runs = path, dict(settings), list[dict[str, Any]]()
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            if kept["settings"] != json.loads(json.dumps(self.settings)):
                raise SystemExit(
                    f"{path} has other settings than this command: name another file, or the same settings"
                )
            self.runs = kept["runs"]

    def once(self, key: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> None:
        """Run and keep what it returns, unless a run of this key is here already."""
        if any(all(kept[name] == value for name, value in key.items()) for kept in self.runs):
            return
        result = {**key, **run(), "commit": about()["commit"]}
        self.runs.append(result)
        self.write()
        shown = " ".join(f"{n} {v:.4g}" if isinstance(v, float | int) else v for n, v in result.items() if n != "curve")
        print(shown, flush=True)

    def write(self) -> None:
        """All runs, with the command that asked for them last."""
        if self.path is not None:
            self.path.write_text(json.dumps({**about(), "settings": self.settings, "runs": self.runs}) + "\n")

    def best(self, **key: Any) -> dict[str, Any] | None:
        """Of the runs with these values the one with the best validation accuracy, then the lowest training loss."""
        runs = [run for run in self.runs if all(run[name] == value for name, value in key.items())]
        return max(runs, key=lambda run: (run["validation"], -run["loss"]), default=None)


def table(cells: Mapping[str, Sequence[float]], columns: Sequence[str]) -> str:
    """Accuracies in %, a line for each model."""
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {model} | " + " | ".join(f"{100 * a:.1f}" for a in row) + " |" for model, row in cells.items()]
    return "\n".join(lines)


def draw(path: Path, cells: Mapping[str, Sequence[float]], columns: Sequence[str], title: str) -> None:
    """A map of accuracies, models down, columns across, as SVG or PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1.1 * len(columns) + 2.2, 0.42 * len(cells) + 1.6))
    axes.imshow([list(row) for row in cells.values()], vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=25, ha="right")
    axes.set_yticks(range(len(cells)), list(cells))
    for y, row in enumerate(cells.values()):
        for x, value in enumerate(row):
            if value == value:
                axes.text(
                    x, y, f"{100 * value:.0f}", ha="center", va="center", color="white" if value < 0.6 else "black"
                )
    axes.set_title(f"{title}, %")
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
