"""A run so small that it takes a second or two: 32 tokens per step, levels at 1, 3 and 5 steps."""

import json
from pathlib import Path

import torch
from rich.console import Console

from nestlearn.train.build import load_data
from nestlearn.train.checkpoint import find_checkpoint, load_checkpoint
from nestlearn.train.config import TrainConfig
from nestlearn.train.display import Display
from nestlearn.train.loop import train

STEP = 32
SETTINGS = {
    "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
              "levels": [STEP, 3 * STEP, 5 * STEP], "memory": {"chunk": 8}},
    "tokens": 12 * STEP, "batch_size": 2, "sequence_length": 16, "log_every": 3 * STEP, "checkpoint_every": 4 * STEP,
    "held_out_tokens": 256, "sample_tokens": 8, "warmup": 0.2,
}  # fmt: skip


def write_text(folder: Path) -> Path:
    """Two documents of a few hundred bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("".join(f"{name} line {i * i % 97} of text\n" for i in range(60)))
    return folder


def config(folder: Path, **changes) -> TrainConfig:
    return TrainConfig(**{"name": "test", "text": (str(write_text(folder / "text")),), **SETTINGS, **changes})


def run(settings: TrainConfig, folder: Path, start: Path | None = None):
    """Trains into ``folder``, from a checkpoint or run if one is given."""
    checkpoint = None if start is None else load_checkpoint(find_checkpoint(start))
    from nestlearn.data.tokens import load_tokenizer

    data = load_data(settings, load_tokenizer(settings.tokenizer))
    return train(settings, data, folder, checkpoint, Display(Console(quiet=True)))


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without the times of the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def assert_same_end(one: Path, two: Path) -> None:
    """Two runs ended in the same bits: weights, optimizer, metrics, and the place in the text."""
    a, b = find_checkpoint(one), find_checkpoint(two)
    assert a.name == b.name
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    states = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (a, b)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, state in states[0]["state"].items():
        assert state.keys() == states[1]["state"][index].keys()
        for name, value in state.items():
            other = states[1]["state"][index][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    assert metrics(one) == metrics(two)
    progress = [json.loads((folder / "training.json").read_text())["progress"] for folder in (a, b)]
    for key in ("tokens", "batches", "sums", "steps"):
        assert progress[0][key] == progress[1][key]
