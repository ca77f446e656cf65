"""Figure 4 of the paper: Delta Momentum against momentum on a surface whose curvature changes along the way.

    python benchmarks/quality/optimizers/curvature.py                     # minutes; JSON and PNG in benchmarks/results

    ψ(r, θ) = r² + k (r − θ + a sin ω r)²             W = (r, θ), a matrix of one row; its minimum is 0, at 0

The narrow valley θ = r + a sin ω r has a slope that changes its sign: what momentum has gathered along it is wrong in
the next bend. Each optimizer at its best rate and decay of one grid: those with the fewest steps until ψ stays below
1e-6, averaged over starts, one that never gets there counting as all. Other starts choose than those that are reported.

The literal decay α − g² has a scale of its own: twice the surface is another optimizer. So its grid also has s, the
factor of the surface (the rate is divided by s: nothing changes for the others, which have s = 1).
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestlearn.optim import DeltaMomentum

sys.path.insert(0, str(Path(__file__).parents[3]))
from benchmarks.quality.optimizers.common import about, dated, figure

Setting = tuple[float, float, float]  # rate, decay, scale of the surface
LITERAL = "DeltaMomentum, literal key"
OPTIMIZERS = {
    "gradient descent": lambda w, lr, decay: torch.optim.SGD([w], lr=lr),
    "momentum": lambda w, lr, decay: torch.optim.SGD([w], lr=lr, momentum=decay),
    "DeltaMomentum": lambda w, lr, decay: DeltaMomentum([w], lr, decay=decay),
    LITERAL: lambda w, lr, decay: DeltaMomentum([w], lr, decay=decay, key="literal"),
}
RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
DECAYS = [0.5, 0.8, 0.9, 0.95, 0.98]
SCALES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1.0]
REACHED = 1e-6


def psi(w: Tensor, k: float, a: float, omega: float) -> Tensor:
    """The surface at every row of w (n, 1, 2)."""
    r, theta = w[..., 0], w[..., 1]
    return (r**2 + k * (r - theta + a * torch.sin(omega * r)) ** 2).flatten()


def starts(count: int, seed: int) -> Tensor:
    """Uniform in a square of side 6."""
    generator = torch.Generator().manual_seed(seed)
    return 6 * torch.rand(count, 1, 2, generator=generator, dtype=torch.float64) - 3


def descend(name: str, setting: Setting, start: Tensor, steps: int, surface: Any) -> tuple[Tensor, Tensor]:
    """(ψ (steps + 1, n), path (steps + 1, n, 2)). A start whose ψ overflows is held there, so that the others go on."""
    w, (lr, decay, scale) = torch.nn.Parameter(start.clone()), setting
    optimizer = OPTIMIZERS[name](w, lr / scale, decay)
    values, path = [surface(w).detach()], [w.detach().flatten(1).clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * surface(w).sum()).backward()
        assert w.grad is not None
        w.grad[~(values[-1] < 1e6)] = 0
        optimizer.step()
        values.append(torch.nan_to_num(surface(w).detach(), nan=1e9, posinf=1e9).clamp(max=1e9))
        path.append(w.detach().flatten(1).clone())
    return torch.stack(values), torch.stack(path)


def reach(values: Tensor) -> Tensor:
    """First step from which ψ stays below REACHED, for every start; the number of steps where it does not."""
    late = (values >= REACHED).flip(0).to(torch.int8).argmax(0)
    never_above = (values < REACHED).all(0)
    return torch.where(never_above, 0, len(values) - late).clamp(max=len(values))


def best_setting(name: str, start: Tensor, steps: int, surface: Any) -> Setting:
    """That with the smallest mean number of steps; among equals the smallest mean log ψ at the end."""
    decays, scales = DECAYS if name != "gradient descent" else [0.0], SCALES if name == LITERAL else [1.0]

    def score(setting: Setting) -> tuple[float, float]:
        values, _ = descend(name, setting, start, steps, surface)
        return reach(values).double().mean().item(), values[-1].clamp(min=1e-12).log10().mean().item()

    return min(product(RATES, decays, scales), key=score)


def draw(curves: dict[str, tuple[Tensor, Tensor]], surface: Any, out: Path) -> None:
    """ψ against steps, and the paths from one start over the surface."""
    fig, (left, right) = figure(2)
    r, theta = torch.meshgrid(torch.linspace(-3.2, 3.2, 200), torch.linspace(-4.2, 4.2, 200), indexing="ij")
    height = surface(torch.stack([r, theta], -1).reshape(-1, 1, 2)).reshape(r.shape)
    right.contourf(r, theta, torch.log10(height + 1e-3), 30, cmap="Greys")
    for number, (name, (values, path)) in enumerate(curves.items()):
        logs = torch.log10(values + 1e-12)
        middle, spread = logs.mean(1), logs.std(1)
        left.plot(middle, label=name, color=f"C{number}")
        left.fill_between(range(len(middle)), middle - spread, middle + spread, alpha=0.15, color=f"C{number}")
        right.plot(path[:, 0, 0], path[:, 0, 1], ".-", ms=3, lw=0.8, color=f"C{number}", label=name)
    left.set(xlabel="step", ylabel="log₁₀ ψ, mean ± std over starts", title="each at its best rate and decay")
    right.set(xlabel="r", ylabel="θ", title="one start", xlim=(-3.2, 3.2), ylim=(-4.2, 4.2))
    left.legend(fontsize=8)
    fig.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=float, default=5.0)
    parser.add_argument("--a", type=float, default=1.0)
    parser.add_argument("--omega", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--starts", type=int, default=32)
    parser.add_argument("--out", type=Path, default=dated("optimizers-curvature"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    surface, table, curves = partial(psi, k=args.k, a=args.a, omega=args.omega), {}, {}
    for name in OPTIMIZERS:
        best = best_setting(name, starts(args.starts, 1), args.steps, surface)
        curves[name] = descend(name, best, starts(args.starts, 2), args.steps, surface)
        steps = reach(curves[name][0])
        there = (steps <= args.steps).double().mean().item()
        row = dict(zip(("lr", "decay", "scale"), best, strict=True))
        row |= {"mean": steps.double().mean().item(), "deviation": steps.double().std().item()}
        row["log10 psi after 30 steps"] = curves[name][0][30].log10().mean().item()
        table[name] = {**row, "median": float(steps.median().item()), "share that gets there": there}
        print(name, json.dumps(table[name]), flush=True)
    setting = {"k": args.k, "a": args.a, "omega": args.omega, "steps": args.steps, "starts": args.starts}
    what = f"steps until psi stays below {REACHED:g}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"about": about(), "setting": setting, what: table}, indent=1) + "\n")
    draw(curves, surface, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
