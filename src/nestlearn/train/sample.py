"""Text from a model, by Hugging Face's ``generate()``."""

from __future__ import annotations

from typing import Any

import torch

from nestlearn.data.tokens import Tokenizer
from nestlearn.errors import UserError


def continue_text(
    model: Any, tokenizer: Tokenizer, prompt: bytes, *, tokens: int, temperature: float, top_k: int, seed: int
) -> bytes:
    """What follows ``prompt``: up to ``tokens`` tokens, or to the end of the document. The same seed, the same text.

    temperature  >= 0; 0 takes the likeliest token          top_k  samples among the k likeliest tokens; 0 among all
    """
    ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None].to(next(model.parameters()).device)
    _check(ids.shape[1], tokens, temperature, top_k)
    chance = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature > 0 else {"do_sample": False}
    )
    ends = {"eos_token_id": tokenizer.separator_id, "pad_token_id": tokenizer.separator_id}
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **chance, **ends)
    new = out[0, ids.shape[1] :].tolist()
    return tokenizer.decode(new[:-1] if new and new[-1] == tokenizer.separator_id else new)


def _check(prompt: int, tokens: int, temperature: float, top_k: int) -> None:
    if prompt < 1:
        raise UserError("the prompt is empty: give at least one token of text")
    if tokens < 1:
        raise UserError(f"tokens is {tokens}: must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}: must be a number of at least 0 (0 takes the likeliest token)")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}: must be at least 0 (0 samples among all tokens)")
