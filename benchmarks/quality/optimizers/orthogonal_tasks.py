"""§4.3 of the paper (NL Eq. 45): tasks in sequence whose gradients are orthogonal; who forgets the first one?

    python benchmarks/quality/optimizers/orthogonal_tasks.py              # minutes; JSON and PNG in benchmarks/results

    task i:  y = W* x + noise,  x in a subspace S_i of the inputs;  S_1 ⊥ S_2 ⊥ …      gradient (W x − y) xᵀ

A gradient of task i leaves what W does on every other subspace as it is, and one W solves all tasks. So whatever is
lost of task 1 while later tasks are learned, the optimizer has lost: momentum that still pushes, entries or singular
values made equal. The rate falls to 0 within each task, so that all can learn to the end. Loss of a task is
‖(W − W*) P_i‖² over that of W = 0, P_i the projection on S_i: 1 before learning. Each optimizer at its best rate of one
grid: the smallest mean loss over all tasks at the end, over seeds that are not those reported. Forgetting is the loss
of task 1 after later tasks minus that just after it was learned.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3]))
from benchmarks.quality.optimizers.common import about, dated, figure, make, mean_and_deviation

NAMES = ["momentum", "AdamW", "Muon", "DeltaMomentum values=None", "DeltaMomentum", "DMGD", "M3", "M3 slow_weight=0"]
RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
OUT, IN, TASKS, STEPS, BATCH, NOISE = 16, 32, 8, 100, 16, 0.02


def run(name: str, lr: float, seed: int) -> Tensor:
    """(task learned last, task): the loss of every task after each."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(IN, IN, generator=generator))[0].reshape(IN, TASKS, IN // TASKS)
    teacher = torch.randn(OUT, IN, generator=generator) / IN**0.5
    weight = torch.nn.Parameter(torch.zeros(OUT, IN))
    optimizer = make(name, lr)([{"params": [weight], "rule": "memory"}])
    rows = []
    for task in range(TASKS):
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / STEPS)
            x = torch.randn(BATCH, IN // TASKS, generator=generator) @ basis[:, task].mT
            y = x @ teacher.mT + NOISE * torch.randn(BATCH, OUT, generator=generator)
            weight.grad = 2 * (x @ weight.detach().mT - y).mT @ x / BATCH
            if not weight.grad.isfinite().all():
                return torch.full((TASKS, TASKS), torch.inf)
            optimizer.step()
        rows.append(losses(weight.detach() - teacher, basis) / losses(teacher, basis))
    return torch.stack(rows)


def losses(error: Tensor, basis: Tensor) -> Tensor:
    """‖error P_i‖² of every task."""
    return torch.einsum("oi,itk->otk", error, basis).square().sum((0, 2))


def row(name: str, lr: float, runs: list[Tensor]) -> dict[str, Any]:
    """Numbers of one optimizer over its seeds."""
    forgotten = [(r[:, 0] - r[0, 0]).tolist() for r in runs]
    summary = {
        "loss just after learning a task": mean_and_deviation(r.diagonal().mean().item() for r in runs),
        "loss of all tasks at the end": mean_and_deviation(r[-1].mean().item() for r in runs),
        "forgetting of task 1": mean_and_deviation(f[-1] for f in forgotten),
        "forgetting of task 1 by later tasks": [mean_and_deviation(f) for f in zip(*forgotten, strict=True)],
    }
    return {"optimizer": name, "lr": lr, "seeds": len(runs), **summary}


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Forgetting against later tasks; beside it what there was to forget."""
    fig, (left, right) = figure(2)
    for number, r in enumerate(rows):
        mean, deviation = torch.tensor(r["forgetting of task 1 by later tasks"]).unbind(1)
        left.errorbar(range(TASKS), mean, deviation, fmt="o-", ms=3, capsize=2, label=r["optimizer"])
        for key, marker in (("loss just after learning a task", "o"), ("loss of all tasks at the end", "^")):
            right.errorbar(number, *r[key], fmt=marker, color=f"C{number}", capsize=3)
    left.set(xlabel="later tasks", ylabel="forgetting of task 1 (share of its initial loss)", yscale="symlog")
    left.set_yscale("symlog", linthresh=1e-3)
    right.legend(*left.get_legend_handles_labels(), fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    right.set_yscale("log")
    right.set_xticks(range(len(rows)), [r["optimizer"] for r in rows], rotation=40, ha="right", fontsize=7)
    right.set_title("mean loss: ● just after its task   ▲ of all at the end")
    fig.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", default=NAMES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=dated("optimizers-orthogonal-tasks"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, swept = [], {}
    for name in args.optimizers:
        swept[name] = {lr: sum(run(name, lr, 100 + s)[-1].mean().item() for s in range(2)) / 2 for lr in RATES}
        best = min(swept[name], key=swept[name].__getitem__)
        rows.append(row(name, best, [run(name, best, seed) for seed in range(args.seeds)]))
        print(json.dumps(rows[-1]), flush=True)
    shape = {"out": OUT, "in": IN, "tasks": TASKS, "steps of a task": STEPS, "batch": BATCH, "noise": NOISE}
    sweeps = {name: {f"{lr:g}": loss for lr, loss in losses.items()} for name, losses in swept.items()}
    result = {"about": about(), "shape": shape, "loss of all tasks at the end, by rate": sweeps, "optimizers": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
