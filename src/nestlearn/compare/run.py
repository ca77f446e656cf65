"""A comparison from beginning to end: sizes, costs, rates, then seed by seed; every step is a unit that can be resumed.

OUT/plan.json   OUT/units/MODEL/{speed-1 …, rate-2e-3 …, seed-0 …}/   OUT/results.json table.md compare.html
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nestlearn.compare.child import Launch, do_unit, launcher
from nestlearn.compare.contenders import Contender, enter
from nestlearn.compare.page import write_page
from nestlearn.compare.plan import Plan, locked, open_folder, write_json
from nestlearn.compare.results import combine, markdown
from nestlearn.errors import UserError
from nestlearn.train.build import read_corpus, vocabulary

TRAIN, SPEED, READ = (f"nestlearn.compare.{kind}_unit" for kind in ("train", "speed", "read"))
ROUNDS, STEPS, DECODED = 3, 3, 32  # of measuring: rounds in which the models take turns, training steps, tokens
HIGHEST_RATE = 10.0  # that a TrainConfig takes

Say = Callable[[str], None]


class Tuning(NamedTuple):
    """rates: held-out bits per byte by rate, None where training broke down. chosen: None where it always did."""

    rates: dict[float, float | None]
    chosen: float | None
    note: str = ""


@dataclasses.dataclass
class Course:
    """A comparison under way."""

    plan: Plan
    out: Path
    contenders: Sequence[Contender]
    launch: Launch
    say: Say

    def folder(self, contender: Contender, unit: str) -> Path:
        return self.out / "units" / folder_name(contender.label) / unit


def run_comparison(plan: Plan, out: Path, say: Say, launch: Launch | None = None) -> dict[str, Any]:
    """Does what is still to do and returns what results.json holds. ``launch`` replaces the processes, for tests."""
    vocab_size = vocabulary(plan.base)
    contenders = [enter(label, plan.base, plan.params, vocab_size) for label in plan.models]
    corpus = read_corpus(plan.base.text, plan.base.held_out, plan.base.held_out_per_document)
    with locked(out) as lock:
        sums = {"train_sha256": corpus.train.sha256, "held_out_sha256": corpus.held_out.sha256}
        open_folder(out, plan, sums)
        say(f"{corpus.summary}\n{_sizes(contenders)}")
        course = Course(plan, out, contenders, launch or launcher(lock), say)
        del corpus
        try:
            return _stages(course)
        except KeyboardInterrupt:
            raise UserError(f"stopped, all that was trained is saved: go on with {plan.command(out)}") from None


def _stages(course: Course) -> dict[str, Any]:
    speeds = measure_speeds(course)
    tunings = {contender.label: tune(course, contender) for contender in course.contenders}
    runs: dict[str, list[dict[str, Any]]] = {contender.label: [] for contender in course.contenders}
    online: dict[str, Tuning] = {}
    results: dict[str, Any] = {}
    for number in range(course.plan.seeds):
        for contender in course.contenders:
            if (rate := tunings[contender.label].chosen) is not None:
                run = train(course, contender, rate, course.plan.base.seed + number)
                runs[contender.label].append(run | read_as_stream(course, contender, run, online))
        results = combine(course.plan, course.out, course.contenders, speeds, tunings, runs, online)
        write(course.out, results)
        course.say(f"after {number + 1} of {course.plan.seeds} seeds:\n{markdown(results)}")
    return results


def measure_speeds(course: Course) -> dict[str, list[dict[str, Any]]]:
    """The models take turns, in every second round backwards, so that no one has the quiet minutes for itself."""
    found: dict[str, list[dict[str, Any]]] = {contender.label: [] for contender in course.contenders}
    for number in range(1, ROUNDS + 1):
        for contender in course.contenders[:: 1 if number % 2 else -1]:
            unit = {"config": contender.config.to_dict(), "steps": STEPS, "decode": DECODED}
            result = do_unit(SPEED, course.folder(contender, f"speed-{number}"), unit, course.launch)
            found[contender.label].append(result)
            course.say(f"{contender.label}, round {number} of {ROUNDS}: {_costs(result)}")
    return found


def _costs(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"broke down: {result['failed']}"
    return (
        f"{result['train_tokens_per_second']:,.0f} tokens/s of training, {result['train_peak_bytes'] / 2**20:,.0f} MiB"
    )


def tune(course: Course, contender: Contender) -> Tuning:
    """The learning rate that a model is trained with."""
    if len(course.plan.rates) == 1:
        return Tuning({}, course.plan.rates[0], "one rate, not tuned")
    tuning = search(course.plan.rates, lambda rate: _tried(course, contender, rate))
    course.say(f"{contender.label}: {_rates(tuning)}")
    return tuning


def search(rates: Sequence[float], bits: Callable[[float], float | None]) -> Tuning:
    """The best rate of a grid, which is extended by one where the best is at its edge."""
    tried = {rate: bits(rate) for rate in rates}
    best, note = best_rate(tried), ""
    further = None if best is None or len(rates) < 2 else next_rate(rates, best)
    if further is not None:
        tried[further] = bits(further)
        note = f"{best:g} was the edge of the grid: {further:g} was tried too"
        best = best_rate(tried)
        note += ", and is still the edge" if best == further else ""
    return Tuning(dict(sorted(tried.items())), best, note if best else "broke down at every rate")


def best_rate(tried: dict[float, float | None]) -> float | None:
    worked = {rate: bits for rate, bits in tried.items() if bits is not None}
    return min(worked, key=lambda rate: worked[rate]) if worked else None


def next_rate(rates: Sequence[float], best: float) -> float | None:
    """The rate beyond the edge that ``best`` is, in the proportion of the last two; None inside the grid."""
    if best == rates[0]:
        beyond = rates[0] ** 2 / rates[1]
    elif best == rates[-1]:
        beyond = rates[-1] ** 2 / rates[-2]
    else:
        return None
    return float(f"{beyond:.6g}") if beyond <= HIGHEST_RATE else None


def train(course: Course, contender: Contender, rate: float, seed: int) -> dict[str, Any]:
    """One model with one seed, on all tokens."""
    plan = course.plan
    name = f"{contender.label}, seed {seed}"
    changes = {"name": name, "tokens": plan.base.tokens, "learning_rate": rate, "seed": seed}
    result = _trained(course, contender, f"seed-{seed}", changes, keep=True)
    folder = course.folder(contender, f"seed-{seed}").relative_to(course.out)
    return {"seed": seed, "folder": folder.as_posix(), **result}


def read_as_stream(
    course: Course, contender: Contender, run: dict[str, Any], online: dict[str, Tuning]
) -> dict[str, Any]:
    """``stream``: what a trained model makes of whole documents, as it is and while its levels learn from them.

    The first seed that can be read chooses the rate, kept in ``online``, for the others.
    """
    if not course.plan.online_rates or run["bits_per_byte"] is None:
        return {}
    label, trained = contender.label, f"seed-{run['seed']}"

    def reading(rate: float) -> dict[str, Any]:
        unit = {"config": contender.config.to_dict(), "trained": trained, "rate": rate}
        folder = course.folder(contender, f"read-{trained}-{rate:g}")
        return do_unit(READ, folder, unit | {"period": course.plan.online_period}, course.launch)

    frozen = reading(0.0)
    if label not in online:
        online[label] = search(course.plan.online_rates, lambda rate: reading(rate)["bits_per_byte"])
    chosen = online[label].chosen
    learning = None if chosen is None else reading(chosen)
    course.say(f"{label}, {trained}, as a stream: {_bits(frozen)}, learning from it {_bits(learning)}")
    return {"stream": {"frozen": frozen, "learning": learning}}


def _bits(result: dict[str, Any] | None) -> str:
    bits = None if result is None else result["bits_per_byte"]
    return "no finite number" if bits is None else f"{bits:.4f} bits per byte"


def _tried(course: Course, contender: Contender, rate: float) -> float | None:
    changes = {
        "name": f"{contender.label}, rate {rate:g}",
        "tokens": course.plan.tune_tokens,
        "learning_rate": rate,
        "seed": course.plan.base.seed,
    }
    return _trained(course, contender, f"rate-{rate:g}", changes, keep=False)["bits_per_byte"]


def _trained(course: Course, contender: Contender, unit: str, changes: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    config = dataclasses.replace(contender.config, **changes)
    unit_folder = course.folder(contender, unit)
    result = do_unit(TRAIN, unit_folder, {"config": config.to_dict(), "keep": keep}, course.launch)
    bits = result["bits_per_byte"]
    course.say(f"{config.name}: {result['failed'] if bits is None else f'{bits:.4f} bits per byte'}")
    return result


def write(out: Path, results: dict[str, Any]) -> None:
    """results.json, table.md and compare.html."""
    write_json(out / "results.json", results)
    (out / "table.md").write_text(markdown(results) + "\n", encoding="utf-8")
    write_page(out, results)


def folder_name(label: str) -> str:
    """The label where it can be the name of a folder; else what can be kept of it, and a sum of all."""
    if re.fullmatch(r"[A-Za-z0-9_]+", label):
        return label
    return f"{re.sub(r'[^A-Za-z0-9_.=]+', '-', label)[:60]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _sizes(contenders: Sequence[Contender]) -> str:
    model = contenders[0].config.model
    shape = f"{model['num_hidden_layers']} layers of width {model['hidden_size']}, {model['num_attention_heads']} heads"
    rows = (f"  {c.label}: {c.parameters:,} parameters with {c.width:,} hidden units per layer" for c in contenders)
    return "\n".join([f"all models: {shape}", *rows])


def _rates(tuning: Tuning) -> str:
    tried = ", ".join(f"{r:g} {'broke down' if b is None else f'{b:.4f}'}" for r, b in tuning.rates.items())
    chosen = "no rate" if tuning.chosen is None else f"rate {tuning.chosen:g}"
    return f"{chosen} ({tried})" + (f"; {tuning.note}" if tuning.note else "")
