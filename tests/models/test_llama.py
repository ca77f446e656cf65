"""The Transformer baseline, mixer "transformer", is Llama, weight for weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn import HopeConfig, HopeForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
}


def ours(**settings) -> HopeForCausalLM:
    torch.manual_seed(0)
    return HopeForCausalLM(HopeConfig(**{"mixer": "transformer", "rope_theta": 500.0, **SIZES, **settings})).eval()


def llama(tied: bool) -> LlamaForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope, tie_word_embeddings=tied)).eval()


def shuffle(model: torch.nn.Module) -> None:
    """Weights far from their start, norms included, so that every one of them matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)


def as_llama(model: HopeForCausalLM) -> dict[str, Tensor]:
    """Our weights under Llama's names; the norms of our levels have no weights: ones."""
    named = {"model.embed_tokens.weight": model.embedding.weight, "lm_head.weight": model.lm_head.weight}
    named["model.norm.weight"] = model.model.norm.weight
    for number, block in enumerate(model.model.layers):
        ((_, mlp),) = block.cms.by_level()
        query, key, value = block.mixer.project.weight.chunk(3)
        parts = {
            "input_layernorm": block.norm.weight,
            "post_attention_layernorm": torch.ones_like(block.norm.weight),
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": block.mixer.out.weight,
            **{f"mlp.{name}_proj": getattr(mlp, name).weight for name in ("gate", "up", "down")},
        }
        named |= {f"model.layers.{number}.{name}.weight": weight for name, weight in parts.items()}
    return named


@torch.no_grad()
def take(model: HopeForCausalLM, given: dict[str, Tensor]) -> None:
    """Llama's weights into ours; its norm before the MLP folds into the MLP's first layer."""
    for name, weight in as_llama(model).items():
        if "post_attention" in name:
            continue
        source = given[name]
        if "gate_proj" in name or "up_proj" in name:
            layer = name.split(".mlp")[0]
            source = source * given[f"{layer}.post_attention_layernorm.weight"]
        weight.copy_(source)


@torch.no_grad()
def gap(first: torch.nn.Module, second: torch.nn.Module) -> float:
    ids = torch.randint(SIZES["vocab_size"], (3, 40), generator=torch.Generator().manual_seed(2))
    logits = first(ids).logits
    assert logits.std() > 0.3
    return (logits - second(ids).logits).abs().max().item()


@pytest.mark.parametrize("tied", [True, False])
def test_llamas_weights_in_our_model_give_llamas_logits(tied):
    theirs, model = llama(tied), ours(tie_word_embeddings=tied)
    shuffle(theirs)
    assert gap(theirs, model) > 0.1
    take(model, dict(theirs.state_dict()))
    assert gap(theirs, model) <= 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_our_weights_in_llama_give_our_logits(tied):
    theirs, model = llama(tied), ours(tie_word_embeddings=tied)
    shuffle(model)
    theirs.load_state_dict(as_llama(model), strict=True)
    assert gap(theirs, model) <= 1e-5


def test_there_are_as_many_parameters_but_for_the_folded_norms():
    theirs, model = (sum(p.numel() for p in m.parameters()) for m in (llama(True), ours()))
    assert theirs - model == SIZES["num_hidden_layers"] * SIZES["hidden_size"]


def test_it_is_hope_attention_over_one_level_of_period_1():
    model, other = ours(), ours(mixer="attention", levels=[1])
    shuffle(model)
    other.load_state_dict(model.state_dict(), strict=True)
    assert gap(model, other) == 0
