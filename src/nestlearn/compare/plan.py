"""What is compared with what, and the folder that holds it: the same settings go on, others are refused."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestlearn.compare.contenders import with_shape
from nestlearn.errors import UserError
from nestlearn.train.build import vocabulary
from nestlearn.train.config import TrainConfig

MODELS = ("hope", "transformer", "retnet", "deltanet", "gated_deltanet", "titans")
RATES = (2e-3, 4e-3, 8e-3)
TUNE_SHARE = 5  # tuning takes a fifth of the tokens unless told
ONLINE_PERIOD = 128  # tokens, a quarter of the sequences of most comparisons
PLAN = "plan.json"
MAY_GROW = ("models", "seeds", "online_rates")  # more of them leave what is there as it is


@dataclass(frozen=True)
class Plan:
    """A comparison.

    models     labels, see `contenders.split_labels`
    params     of every model, ± 2 %
    base       the settings all share: text, tokens, batch, optimizer, the first seed, and the models' common shape
    seeds      how many: base.seed, base.seed + 1, …
    rates      learning rates to choose from, increasing; each model takes the best after ``tune_tokens``
    online_rates   at which the trained models' levels learn from held-out documents that are read as streams, to
                   choose from; none: that is not measured. ``online_period``: tokens from one change to the next
    overrides  what --set said, to say it again
    """

    models: tuple[str, ...]
    params: int
    base: TrainConfig
    seeds: int
    rates: tuple[float, ...]
    tune_tokens: int
    online_rates: tuple[float, ...] = ()
    online_period: int = ONLINE_PERIOD
    overrides: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """JSON."""
        raw = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"base": self.base.to_dict()}
        del raw["overrides"]
        return json.loads(json.dumps(raw))

    def command(self, out: Path) -> str:
        """The command line that goes on with it, or makes it again elsewhere."""
        base = self.base
        words = ["nestlearn", "compare", "--models", *self.models, "--params", str(self.params)]
        words += ["--tokens", str(base.tokens), "--tune-tokens", str(self.tune_tokens), "--seeds", str(self.seeds)]
        words += ["--rates", *(f"{rate:g}" for rate in self.rates), "--tokenizer", base.tokenizer]
        if self.online_rates:
            words += ["--online-rates", *(f"{rate:g}" for rate in self.online_rates)]
            words += ["--online-period", str(self.online_period)]
        words += ["--text", *base.text] if base.text else []
        words += ["--held-out", *base.held_out] if base.held_out else []
        words += ["--out", str(out)]
        return shlex.join([*words, *(["--set", *self.overrides] if self.overrides else [])])


def make_plan(
    models: tuple[str, ...],
    params: int,
    given: dict[str, Any],
    *,
    seeds: int = 3,
    rates: tuple[float, ...] = RATES,
    tune_tokens: int | None = None,
    online_rates: tuple[float, ...] = (),
    online_period: int = ONLINE_PERIOD,
    overrides: tuple[str, ...] = (),
) -> Plan:
    """``given`` are fields of TrainConfig, ``overrides`` its settings as key=value, for all models."""
    _check(params, seeds, rates)
    _check_rates("--online-rates", online_rates)
    if online_period < 1:
        raise UserError(f"--online-period is {online_period}: must be at least 1 token")
    _refuse_solved(overrides)
    base = TrainConfig(name="compare", **given).replace(overrides)
    # a line of metrics per hundredth of a run, a checkpoint per tenth: the longer runs lose no more to an interruption
    paces = {"log_every": base.tokens // 100, "checkpoint_every": base.tokens // 10}
    chosen = {override.partition("=")[0] for override in overrides}
    base = dataclasses.replace(base, **{k: max(1, v) for k, v in paces.items() if k not in chosen})
    base = with_shape(models, base, params, vocabulary(base))
    tune = tune_tokens or math.ceil(base.tokens / TUNE_SHARE)
    if tune > base.tokens:
        raise UserError(f"--tune-tokens is {tune:,}, more than the {base.tokens:,} of --tokens: give fewer")
    return Plan(models, params, base, seeds, rates, tune, online_rates, online_period, overrides)


def parse_rates(words: tuple[str, ...], option: str = "--rates") -> tuple[float, ...]:
    """ "1e-3,2e-3" "4e-3" -> three rates."""
    texts = [text for word in words for text in word.split(",") if text.strip()]
    try:
        return tuple(float(text) for text in texts)
    except ValueError:
        raise UserError(f"{option} {' '.join(words)}: must be numbers, for example 1e-3,2e-3,4e-3") from None


def open_folder(out: Path, plan: Plan, corpus: dict[str, str]) -> None:
    """Makes ``out`` the plan's, on text of these sums. UserError where it holds another comparison or anything else."""
    path, settings = out / PLAN, plan.settings() | corpus
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(child.name != "lock" for child in out.iterdir())):
            raise UserError(f"--out {out} exists and holds no comparison: name a new or empty folder")
        out.mkdir(parents=True, exist_ok=True)
    elif changed := _difference(_read(path, settings), settings):
        raise UserError(f"--out {out} holds a comparison with {changed}: name another folder, or the same settings")
    write_json(path, settings)


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """A lock on ``out``, held by whoever has the descriptor: also a unit that is still saving after a kill."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out} is in use by another nestlearn compare: wait for it, or stop it") from None
        yield file.fileno()


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def filled(config: dict[str, Any]) -> dict[str, Any]:
    """A TrainConfig that an earlier version has written, with the defaults of the settings that it did not have."""
    return TrainConfig.from_dict(config).to_dict()


def _read(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What is there; the period of reading online is free as long as nothing was read so."""
    old = json.loads(path.read_text())
    old |= {"base": filled(old["base"])}
    return old if old.get("online_rates") else old | {"online_period": settings["online_period"]}


def _check(params: int, seeds: int, rates: tuple[float, ...]) -> None:
    if params < 1:
        raise UserError(f"--params is {params}: must be at least 1")
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}: must be at least 1")
    if not rates:
        raise UserError("--rates names none: give at least one learning rate")
    _check_rates("--rates", rates)


def _check_rates(option: str, rates: tuple[float, ...]) -> None:
    if any(not 0 < rate <= 10 for rate in rates) or list(rates) != sorted(set(rates)):
        raise UserError(f"{option} {', '.join(map(str, rates))}: must be increasing numbers above 0 and at most 10")


def _refuse_solved(overrides: tuple[str, ...]) -> None:
    why = {
        "model.mixer": "--models names it",
        "model.intermediate_size": "it is solved for --params",
        "learning_rate": "--rates names those to choose from",
        "name": "--models names it",
    }
    for override in overrides:
        key = override.partition("=")[0]
        if key in why:
            raise UserError(f"--set {key}: {why[key]}, leave it out")


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first setting that differs, in words, or nothing."""
    flat_old, flat_new = _flat(old), _flat(new)
    for key in dict.fromkeys([*flat_old, *flat_new]):
        if key not in MAY_GROW and flat_old.get(key) != flat_new.get(key):
            return f"{key.removeprefix('base.')} {flat_old.get(key)!r}, not {flat_new.get(key)!r}"
    return ""


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k != "base"} | {f"base.{k}": v for k, v in settings["base"].items()}
