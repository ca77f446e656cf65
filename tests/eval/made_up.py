"""A run folder and a traced passage with invented numbers of a plausible shape, for tests of the report."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from nestlearn.eval.passage import Passage, passage
from nestlearn.eval.run_record import (
    METRICS_FILE_NAME,
    RATE_ZERO_FOLDER,
    CorpusRecord,
    Evaluation,
    LevelRecord,
    Results,
    RunRecord,
    Sample,
    write_record,
)
from nestlearn.models.trace import MemorySignal

NASTY = '<script>alert("&amp;")</script> \'"`é\x00\x1c\xff'
TEXT = b'''def join_words(words, sep=" "):
    """Join <words> & keep the order: na\xc3\xafve, but clear."""
\treturn sep.join(w.strip() for w in words if w)


class Counter(dict):
    def __missing__(self, key):
        return 0

    def most_common(self, n=None):
        items = sorted(self.items(), key=lambda item: item[1], reverse=True)
        return items if n is None else items[:n]
\x1c# </script><b>not bold</b>
\xff\xfe end
'''


def traced(text: bytes = TEXT, layers: int = 2, memories: bool = True, seed: int = 0) -> Passage:
    """Bytes as tokens; surprise high where a byte is rare, state norms that level off."""
    draw = np.random.default_rng(seed)
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    rarity = -np.log(counts[np.frombuffer(text, np.uint8)] / len(text))
    signals = [signal for layer in range(layers) for signal in _layer(layer, rarity, memories, draw)]
    loss = torch.tensor(np.abs(rarity[1:] * 0.5 + draw.normal(0, 0.5, len(text) - 1)))
    return passage([bytes([b]) for b in text], loss, signals, "lib/<made up>.py")


def _layer(layer: int, rarity: np.ndarray, memories: bool, draw: np.random.Generator) -> list[MemorySignal]:
    tokens, signals = len(rarity), []
    retain = 1 - 1e-4 * np.exp(draw.normal(0, 0.5, tokens))
    rate = np.exp(0.3 * rarity + draw.normal(0, 0.2, tokens))
    for i, name in enumerate(("k", "v", "eta", "alpha", "memory") if memories else ()):
        surprise = 0.6 + 0.1 * rarity * (1 + 0.2 * i) + draw.normal(0, 0.05, tokens)
        norm = (2 + i) * (1 - 0.5 * np.exp(-np.arange(tokens) / 120)) + draw.normal(0, 0.01, tokens)
        scaled = rate if name == "memory" else rate * 0.02
        signals.append(
            MemorySignal(
                f"layer {layer} / {'memory' if name == 'memory' else 'M_' + name}",
                64,
                *map(torch.tensor, (surprise, scaled, retain, norm)),
            )
        )
    for level in (512, 4096):
        surprise = torch.tensor(np.exp(draw.normal(-6, 0.4, tokens)) * (1 + (level < 1000)))
        signals.append(MemorySignal(f"layer {layer} / CMS every-{level}", level, surprise, None, None, None))
    return signals


def record(**changes) -> RunRecord:
    position = 2.0 + 3 * np.exp(-np.arange(1024) / 12) + 0.4 * np.exp(-np.arange(1024) / 300)
    noise = np.random.default_rng(1).normal(0, 0.06, (2, 1024))
    twin = position + 0.12 * (1 - np.exp(-np.arange(1024) / 250))
    hope, zero = (
        Evaluation(b, 400_000, 400_000, (p + n).tolist())
        for b, p, n in zip((2.07, 2.16), (position, twin), noise, strict=True)
    )
    rows = [
        LevelRecord("layers / memory", 1, "dot product", "tokens of the stream", 32_768, "DGD with momentum"),
        LevelRecord(
            "layers / k, v, eta, alpha", 1, "dot product", "tokens of the stream", 131_072, "DGD with momentum"
        ),
        LevelRecord("layers / every-512", 512, "next-token loss", "chunks of 512 tokens", 98_304, "AdamW"),
        LevelRecord("embeddings, projections", 4096, "next-token loss", "the corpus", 180_000, "AdamW"),
        LevelRecord("layers / every-16384", 16_384, "next-token loss", "chunks of 16,384 tokens", 98_304, "AdamW"),
        LevelRecord("optimizer / first moment", 4096, "compress gradients", "gradients", 500_000, "AdamW"),
        LevelRecord("tokenizer", math.inf, "none", "none", 0, "frozen"),
    ]
    fields = {
        "name": "tiny-cpu",
        "command": "nestlearn train --preset tiny-cpu --seed 0",
        "seed": 0,
        "parameters": 541_236,
        "tokens": 1_638_400,
        "seconds": 251.7,
        "sequence_length": 1024,
        "tokenizer": "bytes",
        "date": "2026-01-01T12:00:00+00:00",
        "hardware": "a made-up machine with 2 threads",
        "versions": {"nestlearn": "0.1.0", "torch": "2.13.0", "python": "3.12.0"},
        "corpus": CorpusRecord(
            "the source of the Python standard library", 11_000_000, "ab" * 32, 1_200_000, "cd" * 32
        ),
        "results": Results(hope, 1.731, 1.842, zero),
        "sample": Sample("def read(path):", f"\n    return open(path)  # {NASTY}\n" * 6),
        "passage": list(TEXT),
        "passage_source": "lib/made_up.py",
        "levels": rows,
        "config": {"model": {"hidden_size": 128}, "note": NASTY},
    }
    return RunRecord(**fields | changes)


def write_run(run: Path, steps: int = 400, twin: bool = True, **changes) -> Path:
    """RUN/run.json and metrics.jsonl (and the twin's), no checkpoint."""
    write_record(run, record(**changes))
    for folder, floor in ((run, 2.0), (run / RATE_ZERO_FOLDER, 2.1))[: 1 + twin]:
        folder.mkdir(exist_ok=True)
        draw = np.random.default_rng(int(floor * 10))
        lines = [_line(step, floor + 6 / step**0.55 + draw.normal(0, 0.05)) for step in range(1, steps + 1)]
        (folder / METRICS_FILE_NAME).write_text("".join(lines))
    return run


def _line(step: int, loss: float) -> str:
    row = {"tokens": step * 4096, "seconds": step * 0.63, "loss_bits_per_byte": loss, "lr": 1e-3}
    return json.dumps(row | {"tokens_per_second": 6500, "grad_norm": 1.0}) + "\n"
