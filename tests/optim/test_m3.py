"""What M3 is for, beyond the contract: two clocks, a step of known size, a letter that can be followed."""

from __future__ import annotations

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.optim import M3
from tests.contracts.optimizer import gap, gradient, parameters, same
from tests.oracles import optimizers as truth


def run(steps, shapes=((6, 9),), tokens=None, dtype=torch.float64, **settings):
    """(parameters, optimizer) after so many steps; tokens: for each step, or None."""
    ps = parameters(list(shapes), dtype)
    optimizer = M3(ps, **{"lr": 0.01} | settings)
    for n in range(steps):
        for i, p in enumerate(ps):
            p.grad = gradient(n, i, p)
        optimizer.step(tokens=None if tokens is None else tokens[n])
    return ps, optimizer


def test_the_slow_memory_changes_at_multiples_of_its_period_and_only_there():
    held, changes = None, []
    for steps in range(1, 11):
        (p,), optimizer = run(steps, slow_period=4)
        now = optimizer.state[p]["slow_direction"]
        changes.append(held is not None and not torch.equal(now, held))
        assert (steps < 4) == (not now.any())
        held = now
    assert changes == [number % 4 == 0 for number in range(1, 11)]


def test_a_period_in_tokens_is_one_in_steps_of_so_many_tokens():
    in_steps = run(9, slow_period=3)[0]
    assert same(in_steps, run(9, slow_period=3 * 512, slow_period_unit="tokens", tokens_per_step=512)[0])
    assert same(in_steps, run(9, slow_period=1536, slow_period_unit="tokens", tokens=[512] * 9)[0])
    assert not same(in_steps, run(9, slow_period=1024, slow_period_unit="tokens", tokens=[512] * 9)[0])


def test_steps_of_unequal_tokens_fire_at_or_after_each_multiple():
    """Multiples of 1000 are passed at 1200, 2600, 3100 tokens (steps 3, 5, 6); the mean is over the steps between."""
    tokens, fired, counts = [300, 500, 400, 700, 700, 500, 100], [], []
    for steps in range(1, 8):
        (p,), optimizer = run(steps, slow_period=1000, slow_period_unit="tokens", tokens=tokens)
        fired.append(optimizer.state[p]["slow_steps"] == 0)
        counts.append(optimizer.state[p]["slow_steps"])
    assert fired == [False, False, True, False, True, True, False] and counts == [1, 2, 0, 1, 0, 0, 1]
    (p,), optimizer = run(5, slow_period=1000, slow_period_unit="tokens", tokens=tokens, betas=(0.9, 0.9, 0.5))
    first = sum(gradient(n, 0, p) for n in range(3)) / 3
    second = sum(gradient(n, 0, p) for n in range(3, 5)) / 2
    assert (optimizer.state[p]["slow"] - (0.25 * first + 0.5 * second)).abs().max() <= 1e-15


def test_tokens_must_be_told_where_the_period_is_in_tokens():
    with pytest.raises(UserError, match="in tokens: call step"):
        run(1, slow_period_unit="tokens")
    with pytest.raises(UserError, match="step: tokens is 0"):
        run(1, slow_period_unit="tokens", tokens=[0])
    with pytest.raises(UserError, match="tokens_per_step is 0"):
        run(1, slow_period_unit="tokens", tokens_per_step=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_a_step_has_the_size_of_an_adamw_step_whatever_the_gradient(scale, dtype):
    """0.2 lr, of every matrix by itself, also where the gradient is zero almost everywhere and √V is tiny."""
    p = torch.nn.Parameter(torch.zeros(2, 16, 24, dtype=dtype))
    optimizer = M3([p], lr=0.01, slow_period=2, eps=1e-30)
    for n in range(6):
        before = p.detach().clone()
        p.grad = (scale * gradient(n, 0, p)).contiguous()
        p.grad[0, 1:] *= 1e-3
        optimizer.step()
        rms = (p.detach() - before).double().square().mean((-2, -1)).sqrt()
        assert (rms / 0.002 - 1).abs().max() <= {8: 1e-9, 4: 1e-4, 2: 0.05}[p.element_size()]


def test_a_gradient_of_zeros_moves_nothing_and_stays_finite():
    p = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = M3([p], lr=0.1, slow_period=1)
    for _ in range(3):
        p.grad = torch.zeros(3, 4)
        optimizer.step()
    assert torch.equal(p, torch.ones(3, 4)) and all(
        v.isfinite().all() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)
    )


def test_without_the_slow_memory_and_the_division_it_is_muon_with_adamws_step():
    """slow_weight 0 and ε above every √V leave Nesterov momentum, orthogonalised, at a root mean square of 0.2."""
    ps, _ = run(8, [(16, 24)], slow_weight=0.0, eps=1e12, betas=(0.95, 0.9, 0.9))
    (w,) = parameters([(16, 24)])
    w = w.detach()
    for t in range(1, 9):
        past = [gradient(n, 0, w) for n in range(t)]
        step = truth.orthogonal(0.95 * truth.average(past, 0.95) + 0.05 * past[-1], 5)
        w = w - 0.01 * 0.2 * step / step.square().mean().sqrt()
    assert gap(ps, [w]) <= 1e-9


def test_paper_is_algorithm_1_line_by_line():
    """Written once more as the algorithm prints it, state by state."""
    beta1, beta2, beta3, a, f, lr, eps = 0.9, 0.5, 0.7, 0.3, 3, 0.01, 0.05
    ps, _ = run(
        10, style="paper", betas=(beta1, beta2, beta3), slow_weight=a, slow_period=f, eps=eps, ns_steps=5, lr=lr
    )
    (w,) = parameters([(6, 9)])
    w = w.detach()
    m1, m2, v, o2, window = (torch.zeros_like(w) for _ in range(5))
    for t in range(1, 11):
        g = gradient(t - 1, 0, w)
        m1, v, window = m1 + beta1 * g, v + beta2 * g**2, window + g
        if t % f == 0:
            m2, window = m2 + beta3 * window, torch.zeros_like(w)
            o2 = truth.orthogonal(m2, 5)
        w = w - lr * (truth.orthogonal(m1, 5) + a * o2) / (v.sqrt() + eps)
    assert gap(ps, [w]) <= 1e-12


def test_a_dead_input_does_not_fill_the_step():
    """Columns without a gradient have √V = 0; what Newton–Schulz leaves there in bfloat16 must not become the step."""
    p = torch.nn.Parameter(torch.zeros(16, 24))
    optimizer = M3([p], lr=0.01)
    for n in range(5):
        p.grad = gradient(n, 0, p).contiguous()
        p.grad[:, 12:] = 0
        optimizer.step()
    assert p[:, 12:].abs().max() < 0.01 * p[:, :12].abs().max()


def test_it_learns_a_linear_map():
    """From noisy batches, at one learning rate for a wide and a tall matrix; a broken update would not."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(8, 12, generator=generator)
    model = torch.nn.Sequential(torch.nn.Linear(12, 32, bias=False), torch.nn.Linear(32, 8, bias=False))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.shape[1] ** -0.5, generator=generator)
    optimizer = M3(model.parameters(), lr=0.05, slow_period=8)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=300)
    for _ in range(300):
        x = torch.randn(64, 12, generator=generator)
        loss = (model(x) - x @ target.mT).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert loss.item() < 0.05 * target.square().sum(1).mean().item()
