"""What a training run is: one frozen dataclass, every number with its unit and range, checked when it is made."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nestlearn.errors import UserError, suggest

OPTIMIZERS = ("adamw", "muon", "m3", "delta_momentum", "dmgd")  # what they are: train/optimizers.py
META, ORDERS = ("levels", "order", "connection", "warmup"), ("first", "exact")  # levels in context: continual/meta.py
META_WARMUP = 0.1  # of the inner rates
_MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


def _number(default: float, unit: str, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    """A field with a unit, in [low, high], or in (low, high] if ``above``."""
    return field(default=default, metadata={"unit": unit, "low": low, "high": high, "above": above})


@dataclass(frozen=True)
class TrainConfig:
    """A run, complete: the same config, text and number of threads give the same bits.

    name       the preset's name, e.g. "tiny-cpu"
    model      keyword arguments of ``HopeConfig``; vocab_size is the tokenizer's unless given
    text       files and folders to read; empty: the source of the Python standard library
    held_out   files and folders to evaluate on, ``text`` being trained on in full; empty: a split of ``text``
    tokenizer  "bytes", a `tokenizers` JSON file or a Hugging Face folder
    optimizer  of the matrices, one of OPTIMIZERS; what is not a matrix is AdamW's
    meta       empty: ordinary training. Else the model is trained to learn in context (docs/continual.md): "levels",
               as HopeConfig's in_context; "order", "first" or "exact"; "connection", as OnlineLearner has it; "warmup",
               the share of all tokens in which the inner rates rise from 0 to what they are learned from
    optimizer_settings  its keyword arguments that differ from its defaults, e.g. {"slow_period": 32} for "m3"

    Raises UserError for a value of the wrong type or out of its range.
    """

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    text: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    optimizer: str = "adamw"
    optimizer_settings: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    carry_state: bool = False  # each row of a batch goes on in the text, its state too, where the last batch ended
    pack_documents: bool = False  # the documents in a sequence are read apart, each from a new state
    tokens: int = _number(1_000_000, "tokens in all, rounded up to whole steps", 1)
    batch_size: int = _number(8, "sequences per step", 1)
    sequence_length: int = _number(512, "tokens per sequence", 2)
    seed: int = _number(0, "of the initial weights and the order of the text", 0, 2**63 - 1)

    learning_rate: float = _number(3e-3, "per step, at its peak", 0, 10, above=True)
    warmup: float = _number(0.05, "share of all tokens in which the rate rises from 0", 0, 1)
    final_rate: float = _number(0.1, "share of the peak that the cosine ends at", 0, 1)
    beta1: float = _number(0.9, "decay of AdamW's first moment per step of its level", 0, 0.999999)
    beta2: float = _number(0.95, "decay of AdamW's second moment per step of its level", 0, 0.999999)
    epsilon: float = _number(1e-8, "added to the root of the second moment", 0, 1, above=True)
    weight_decay: float = _number(0.1, "per step, times the rate, on matrices", 0, 10)
    adamw_scale: float = _number(1.0, "rate of what AdamW steps, as a multiple of learning_rate", 0, 1000, above=True)
    clip_norm: float = _number(1.0, "largest L2 norm of a step's gradient", 0, above=True)

    log_every: int = _number(40_960, "tokens between two lines of metrics.jsonl", 1)
    checkpoint_every: int = _number(1_000_000, "tokens between two checkpoints", 1)
    held_out_per_document: int = _number(2**63 - 1, "bytes of each held-out document that are kept, at most", 1)
    held_out_tokens: int = _number(200_000, "held-out tokens that are evaluated at the end, at most", 1)
    sample_tokens: int = _number(300, "tokens of the generated sample", 1)
    compare_rate_zero: bool = False  # train a twin whose memories do not adapt, at the same budget

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if f.metadata:
                object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        _require(isinstance(self.name, str) and self.name != "", "name", self.name, "a word")
        _require(isinstance(self.model, Mapping), "model", self.model, "a dictionary of HopeConfig's arguments")
        _require(isinstance(self.tokenizer, str), "tokenizer", self.tokenizer, "bytes or a path")
        for switch in ("compare_rate_zero", "carry_state", "pack_documents"):
            _require(isinstance(getattr(self, switch), bool), switch, getattr(self, switch), "true or false")
        both = self.carry_state and self.pack_documents
        _require(not both, "pack_documents", self.pack_documents, "false where carry_state is true")
        near = suggest(str(self.optimizer), OPTIMIZERS)
        _require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, f"one of {', '.join(OPTIMIZERS)}{near}")
        settings = self.optimizer_settings
        _require(isinstance(settings, Mapping), "optimizer_settings", settings, "a dictionary of its arguments")
        _check_meta(self.meta)
        for switch in ("carry_state", "pack_documents"):
            if self.meta and getattr(self, switch):
                raise UserError(f"{switch} is true, but each sequence of meta is one new stream: leave one of them out")
        for name in ("text", "held_out"):
            paths = getattr(self, name) if isinstance(getattr(self, name), list | tuple) else (getattr(self, name),)
            _require(all(isinstance(path, str) for path in paths), name, getattr(self, name), "a list of paths")
            object.__setattr__(self, name, tuple(paths))

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    def to_dict(self) -> dict[str, Any]:
        """A form that strict JSON can hold; ``from_dict`` is its inverse."""
        raw = dataclasses.asdict(self) | {"text": list(self.text), "held_out": list(self.held_out)}
        return {name: "inf" if value == math.inf else value for name, value in raw.items()}

    def command(self) -> str:
        """The command line that makes this run on any machine that has its text."""
        words = ["nestlearn", "train", "--preset", self.name]
        words += ["--text", *self.text] if self.text else []
        settings = {k: v for k, v in self.to_dict().items() if k not in ("name", "text")}
        words += ["--set", *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in settings.items())]
        return shlex.join(words)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TrainConfig:
        """UserError for an unknown key, with the nearest known one."""
        for key in raw:
            _check_key(key)
        return cls(**raw)

    def replace(self, overrides: Iterable[str]) -> TrainConfig:
        """A copy with ``key=value`` set, e.g. ``learning_rate=1e-3`` or ``model.memory.rate_max=0.5``."""
        raw = self.to_dict()
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals:
                raise UserError(f"--set {override!r} has no '=': write key=value, for example learning_rate=1e-3")
            _check_key(key.split(".")[0])
            _set(raw, key.split("."), parse_value(value), key)
        return TrainConfig.from_dict(raw)


def parse_count(text: str, of: str = "tokens") -> int:
    """20k -> 20_000, 5M -> 5_000_000, 1.5G -> 1_500_000_000, 4096 -> 4096. UserError for anything else."""
    match = re.fullmatch(r"([0-9][0-9_]*\.?[0-9]*(?:[eE][0-9]+)?)([kMGB]?)", text.strip())
    count = float(match[1]) * _MULTIPLES[match[2]] if match else math.nan
    if not count >= 1 or count != round(count):
        raise UserError(f"{text!r} is not a number of {of}: write for example 4096, 20k or 5M")
    return int(count)


def parse_value(text: str) -> Any:
    """JSON or a Python literal where it is one (1e-3, [4096, 16384], true, inf), else the text itself."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _check_meta(meta: Any) -> None:
    _require(isinstance(meta, Mapping), "meta", meta, f"a dictionary of {', '.join(META)}")
    for key in meta:
        if key not in META:
            raise UserError(f"unknown key 'meta.{key}'{suggest(str(key), META)}: known are {', '.join(META)}")
    _require(not meta or bool(meta.get("levels")), "meta.levels", meta.get("levels"), "{'fast': {'period': 64}}, say")
    order, warmup = meta.get("order", ORDERS[0]), meta.get("warmup", META_WARMUP)
    _require(order in ORDERS, "meta.order", order, f"one of {', '.join(ORDERS)}{suggest(str(order), ORDERS)}")
    number = isinstance(warmup, int | float) and 0 <= warmup <= 1
    _require(number, "meta.warmup", warmup, "a share of all tokens, from 0 to 1")


