"""A comparison so small that it takes seconds, run in this process."""

import importlib
import json
from pathlib import Path

from nestlearn.compare.child import RESULT, UNIT
from nestlearn.compare.plan import Plan, make_plan
from tests.train.tiny import write_text

SETTINGS = (
    "model.hidden_size=16",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    'model.memory={"chunk": 8}',
    "batch_size=2",
    "sequence_length=16",
    "held_out_tokens=100",
)


def plan(folder: Path, models=("transformer", "retnet"), overrides=SETTINGS, tokens=256, **changes) -> Plan:
    given = {"text": (str(write_text(folder / "text")),), "tokens": tokens}
    return make_plan(
        models,
        9_000,
        given,
        overrides=overrides,
        **{"seeds": 2, "tune_tokens": 64, "rates": (1e-3, 2e-3, 4e-3), **changes},
    )


def in_process(module: str, folder: Path) -> int:
    return importlib.import_module(module).main(folder)


class Counted:
    """Runs units here, and notes them; ``stop_at`` is the number of the one that is interrupted before it starts."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.units: list[str] = []
        self.stop_at = stop_at

    def __call__(self, module: str, folder: Path) -> int:
        if len(self.units) == self.stop_at:
            raise KeyboardInterrupt
        self.units.append(f"{folder.parent.name}/{folder.name}")
        return in_process(module, folder)


class Pretended:
    """Units without work: bits per byte are a function of model and config, None for a breakdown.

    costless  a model that breaks down in the steps that are timed
    read      bits per byte of a stream as a function of the rate
    """

    def __init__(self, bits, costless=None, read=None) -> None:
        self.bits, self.costless, self.read = bits, costless, read

    def __call__(self, module: str, folder: Path) -> int:
        unit = json.loads((folder / UNIT).read_text())
        config = unit["config"]
        result = {"train_tokens_per_second": 100.0, "train_peak_bytes": 2**20, "threads": 1}
        result |= {"decode_tokens_per_second": 10.0, "state_bytes": 2048}
        if folder.parent.name == self.costless:
            result = {"failed": "a gradient is not finite"}
        if module.endswith("train_unit"):
            bits = self.bits(folder.parent.name, config)
            result = {"bits_per_byte": bits, "failed": "the loss is nan"}
            if bits is not None:
                result = {"bits_per_byte": bits, "perplexity": 2**bits, "by_position": [3.0, 2.0], "tokens": 1}
        if module.endswith("read_unit"):
            result = {"bits_per_byte": self.read(unit["rate"])}
        (folder / RESULT).write_text(json.dumps(result))
        return 0
