"""Every mixer and every connection of the continuum passes the one contract of models."""

from typing import Any

import pytest
import torch

from nestlearn import HopeConfig
from tests.contracts.model import check_model, gap, large, read, tokens

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "levels": [64, 512],
    "tie_word_embeddings": False,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "16-4": {"memory": {"chunk": 16, "memory_chunk": 4}},
    "16-16": {"memory": {"chunk": 16}},
    "8-2, momentum": {"memory": {"chunk": 8, "memory_chunk": 2, "momentum": 0.6, "rate_max": 2.0}},
    "l2, descent, towards initial": {
        "memory": {
            "chunk": 16,
            "memory_chunk": 8,
            "objective": "l2",
            "dgd": False,
            "rate_max": 0.3,
            "retain_to": "initial",
        }
    },
    "adaptive q": {"memory": {"chunk": 16, "memory_chunk": 4, "adaptive": ("k", "v", "eta", "alpha", "q")}},
    "attention": {"mixer": "attention", "memory": {"chunk": 16}},
    "gated delta": {"mixer": "gated_delta", "memory": {"chunk": 16}},
    "retnet": {"mixer": "retnet", "memory": {"chunk": 16}},
    "deltanet": {"mixer": "deltanet", "memory": {"chunk": 16}},
    "gated deltanet": {"mixer": "gated_deltanet", "memory": {"chunk": 16}},
    "titans": {"mixer": "titans", "memory": {"chunk": 16, "memory_chunk": 8}},
    "ttt": {"mixer": "ttt_mlp", "memory": {"chunk": 16}},
    "titans mac": {"mixer": "titans_mac", "window": 11, "memory": {"chunk": 8}},
    "titans mag": {"mixer": "titans_mag", "window": 6, "memory": {"chunk": 16}},
    "titans mal": {"mixer": "titans_mal", "window": 6, "memory": {"chunk": 16}},
    "transformer": {"mixer": "transformer"},
    "mamba 2": {"mixer": "mamba2", "memory": {"chunk": 16}},
    "window attention": {"mixer": "window_attention", "window": 11},
    "samba": {"mixer": "samba", "window": 6, "memory": {"chunk": 16}},
    "nested": {"connection": "nested", "memory": {"chunk": 16}},
    "independent": {"connection": "independent", "memory": {"chunk": 16}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_contract(name, tmp_path):
    check_model(HopeConfig(**{**SMALL, **VARIANTS[name]}), tmp_path)


@pytest.mark.parametrize("name", ["16-4", "gated delta", "retnet", "deltanet", "titans", "ttt", "titans mac"])
def test_a_token_is_felt_hundreds_of_positions_later(name):
    """Far beyond the convolutions' reach, which is 3 tokens per layer."""
    config = HopeConfig(**{**SMALL, **VARIANTS[name]})
    model, ids = large(config), tokens(config, 1, 420)
    other = ids.clone()
    other[0, 5] = (other[0, 5] + 1) % config.vocab_size
    with torch.no_grad():
        assert gap(model(ids).logits[:, 400:], model(other).logits[:, 400:]) > 1e-4


def test_a_memory_that_never_writes_feels_nothing_beyond_the_convolutions():
    """The counter-test of the one above: with rate 0 only the convolutions carry."""
    config = HopeConfig(**{**SMALL, "memory": {"chunk": 16, "rate_max": 0.0, "retention": False}})
    model, ids = large(config), tokens(config, 1, 64)
    other = ids.clone()
    other[0, 5] = (other[0, 5] + 1) % config.vocab_size
    with torch.no_grad():
        first, second = model(ids).logits, model(other).logits
    assert gap(first[:, 5:12], second[:, 5:12]) > 1e-3 and gap(first[:, 12:], second[:, 12:]) <= 1e-6


def test_the_state_of_attention_grows_with_the_stream():
    config = HopeConfig(**{**SMALL, **VARIANTS["attention"]})
    model, ids = large(config), tokens(config, 2, 9)
    with torch.no_grad():
        _, cache = read(model, ids)
        size = cache.state.nbytes
        assert read(model, ids, cache)[1].state.nbytes > 1.9 * size - 64
