"""Meta-learning, the slow way: everything unrolled, one stream at a time. Nothing of ours is imported.

    W_k = W + Δ_k,   m_{k+1} = decay m_k − rate · shrink · g_k,   Δ_{k+1} = retention Δ_k + m_{k+1},   g_k = ∇_W ℓ_k

The whole is one function of (parameters, log rates), its gradient is taken once, at the end. The model's past reaches
the next piece with its graph: the inner gradients take it as given, the outer one flows through it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


def loss(
    model: nn.Module, parameters: dict[str, Tensor], log_rates: Tensor, tokens: Tensor, levels: list[dict[str, Any]],
    *, constant: bool = False, functional: bool = True, nested: bool = False,
) -> Tensor:  # fmt: skip
    """Summed nats of tokens (T,), differentiable in parameters and log_rates.

    levels    dicts of period, names of weights, rule ("sgd" or "momentum"), decay, clip, retention, bound
    constant    inner gradients and contexts are constants: the first order
    functional  inner gradients by torch.func.grad, which takes no custom autograd.Function; else by torch.autograd
    nested      each time that a level changes, all faster ones start again from it
    """
    cut: Callable[[Tensor], Tensor] = Tensor.detach if constant else (lambda t: t)
    deltas = [{n: torch.zeros_like(parameters[n]) for n in level["names"]} for level in levels]
    memory = [{n: torch.zeros_like(parameters[n]) for n in level["names"]} for level in levels]
    pending = [{n: torch.zeros_like(parameters[n]) for n in level["names"]} for level in levels]
    counts, total, past, begin = [0] * len(levels), parameters[next(iter(parameters))].new_zeros(()), None, 1
    ends = {t for level in levels for t in range(level["period"], len(tokens), level["period"])} | {len(tokens)}
    for end in sorted(e for e in ends if e > 1):
        now = dict(parameters)
        for own in deltas:
            for n, d in own.items():
                now[n] = now[n] + d
        names = sorted({n for level in levels for n in level["names"]})
        ids, targets = tokens[None, begin - 1 : end - 1], tokens[begin:end]

        def piece(adapted: dict[str, Tensor], now=now, past=past, ids=ids, targets=targets) -> tuple[Tensor, Any]:
            inputs = {"input_ids": ids, "past_key_values": again(past)}
            out = functional_call(model, {**now, **adapted}, (), {**inputs, "use_cache": True})
            return F.cross_entropy(out.logits[0], targets, reduction="sum"), out.past_key_values

        own = {n: now[n] for n in names}
        if functional:
            grads = torch.func.grad(lambda adapted: piece(adapted)[0])(own)
            value, past = piece({})
        else:
            value, past = piece(own)
            found = torch.autograd.grad(value, list(own.values()), create_graph=True)
            grads = dict(zip(own, found, strict=True))
        if constant:
            past = detached(past)
        total = total + value
        begin = end
        for i, level in enumerate(levels):
            counts[i] += len(targets)
            for n in level["names"]:
                pending[i][n] = pending[i][n] + cut(grads[n])
            if end % level["period"] or not counts[i]:
                continue
            mean = {n: g / counts[i] for n, g in pending[i].items()}
            size = torch.stack([g.square().sum() for g in mean.values()]).sum().sqrt()
            shrink = level["clip"] / size if float(size.detach()) > level["clip"] else 1.0
            for n, g in mean.items():
                before = memory[i][n] if level["rule"] == "momentum" else torch.zeros_like(g)
                memory[i][n] = level["decay"] * before - log_rates[i].exp() * shrink * g
                moved = level["retention"] * deltas[i][n] + memory[i][n]
                limit = level["bound"] * parameters[n].square().sum().sqrt()
                norm = moved.square().sum().sqrt()
                deltas[i][n] = moved * (cut(limit) / norm) if float(norm.detach()) > float(limit.detach()) else moved
                pending[i][n] = torch.zeros_like(g)
            counts[i] = 0
        changed = [i for i, level in enumerate(levels) if nested and end % level["period"] == 0]
        for i in reversed(range(max(changed, default=0))):
            deltas[i] = dict(zip(levels[i]["names"], deltas[i + 1].values(), strict=True))
            memory[i] = {n: torch.zeros_like(parameters[n]) for n in levels[i]["names"]}
    return total


def again(past: Any) -> Any:
    """The same past for another forward: DynamicCache layers are changed by the forward that is given them."""
    if not hasattr(past, "layers"):
        return past
    twin = copy.copy(past)
    twin.layers = [copy.copy(layer) for layer in past.layers]
    return twin


def detached(past: Any) -> Any:
    """A cache of attention layers (``layers`` of keys and values) or one with a state that can be mapped."""
    if hasattr(past, "layers"):
        for layer in past.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    else:
        past.state = past.state.detach()
    return past


def gradient(
    model: nn.Module, log_rates: Tensor, tokens: Tensor, levels: list[dict[str, Any]], **how: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Of the mean nats of tokens (B, T): by parameter, and of log_rates."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    rates = log_rates.detach().clone().requires_grad_()
    whole = sum(loss(model, leaves, rates, row, levels, **how) for row in tokens) / tokens[:, 1:].numel()
    found = torch.autograd.grad(whole, [*leaves.values(), rates], allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip([*leaves.values(), rates], found, strict=True)]
    return dict(zip(leaves, grads, strict=False)), grads[-1]
