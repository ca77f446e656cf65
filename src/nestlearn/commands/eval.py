"""``nestlearn eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from nestlearn.commands.common import open_checkpoint, shown


def evaluate(
    checkpoint: Positional[Path],
    text: Annotated[tuple[str, ...], shown("PATH …", "what the run has held out")] = (),
    tokenizer: Annotated[str | None, shown("SPEC", "the checkpoint's")] = None,
    tokens: Annotated[str | None, shown("N", "as in training")] = None,
) -> None:
    """Bits per byte of a checkpoint, beside xz -9 and bz2 -9 of the same bytes.

    Args:
        checkpoint: A checkpoint, or the folder of a run.
        text: Files and folders to read, all of them.
        tokenizer: Must be the checkpoint's own; checked if given.
        tokens: Evaluate at most so many.
    """
    import dataclasses

    from nestlearn.data.tokens import tokenize
    from nestlearn.eval.compression import compression
    from nestlearn.eval.perplexity import measured_bytes
    from nestlearn.train.build import load_model, read_corpus
    from nestlearn.train.config import parse_count
    from nestlearn.train.run import evaluate

    found = open_checkpoint(checkpoint)
    config = dataclasses.replace(found.config, held_out_tokens=parse_count(tokens)) if tokens else found.config
    own = found.tokenizer(tokenizer)
    corpus = read_corpus(text) if text else read_corpus(config.text, config.held_out, config.held_out_per_document)
    ids = tokenize((*corpus.train, *corpus.held_out) if text else corpus.held_out, own)
    measured = evaluate(load_model(found.folder), ids, own, config)
    packed = compression(measured_bytes(ids, own, config.held_out_tokens))
    print(corpus.summary)
    print(f"{measured.bits_per_byte:.3f} bits per byte of {measured.bytes:,} bytes, {measured.tokens:,} tokens")
    print(f"{packed.xz:.3f} xz -9\n{packed.bz2:.3f} bz2 -9")