def _checked(f: dataclasses.Field[Any], value: Any) -> int | float:
    """The value as the field's type, in its range."""
    kind, low, high, above = f.type, f.metadata["low"], f.metadata["high"], f.metadata["above"]
    if isinstance(value, str):
        value = _number_in(value, kind)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = is_number and (value > low if above else value >= low) and value <= high
    whole = fits and (kind != "int" or value == int(value))
    rule = f"a {'whole ' if kind == 'int' else ''}number {'above' if above else 'of at least'} {low:g}"
    rule += f" and at most {high:g}" if high < math.inf else ""
    _require(whole, f.name, value, f"{rule} ({f.metadata['unit']})")
    return int(value) if kind == "int" else float(value)


def _number_in(text: str, kind: Any) -> Any:
    try:
        return parse_count(text) if kind == "int" else float(text)
    except ValueError:
        return text


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value!r}: must be {rule}")


def _check_key(key: str) -> None:
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    if key not in known:
        raise UserError(f"unknown key {key!r}{suggest(key, known)}: known keys are {', '.join(known)}")


def _set(raw: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    for part in path[:-1]:
        if not isinstance(raw.setdefault(part, {}), dict):
            raise UserError(f"--set {key}: {part!r} is {raw[part]!r}, it has no keys of its own")
        raw[part] = dict(raw[part])  # the preset's own dictionary stays as it is
        raw = raw[part]
    raw[path[-1]] = value
