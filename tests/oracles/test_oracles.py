"""The truths themselves: two derivations of each agree."""

from __future__ import annotations

import torch

from tests.oracles import dgd, rules, self_modifying

generator = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_the_solved_proximal_step_is_the_minimiser():
    state, target, x = random(3, 4), random(3), random(4)
    solved = dgd.proximal(state, target, x, torch.tensor(0.7, dtype=torch.float64))
    assert torch.allclose(solved, dgd.proximal_by_gradient(state, target, x, 0.7, steps=2000), atol=1e-12, rtol=0)


def test_a_write_without_momentum_or_retention_is_the_proximal_step():
    state, x, g, rate = random(3, 4), random(4), random(3), torch.tensor(2.5, dtype=torch.float64)
    written, _ = dgd.write(state, torch.zeros_like(state), x, g, rate, torch.ones_like(rate), mu=0.0)
    assert torch.allclose(written, dgd.proximal(state, -g, x, rate), atol=1e-14)


def test_sherman_morrison_gives_the_papers_gain():
    """NL Eq. 57: prox(S, u, x) = S (I - gain x x^T) + gain u x^T with gain = rate / (1 + rate |x|^2)."""
    for rate in (1e-3, 1.0, 1e3):
        state, target, x = random(3, 4), random(3), random(4)
        gain = rate / (1 + rate * (x @ x))
        closed = state - gain * torch.outer(state @ x, x) + gain * torch.outer(target, x)
        solved = dgd.proximal(state, target, x, torch.tensor(rate, dtype=torch.float64))
        assert torch.allclose(solved, closed, atol=1e-11)


def test_layer_errors_times_inputs_are_the_gradients_of_the_weights():
    network, key, target = {"w1": random(4, 5), "w2": random(5, 4)}, random(4), random(4)
    for kind in ("l2", "dot"):
        gradients = torch.func.grad(
            lambda n, kind=kind: self_modifying.objective(self_modifying.apply(n, key), target, kind)
        )(network)
        inputs = self_modifying.layer_inputs(network, key)
        errors = self_modifying.layer_errors(network, key, target, kind)
        for layer, gradient in gradients.items():
            assert torch.allclose(gradient, torch.outer(errors[layer], inputs[layer]), atol=1e-12)


def test_ojas_solved_step_is_a_minimum():
    state, key, value, rate = random(3, 4), random(4), random(3), torch.tensor(0.9, dtype=torch.float64)
    step = rules.oja(state, key, value, rate, torch.ones_like(rate)).requires_grad_()
    loss = 0.5 * (step.mT @ value - key).square().sum() + (step - state).square().sum() / (2 * rate)
    (gradient,) = torch.autograd.grad(loss, step)
    assert gradient.abs().max() < 1e-12
