"""Tiny random models, float64 and float32, with levels for their MLPs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nestlearn import HopeConfig, HopeForCausalLM, OnlineLevel

VOCABULARY = 31


def hope(**settings: Any) -> HopeForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = HopeConfig(**{**sizes, "intermediate_size": 36, "levels": [4, 8, 16], "memory": {"chunk": 4}, **settings})
    return HopeForCausalLM(config).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


MLPS = {
    "llama": [tuple(f"model.layers.{i}.mlp.{n}_proj" for n in ("gate", "up", "down")) for i in (1, 0)],
    "gpt2": [tuple(f"transformer.h.{i}.mlp.{n}" for n in ("c_fc", "c_proj")) for i in (1, 0)],
}
MODELS = {"llama": llama, "gpt2": gpt2, "hope": hope}


def levels(kind: str, periods: tuple[float, ...] = (4, 8), **settings: Any) -> list[OnlineLevel]:
    """By depth for Llama and GPT-2, the model's own for HOPE."""
    from nestlearn import online_levels

    settings = {"lr": 0.5, **settings}
    if kind == "hope":
        return list(online_levels(hope(), **settings))
    return [OnlineLevel(f"every-{p}", p, w, **settings) for p, w in zip(periods, MLPS[kind], strict=True)]


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Tokens (rows, length)."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
