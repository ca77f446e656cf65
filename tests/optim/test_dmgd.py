"""What a deep momentum is for, and what keeps it bounded; the values are checked by the contract and here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.optim import DMGD, parameter_groups
from nestlearn.rules.dmgd import FEATURE_MAPS, Memory, learn, recall, signed_sqrt_keys, unit_rows
from tests.oracles import dmgd as oracle


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def one(weight: Tensor, **settings) -> tuple[nn.Parameter, DMGD]:
    p = nn.Parameter(weight.clone())
    return p, DMGD([p], 1.0, **settings)


@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_a_step_of_the_memory_is_the_gradient_of_its_objective(objective):
    """Far from where it starts, for keys that are not the gradients."""
    memory, start = (Memory(draw(6, 4, seed=s), draw(4, 3, seed=s + 1)) for s in (1, 3))
    keys, grads = draw(5, 3, seed=5), draw(5, 6, seed=6)
    ours = learn(memory, keys, grads, rate=0.3, decay=0.8, objective=objective, share=0.2, start=start)
    rows = {tuple(u.tolist()): z for u, z in zip(grads, keys, strict=True)}
    how = {"kind": objective, "share": 0.2, "rate": 0.3, "decay": 0.8}
    truth = oracle.learned(memory._asdict(), start._asdict(), list(grads), lambda u: rows[tuple(u.tolist())], **how)
    assert all((o - truth[name]).abs().max() <= 1e-13 for name, o in ours._asdict().items())


@pytest.mark.parametrize("objective", ["l2", "dot"])
@pytest.mark.parametrize("feature_map", [None, *FEATURE_MAPS, lambda u: torch.cos(3 * u)])
@pytest.mark.parametrize("scale", ["rms", "literal"])
def test_the_first_step_goes_downhill(objective, feature_map, scale):
    """Whatever φ and the drawn weights are."""
    for seed in range(5):
        p, optimizer = one(torch.zeros(4, 5).double(), seed=seed, objective=objective, feature_map=feature_map,
                           scale=scale)  # fmt: skip
        p.grad = draw(4, 5, seed=seed)
        optimizer.step()
        assert (p * p.grad).sum() < 0


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("output", ["none", "tanh", "newton_schulz"])
def test_the_scale_of_a_gradient_does_not_matter(size, output):
    """In float32, where its square would over- or underflow; the step is that of AdamW, 0.2 lr."""
    runs = []
    for factor in (1.0, size):
        p, optimizer = one(torch.zeros(8, 8), output=output)
        for step in range(5):
            before, p.grad = p.detach().clone(), factor * draw(8, 8, seed=step, dtype=torch.float32)
            optimizer.step()
            assert 0.1 < (p - before).square().mean().sqrt() < 0.25
        runs.append(p)
    assert torch.allclose(*runs, atol=1e-4)


def test_no_gradient_no_step():
    p, optimizer = one(draw(3, 4))
    p.grad = torch.zeros(3, 4).double()
    optimizer.step()
    assert torch.equal(p, draw(3, 4))


def test_the_opposite_gradient_recalls_the_opposite_step():
    memory, keys = Memory(draw(6, 4), draw(4, 6, seed=1)), draw(5, 6, seed=2)
    assert torch.allclose(recall(memory, -keys), -recall(memory, keys), atol=1e-14)
    assert torch.equal(signed_sqrt_keys(-keys), -signed_sqrt_keys(keys))


STREAMS = {
    "constant": lambda t: draw(4, 6, dtype=torch.float32),
    "noise": lambda t: 1e4 * draw(4, 6, seed=t, dtype=torch.float32),
    "alternating": lambda t: (-1) ** t * draw(4, 6, dtype=torch.float32),
    "one row": lambda t: torch.eye(4, 6) * (torch.arange(4) == t % 4)[:, None],
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("objective, rate", [("dot", 1.0), ("dot", 1e3), ("l2", 1.0), ("l2", 1.9)])
def test_the_memory_is_bounded(stream, objective, rate):
    """For "dot" by η / ((1 − α) √hidden), at every rate; for "l2" by the ridge of its decay."""
    p, optimizer = one(torch.zeros(4, 6), objective=objective, memory_lr=rate, hidden=16, decay=0.9)
    for t in range(400):
        p.grad = stream(t)
        optimizer.step()
    w1, w2 = optimizer.state[p]["w1"], optimizer.state[p]["w2"]
    assert p.isfinite().all() and w2.isfinite().all()
    if objective == "dot":
        assert w1.norm() <= 1.0001 * rate / (0.1 * 16**0.5)
    else:
        assert w1.norm() < 10


def test_it_passes_what_recurs_and_holds_back_what_does_not():
    """A direction that every gradient shares, under noise: of the step it makes up more than of the gradient."""
    signal, shares = torch.outer(draw(8), draw(32, seed=1) / draw(32, seed=1).norm()), []
    p, optimizer = one(torch.zeros(8, 32).double())
    for t in range(200):
        p.grad = signal + 0.4 * draw(8, 32, seed=t + 2)
        before = p.detach().clone()
        optimizer.step()
        step = p.detach() - before
        shares.append([abs(F.cosine_similarity(x.flatten(), signal.flatten(), dim=0)) for x in (step, p.grad)])
    of_step, of_gradient = torch.tensor(shares[100:]).mean(0)
    assert of_step > of_gradient + 0.15


def test_matrices_of_one_row_size_share_one_memory_and_no_others_do():
    ps = [nn.Parameter(draw(*s)) for s in [(4, 6), (9, 6), (2, 3, 6), (6, 2, 3, 1), (4, 5), (4, 6)]]
    optimizer = DMGD([{"params": ps[:5]}, {"params": ps[5:]}], 0.1, hidden=7)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = [optimizer.state[p]["w1"].shape if "w1" in optimizer.state[p] else None for p in ps]
    assert held == [(6, 7), None, None, None, (5, 7), (6, 7)]


def test_it_draws_from_its_own_seed():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        p, optimizer = one(draw(3, 4), seed=seed)
        p.grad = draw(3, 4)
        optimizer.step()
        drawn.append(optimizer.state[p]["w2_start"])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("output", ["none", "tanh", "newton_schulz"])
@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_it_solves_a_linear_regression(objective, output):
    inputs, truth = draw(64, 8), draw(3, 8, seed=1)
    p = nn.Parameter(torch.zeros(3, 8).double())
    optimizer = DMGD([p], 0.5, objective=objective, output=output)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 150)
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(inputs @ p.T, inputs @ truth.T).backward()
        optimizer.step()
        schedule.step()
    assert F.mse_loss(inputs @ p.T, inputs @ truth.T) < 1e-3 * (inputs @ truth.T).square().mean()


@pytest.mark.parametrize("objective, output", [("l2", "none"), ("dot", "tanh"), ("l2", "newton_schulz")])
def test_it_trains_an_mlp_on_classes(objective, output):
    centres, labels = draw(5, 20, dtype=torch.float32), torch.arange(300) % 5
    inputs = centres[labels] + 0.8 * draw(300, 20, seed=1, dtype=torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = DMGD(parameter_groups(model), 0.01, objective=objective, output=output, hidden=16)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    assert (model(inputs).argmax(-1) == labels).float().mean() > 0.97


def test_rows_have_unit_root_mean_square_length():
    units = unit_rows(1e-30 * draw(3, 5, 7, dtype=torch.float32))
    assert torch.allclose(units.square().sum(-1).mean(-1), torch.ones(3))
