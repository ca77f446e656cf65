"""Delta gradient descent of a batch against three independent truths, and the capture of what layers saw."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nestlearn.errors import UserError
from nestlearn.optim import DGD, capture_inputs, parameter_groups
from nestlearn.optim.capture import captured_for
from nestlearn.rules import dgd_momentum
from nestlearn.rules.dgd_batch import dgd_batch, dgd_in_turn, proximal, proximal_of_gram
from tests.oracles import dgd_batch as oracle

OUT, IN = 4, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, X, U."""
    return draw(OUT, IN), draw(count, IN, seed=1), draw(count, OUT, seed=2)


def written(weight: Tensor, inputs: Tensor, errors: Tensor, rate: float, share: float, solver=proximal) -> Tensor:
    gradient, d = share * errors.T @ inputs, solver(inputs, rate * share)
    return weight + dgd_batch(weight, 0 * weight, gradient, rate, 0.0, d)[0]


@pytest.mark.parametrize("count", [1, 3, 6, 11])
@pytest.mark.parametrize("rate", [1e-6, 0.3, 1e3])
def test_the_step_of_a_batch_minimises_its_objective(count, rate):
    """As one least-squares problem, and sample by sample with recursive least squares."""
    case = batch(count)
    for share in (1.0, 1 / count):
        ours = written(*case, rate, share)
        assert (ours - oracle.joint(*case, rate, share)).abs().max() <= 1e-9
        assert (ours - oracle.recursive(*case, rate, share)).abs().max() <= 1e-9
        by_gram = written(*case, rate, share, lambda x, c: proximal_of_gram(c * x.T @ x))
        assert (by_gram - ours).abs().max() <= 1e-8


def test_the_truths_agree_with_plain_minimisation():
    case = batch(3)
    assert (oracle.by_gradient(*case, 0.5, 1 / 3) - oracle.joint(*case, 0.5, 1 / 3)).abs().max() <= 1e-10
    assert (oracle.by_gradient(*case, 0.5, 1 / 3) - written(*case, 0.5, 1 / 3)).abs().max() <= 1e-10


