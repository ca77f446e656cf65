"""Levels in context, the slow way: one stream, one copy of every weight, torch.autograd on the weights themselves.

Nothing of this library is imported. A segment is run with the weights as they are now, on the cache of what came
before; the gradient of its summed loss with respect to the weights is added up for each level; a level that has seen
its period takes one step of plain gradient descent on the mean, clipped, kept near the start.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import DynamicCache


def detached(cache: DynamicCache) -> DynamicCache:
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return cache


def read(model: nn.Module, tokens: Tensor, levels: list[dict]) -> tuple[list[float], dict[str, Tensor]]:
    """tokens (T,); levels: dicts of period, names of weights, lr, clip, retention, bound. Losses, changed weights."""
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    now = {n: p.clone() for n, p in start.items()}
    pending = [{n: torch.zeros_like(start[n]) for n in level["names"]} for level in levels]
    counts, losses, cache, begin = [0] * len(levels), [], None, 1
    ends = sorted({t for level in levels for t in range(level["period"], len(tokens) + 1, level["period"])})
    for end in ends:
        if end > begin - 1 and end - begin + 1 > 0 and end > 1:
            leaves = {n: p.clone().requires_grad_() for n, p in now.items()}
            ids, targets = tokens[None, begin - 1 : end - 1], tokens[begin:end]
            out = functional_call(model, leaves, (), {"input_ids": ids, "past_key_values": cache, "use_cache": True})
            each = F.cross_entropy(out.logits[0], targets, reduction="none")
            grads = dict(
                zip(leaves, torch.autograd.grad(each.sum(), list(leaves.values()), allow_unused=True), strict=True)
            )
            losses += each.tolist()
            cache = detached(out.past_key_values)
            for i, level in enumerate(levels):
                counts[i] += len(targets)
                for n in level["names"]:
                    pending[i][n] += grads[n]
        begin = end if end > 1 else 1
        for i, level in enumerate(levels):
            if end % level["period"] == 0 and counts[i]:
                mean = {n: g / counts[i] for n, g in pending[i].items()}
                size = torch.stack([g.norm() for g in mean.values()]).norm()
                shrink = min(1.0, level["clip"] / float(size))
                for n, g in mean.items():
                    moved = level["retention"] * (now[n] - start[n]) - level["lr"] * shrink * g
                    limit = level["bound"] * start[n].norm()
                    now[n] = start[n] + moved * min(1.0, float(limit / moved.norm()))
                    pending[i][n].zero_()
                counts[i] = 0
    return losses, now
