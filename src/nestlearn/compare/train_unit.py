"""One model trained, and measured on held-out text; in a process of its own (`child`)."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from nestlearn.compare.child import REASON, RESULT, STOPPED, UNIT, refuse
from nestlearn.compare.plan import write_json
from nestlearn.errors import NotFinite, UserError
from nestlearn.train.build import load_data
from nestlearn.train.checkpoint import checkpoints, find_checkpoint, load_checkpoint
from nestlearn.train.config import TrainConfig
from nestlearn.train.display import Display
from nestlearn.train.environment import commit, hardware, versions
from nestlearn.train.loop import Interrupted, train
from nestlearn.train.run import check_resumable, evaluate


def main(folder: Path) -> int:
    from rich.console import Console

    (folder / REASON).unlink(missing_ok=True)
    unit = json.loads((folder / UNIT).read_text())
    try:
        result = run_unit(TrainConfig.from_dict(unit["config"]), folder, Display(Console()))
    except Interrupted:
        return STOPPED
    except UserError as error:
        return refuse(folder, error)
    write_json(folder / RESULT, result)
    for old in checkpoints(folder)[: -1 if unit["keep"] else None]:
        shutil.rmtree(old)
    return 0


def run_unit(config: TrainConfig, folder: Path, display: Display) -> dict[str, Any]:
    """Trains, from the newest checkpoint if there is one, and evaluates.

    ``bits_per_byte`` is None where training or evaluation met a number that is none; ``failed`` then says so.
    """
    start = load_checkpoint(find_checkpoint(folder)) if checkpoints(folder) else None
    tokenizer = _tokenizer(config) if start is None else start.tokenizer()
    data = load_data(config, tokenizer)
    if start is not None:
        check_resumable(start, data)
    facts = {"commit": commit(), "hardware": hardware(), "versions": versions()}
    corpus = {"train_sha256": data.corpus.train.sha256, "held_out_sha256": data.corpus.held_out.sha256}
    try:
        model, progress = train(config, data, folder, start, display)
    except NotFinite as error:
        return {"bits_per_byte": None, "failed": str(error), **corpus, **facts}
    found = evaluate(model, data.held_out, data.tokenizer, config)
    if not math.isfinite(found.bits_per_byte):
        return {"bits_per_byte": None, "failed": "the loss on held-out text is not finite", **corpus, **facts}
    bits = found.bits_per_byte * found.bytes / found.tokens
    return {
        "bits_per_byte": found.bits_per_byte,
        "bits_per_token": bits,
        "perplexity": 2**bits,
        "held_out_tokens": found.tokens,
        "held_out_bytes": found.bytes,
        "by_position": found.by_position,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 2),
        **corpus,
        **facts,
    }


def _tokenizer(config: TrainConfig) -> Any:
    from nestlearn.data.tokens import load_tokenizer

    return load_tokenizer(config.tokenizer)
