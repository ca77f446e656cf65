"""The known optimizers come out of the two general ones; so do new ones, from functions that a user gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from nestlearn.errors import UserError
from nestlearn.ops.newton_schulz import newton_schulz
from nestlearn.optim import DGD, DeltaMomentum, GeneralizedGD, GeneralizedMomentum, PreconditionedMomentum
from nestlearn.optim.capture import forget_inputs, record_inputs
from nestlearn.rules.generalized import l2_loss
from tests.contracts.optimizer import gap, gradient, parameters
from tests.oracles.dgd_batch import samples

SHAPES, STEPS = [(4, 5), (3, 7)], 8


def run(make, lr: float = 0.05, shapes=SHAPES, steps: int = STEPS, **settings) -> list[Tensor]:
    ps = parameters(shapes)
    optimizer = make(ps, lr=lr, **settings)
    for number in range(steps):
        for i, p in enumerate(ps):
            p.grad = gradient(number, i, p)
            forget_inputs(p)
            record_inputs(p, *samples(p.grad))
        optimizer.step()
    return [p.detach() for p in ps]


# name: (the known optimizer, its settings), (the general one, its settings)
INSTANCES = {
    "gradient descent": ((torch.optim.SGD, {}), (GeneralizedGD, {"objective": "dot"})),
    "gradient descent, one inner step": (
        (torch.optim.SGD, {}),
        (GeneralizedGD, {"objective": "dot", "solve": "gradient"}),
    ),
    "one inner step of a given objective": (
        (GeneralizedGD, {"objective": "l2", "solve": "gradient"}),
        (GeneralizedGD, {"objective": lambda p, v: l2_loss(p, v), "solve": "gradient"}),
    ),
    "delta gradient descent": ((DGD, {}), (GeneralizedGD, {"objective": "l2"})),
    "momentum": (
        (torch.optim.SGD, {"momentum": 0.8}),
        (GeneralizedMomentum, {"objective": "dot", "decay": 0.8}),
    ),
    "momentum, solved": (
        (torch.optim.SGD, {"momentum": 0.8}),
        (GeneralizedMomentum, {"objective": "dot", "decay": 0.8, "solve": "exact"}),
    ),
    "delta momentum": ((DeltaMomentum, {"decay": 0.8}), (GeneralizedMomentum, {"decay": 0.8})),
    "delta momentum, literal, with values": (
        (DeltaMomentum, {"key": "literal", "values": torch.tanh}),
        (GeneralizedMomentum, {"key": "literal", "values": torch.tanh}),
    ),
    "preconditioned momentum": (
        (PreconditionedMomentum, {"preconditioner": "newton_schulz", "ns_steps": 5}),
        (GeneralizedMomentum, {"objective": "dot", "values": newton_schulz}),
    ),
}


@pytest.mark.parametrize("known, general", INSTANCES.values(), ids=INSTANCES)
def test_known_optimizers_are_instances(known, general):
    truth = run(known[0], **known[1])
    assert gap(run(general[0], **general[1]), truth) <= 1e-12
    assert gap(truth, [p.detach() for p in parameters(SHAPES)]) > 1e-2


def test_delta_gradient_descent_is_an_instance_bit_for_bit():
    pairs = zip(run(GeneralizedGD, weight_decay=0.1), run(DGD, weight_decay=0.1), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("make", [GeneralizedGD, GeneralizedMomentum])
@pytest.mark.parametrize("history", [1, 3])
def test_many_inner_steps_reach_the_closed_form(make, history):
    few = {"steps": 4, "shapes": [(4, 5)], "history": history}
    exact = run(make, solve="exact", **few)
    assert gap(run(make, solve="gradient", inner_steps=60, inner_lr=0.4, **few), exact) <= 1e-9
    assert gap(run(make, solve="gradient", **few), exact) > 1e-4


def test_a_history_pulls_back():
    """From a start at rest, three equal gradients: H = mean of the last two weights."""
    p = nn.Parameter(torch.zeros(2, 2).double())
    optimizer = GeneralizedGD([p], 1.0, objective="dot", history=2)
    seen = [0.0]
    for _ in range(3):
        p.grad = -torch.ones(2, 2).double()
        optimizer.step()
        seen.append(p[0, 0].item())
    assert seen == [0.0, 1.0, 1.5, 2.25]


def test_implicit_gradient_descent_finds_the_regression_that_dgd_halves():
    layer, truth = nn.Parameter(torch.zeros(3, 4).double()), torch.arange(12.0).double().reshape(3, 4)
    inputs = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for value, expected in (("step", truth), ("error", truth / 2)):
        p = nn.Parameter(layer.detach().clone())
        optimizer = GeneralizedGD([p], 5.0, value=value)
        for _ in range(60):
            error = (inputs @ (p.detach() - truth).T) / 30
            p.grad = error.T @ inputs
            record_inputs(p, inputs, error)
            optimizer.step()
        assert (p - expected).abs().max() < 1e-5


def test_the_solved_momentum_is_bounded_where_the_letter_is_not():
    """‖g‖² far above 1 + α: the explicit step multiplies what it holds at every step."""
    ends = {}
    for solve in ("gradient", "exact"):
        p = nn.Parameter(torch.zeros(3, 3).double())
        optimizer = GeneralizedMomentum([p], 0.1, key="literal", solve=solve)
        for _ in range(30):
            p.grad = 3 * torch.ones(3, 3).double()
            optimizer.step()
        ends[solve] = p.abs().max().item()
    assert ends["exact"] < 1 and ends["gradient"] > 1e6


def own_objective(memory: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (memory * value).sum((-2, -1)) + memory.pow(4).sum((-2, -1))


def test_a_checkpoint_holds_names_of_functions_and_a_new_optimizer_needs_them():
    def build(**given):
        return GeneralizedMomentum(parameters([(3, 4)]), 0.1, **given)

    optimizer = build(objective=own_objective, retention=lambda m, history: m.square().sum())
    saved = optimizer.state_dict()
    names = [saved["param_groups"][0][option] for option in ("objective", "retention", "key")]
    assert names[0] == "given:own_objective" and "lambda" in names[1] and names[2] == "normalized"
    stranger = build()
    stranger.load_state_dict(saved)
    stranger.param_groups[0]["params"][0].grad = torch.ones(3, 4).double()
    with pytest.raises(UserError, match="given:own_objective.*give that function"):
        stranger.step()
    twin = copy.deepcopy(optimizer)
    for o in (optimizer, twin):
        o.param_groups[0]["params"][0].grad = torch.ones(3, 4).double()
        o.step()
    assert torch.equal(*(o.param_groups[0]["params"][0] for o in (optimizer, twin)))


def test_two_functions_of_one_name_are_kept_apart():
    first, second = (lambda g, s=s: s * g for s in (1.0, -1.0))
    a, b = parameters([(3, 4), (3, 4)])
    start = [p.detach().clone() for p in (a, b)]
    groups = [{"params": [a], "values": first}, {"params": [b], "values": second}]
    optimizer = GeneralizedMomentum(groups, 0.1)
    a.grad = b.grad = torch.ones(3, 4).double()
    optimizer.step()
    assert torch.allclose(a - start[0], -(b - start[1])) and gap([a], start[:1]) > 0.01


@pytest.mark.parametrize("option", ["objective", "retention"])
@pytest.mark.parametrize("make", [GeneralizedGD, GeneralizedMomentum])
def test_what_has_no_closed_form_says_so(make, option):
    with pytest.raises(UserError, match=f'group 0: a given {option} has no closed form: use solve="gradient"'):
        make(parameters([(3, 4)]), 0.1, solve="exact", **{option: own_objective})