@pytest.mark.parametrize("name", ["joint", "sequential"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_sample_is_the_rule_of_one_token(name, reduction):
    """Five steps, with momentum and, as weight decay, retention: α = 1 − lr λ."""
    layer = nn.Linear(IN, OUT, bias=False).double()
    w, m = layer.weight.detach().clone(), torch.zeros(OUT, IN).double()
    optimizer = DGD(layer.parameters(), 0.7, momentum=0.6, weight_decay=0.2, batch=name, reduction=reduction)
    for step in range(5):
        x, target = draw(1, IN, seed=step), draw(1, OUT, seed=step + 9)
        u = torch.sin(x @ w.T - target)
        with capture_inputs(layer, errors=name == "sequential"):
            (-torch.cos(layer(x) - target)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        rate, retain = torch.tensor([0.7, 1 - 0.7 * 0.2], dtype=torch.float64)
        w, m = dgd_momentum(w, m, x[0], u[0], rate, retain, 0.6)
        assert (layer.weight - w).abs().max() <= 1e-12


def test_samples_in_turn_agree_with_the_batch_to_first_order():
    """Their difference is of second order in the rate."""
    weight, inputs, errors = batch(5)
    gaps = []
    for rate in (1e-2, 1e-3):
        turn, _ = dgd_in_turn(weight, 0 * weight, inputs, errors / 5, rate, 1 / 5, 0.0)
        gaps.append((turn - (written(weight, inputs, errors, rate, 1 / 5) - weight)).norm())
    assert 80 < gaps[0] / gaps[1] < 120


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [3, 40])
def test_every_rate_is_bounded(dtype, count):
    """Inputs of rank 2: no rate makes the small system singular, and outside their span nothing is forgotten."""
    weight, errors = draw(OUT, IN).to(dtype), draw(count, OUT, seed=2).to(dtype)
    basis = torch.linalg.qr(draw(IN, 2, seed=3))[0]
    inputs = (draw(count, 2, seed=4) @ basis.T).to(dtype)
    outside, eps = torch.eye(IN).double() - basis @ basis.T, torch.finfo(dtype).eps
    for rate in (0.0, 1e-3, 1.0, 1e3, 1e-4 / eps):
        new = written(weight, inputs, errors, rate, 1 / count)
        assert new.isfinite().all() and new.norm() < 20
        assert ((new - weight).double() @ outside).abs().max() < 0.02
    assert torch.equal(written(weight, inputs, errors, 0.0, 1 / count), weight)


def test_a_huge_rate_solves_the_batch():
    weight, inputs, errors = batch(3)
    assert (inputs @ written(weight, inputs, errors, 1e8, 1 / 3).T + errors).abs().max() < 1e-5


def model_and_optimizer(**settings) -> tuple[nn.Module, DGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, 5), nn.Tanh(), nn.Linear(5, OUT)).double()
    return model, DGD(parameter_groups(model), 0.1, **settings)


def step(model, optimizer, *batches: Tensor, errors: bool = False, use=lambda model, x: model(x)) -> list[Tensor]:
    """One step on the mean loss of all of these, accumulated."""
    optimizer.zero_grad()
    with capture_inputs(model, errors=errors):
        for x in batches:
            (use(model, x).square().mean() / len(batches)).backward()
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all((x - y).abs().max() <= 1e-13 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["joint", "sequential"])
def test_sequences_and_accumulation_are_one_batch(name):
    x, errors = draw(8, IN), name == "sequential"
    whole = step(*model_and_optimizer(batch=name), x, errors=errors)
    assert same(step(*model_and_optimizer(batch=name), x.reshape(2, 4, IN), errors=errors), whole)
    assert same(step(*model_and_optimizer(batch=name), x[:4], x[4:], errors=errors), whole)
    assert not same(step(*model_and_optimizer(batch=name), x[:4], errors=errors), whole)


def test_only_what_the_backward_pass_reaches_counts():
    """Evaluations leave no trace; a layer that is recomputed counts once."""

    def evaluates_first(model, x):
        with torch.no_grad():
            model(100 * x)
        model(50 * x)
        return model(x)

    whole = step(*model_and_optimizer(), draw(8, IN))
    assert same(step(*model_and_optimizer(), draw(8, IN), use=evaluates_first), whole)
    recomputes = step(*model_and_optimizer(), draw(8, IN), use=lambda m, x: checkpoint(m, x, use_reentrant=False))
    assert same(recomputes, whole)


def test_a_layer_used_twice_saw_both_inputs():
    layer = nn.Linear(IN, IN, bias=False).double()
    w, x = layer.weight.detach().clone(), draw(3, IN)
    with capture_inputs(layer):
        hidden = layer(x)
        layer(input=hidden).square().sum().backward()
    gradient, inputs = layer.weight.grad.clone(), torch.cat([x, x @ w.T])
    DGD(layer.parameters(), 0.1, reduction="sum").step()
    truth = (w - 0.1 * gradient) @ torch.linalg.inv(torch.eye(IN).double() + 0.1 * inputs.T @ inputs)
    assert (layer.weight - truth).abs().max() <= 1e-12


@pytest.mark.parametrize("frees", ["step", "zero_grad"])
def test_inputs_are_kept_without_a_copy_and_freed(frees):
    model, optimizer = model_and_optimizer()
    x = draw(8, IN)
    with capture_inputs(model, errors=True):
        model(x).square().mean().backward()
    first = model[0].weight
    captured = captured_for(first)
    assert captured.inputs[0].data_ptr() == x.data_ptr()
    kept = weakref.ref(captured)
    del captured
    getattr(optimizer, frees)()
    gc.collect()
    assert kept() is None and captured_for(first) is None


def test_missing_inputs_are_one_clear_line():
    model, optimizer = model_and_optimizer()
    before = [p.detach().clone() for p in model.parameters()]
    model(draw(8, IN)).sum().backward()
    with pytest.raises(UserError, match=r"'0\.weight' has a gradient but no captured inputs.*capture_inputs\(model\)"):
        optimizer.step()
    assert same(before, list(model.parameters()))
    model, optimizer = model_and_optimizer(batch="sequential")
    with pytest.raises(UserError, match=r"'0\.weight'.*errors=True"):
        step(model, optimizer, draw(8, IN))
    with pytest.raises(UserError, match="LayerNorm has no trained nn.Linear"), capture_inputs(nn.LayerNorm(3)):
        pass


def test_an_input_that_was_overwritten_is_refused():
    model, optimizer = model_and_optimizer()
    x = draw(8, IN)
    with capture_inputs(model):
        model(x).square().mean().backward()
    x.zero_()
    with pytest.raises(UserError, match="overwritten"):
        optimizer.step()


def test_clipping_acts_on_what_is_learned():
    """The gradient is read off ``.grad``: with none left, only the forgetting remains."""
    model, optimizer = model_and_optimizer()
    w, x = model[0].weight.detach().clone(), draw(8, IN)
    with capture_inputs(model):
        model(x).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.0)
    optimizer.step()
    assert (model[0].weight - w @ torch.linalg.inv(torch.eye(IN).double() + 0.1 / 8 * x.T @ x)).abs().max() <= 1e-12


def test_a_fixed_point_halves_the_output_of_a_linear_regression():
    """The letter: W x = −∇_y L, here W x = T x − W x; the loss plus ½ ‖y‖²."""
    layer, truth, x = nn.Linear(IN, OUT, bias=False).double(), draw(OUT, IN), draw(40, IN, seed=1)
    optimizer = DGD(layer.parameters(), 1.0)
    for _ in range(200):
        optimizer.zero_grad()
        with capture_inputs(layer):
            (0.5 * (layer(x) - x @ truth.T).square().sum(-1)).mean().backward()
        optimizer.step()
    assert (layer.weight - truth / 2).abs().max() < 1e-6


def test_it_trains_an_mlp_on_classes():
    centres, labels = draw(5, 20).float(), torch.arange(300) % 5
    inputs = centres[labels] + 0.8 * draw(300, 20, seed=1).float()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
    groups = parameter_groups(model)
    optimizer = DGD([g | ({"lr": 3e-3} if g["rule"] == "adamw" else {}) for g in groups], 0.03, momentum=0.9)
    for _ in range(150):
        optimizer.zero_grad()
        with capture_inputs(model):
            F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    assert (model(inputs).argmax(-1) == labels).float().mean() > 0.97
