"""The memories that implementations of the inner loop are compared on."""

from __future__ import annotations

import torch

from nestlearn.memory.self_modifying import SelfModifyingConfig, SelfModifyingMemory


def memory_of(config: SelfModifyingConfig, dtype: torch.dtype = torch.float64) -> SelfModifyingMemory:
    """Always the same numbers; read-outs and scales that are not those of a start."""
    torch.manual_seed(3)
    memory = SelfModifyingMemory(config).double()
    with torch.no_grad():
        for read in (memory.rate_read, memory.retain_read):
            read.weight.normal_(std=0.2)
        for scale in memory.rate_scale.values():
            scale.uniform_(0.3, 1.0)
    return memory.to(dtype)
