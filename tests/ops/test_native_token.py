"""One token in C++ against the same in plain torch, in float64 and float32, over streams."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nestlearn.memory.self_modifying import SelfModifyingConfig, SelfModifyingMemory
from nestlearn.ops.native import build
from nestlearn.ops.registry import forcing

if build.missing():
    pytest.skip(str(build.missing()), allow_module_level=True)

BASE = SelfModifyingConfig(
    head_width=12, hidden_width=20, heads=2, chunk=4, rate_max=4.0, rate_start=0.4, retain_start=(0.97, 0.8),
    retain_to="initial", slow_rate_scale=0.5, w1_scale=0.5, w2_scale=2.0,
)  # fmt: skip
CASES = {
    "hope": BASE,
    "momentum, to zero": replace(BASE, momentum=0.7, retain_to="zero"),
    "l2, adaptive query": replace(BASE, objective="l2", adaptive=("k", "v", "eta", "alpha", "q")),
    "mix, after its write": replace(BASE, objective="mix", read="after"),
    "static, letter": replace(BASE, adaptive=("v",), target_norm="none", retention=False, rate_max=0.5),
    "plain gradient descent": replace(BASE, dgd=False, rate_max=0.1, rate_start=0.05),
    "memory by itself": replace(BASE, memory_chunk=2),
    "forgets at once": replace(BASE, retain_start=1e-13),
    "narrow": replace(BASE, head_width=3, hidden_width=1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_a_stream_is_the_same(case, dtype, most):
    config = CASES[case]
    torch.manual_seed(3)
    memory = SelfModifyingMemory(config).double()
    with torch.no_grad():
        for scale in memory.rate_scale.values():
            scale.uniform_(-1.0, -0.3)  # the absolute value counts
        x, query, value = (torch.randn(3, 11, config.heads, config.head_width, dtype=torch.double) for _ in range(3))
        query = torch.nn.functional.normalize(query, dim=-1)
        streams = {}
        for name, kind in (("torch", torch.float64), ("native", dtype)):
            memory, state, out = memory.to(kind), None, []
            with forcing("reference"):  # two tokens, so that rows stand inside a chunk
                _, state = memory(x[:, :2].to(kind), query[:, :2].to(kind), None, value[:, :2].to(kind))
            with forcing(name):
                for t in range(2, 11):
                    y, state = memory(
                        *(v[:, t : t + 1].to(kind) for v in (x, query)), state, value[:, t : t + 1].to(kind)
                    )
                    out.append(y)
            streams[name] = [*out, state.w1, state.w2, state.m1, state.m2, state.start1, state.start2, state.seen]
    for right, found in zip(streams["torch"], streams["native"], strict=True):
        assert (found.double() - right.double()).norm() <= most * right.double().norm() + 1e-12


def test_the_state_given_is_left_alone():
    torch.manual_seed(0)
    memory = SelfModifyingMemory(BASE)
    x = torch.randn(1, 1, 2, 12)
    with torch.no_grad(), forcing("native"):
        before = memory.init_state(1)
        copy = before.clone()
        _, after = memory(x, x, before)
    assert all(torch.equal(a, b) for a, b in zip(before.tensors(), copy.tensors(), strict=True))
    assert not torch.equal(after.w1, before.w1)
