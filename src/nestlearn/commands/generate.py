"""``nestlearn generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from nestlearn.commands.common import open_checkpoint, shown


def generate(
    checkpoint: Positional[Path],
    prompt: str,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    tokenizer: Annotated[str | None, shown("SPEC", "the checkpoint's")] = None,
) -> None:
    """Continue a text.

    Args:
        checkpoint: A checkpoint, or the folder of a run.
        prompt: The text to continue.
        tokens: How many to add, at most.
        temperature: 0 takes the likeliest token, 1 samples as the model predicts.
        top_k: Sample among the k likeliest tokens; 0 among all.
        seed: The same seed gives the same text.
        tokenizer: Must be the checkpoint's own; checked if given.
    """
    from nestlearn.train.build import load_model
    from nestlearn.train.sample import continue_text

    found = open_checkpoint(checkpoint)
    own = found.tokenizer(tokenizer)
    options: dict[str, Any] = {"tokens": tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
    text = continue_text(load_model(found.folder), own, prompt.encode(), **options)
    print(prompt + text.decode(errors="replace"))
