"""The matrix baselines against flash-linear-attention's plain torch forms, where it is installed.

Its files are loaded by path: the package itself imports Triton.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nestlearn.memory.linear import LinearConfig, LinearMemory

BATCH, TOKENS, HEADS, HEAD = 2, 64, 4, 8


def naive(op: str) -> ModuleType:
    """fla/ops/OP/naive.py. Skips the test where there is none."""
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations or importlib.util.find_spec("einops") is None:
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location(
        f"fla_naive_{op}", Path(found.submodule_search_locations[0]) / "ops" / op / "naive.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs() -> tuple[Tensor, ...]:
    """query, key (of length 1), value, rate in (0, 1), log of the retention."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(BATCH, TOKENS, HEADS, HEAD) for _ in range(3))
    rate, decay = torch.rand(BATCH, TOKENS, HEADS), -torch.rand(BATCH, TOKENS, HEADS)
    return query, key / key.norm(dim=-1, keepdim=True), value, rate, decay


def memory(rule: str) -> LinearMemory:
    return LinearMemory(LinearConfig(HEAD, HEAD, HEADS, rule=rule, chunk=16))


def by_head(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def test_deltanet_is_flas_delta_rule():
    ops = naive("delta_rule")
    query, key, value, rate, _ = inputs()
    y, state = memory("delta")(key, value, rate, torch.ones_like(rate), query * HEAD**-0.5)
    for theirs in (ops.delta_rule_recurrence, ops.delta_rule_chunkwise):
        expected, end = theirs(*by_head(query, key, value, rate))
        assert (y - expected.transpose(1, 2)).abs().max() <= 1e-5 and (state.weight - end.mT).abs().max() <= 1e-5


def test_gated_deltanet_is_flas_gated_delta_rule():
    ops = naive("gated_delta_rule")
    query, key, value, rate, decay = inputs()
    y, state = memory("gated_delta")(key, value, rate, decay.exp(), query * HEAD**-0.5)
    for theirs in (ops.naive_recurrent_gated_delta_rule, ops.naive_chunk_gated_delta_rule):
        expected, end = theirs(query, key, value, beta=rate, g=decay, output_final_state=True)
        assert (y - expected).abs().max() <= 1e-5 and (state.weight - end.mT).abs().max() <= 1e-5


def test_retnet_is_flas_retention():
    ops = naive("retention")
    query, key, value, rate, _ = inputs()
    retain = (1 - 2.0 ** -(5 + torch.arange(HEADS))).expand_as(rate)
    y, _ = memory("hebbian")(key, value, torch.ones_like(rate), retain, query * HEAD**-0.5)
    assert (y - ops.naive_retention(*by_head(query, key, value)).transpose(1, 2)).abs().max() <= 1e-5
