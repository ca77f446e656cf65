"""What the shared bookkeeping does beyond the contract: the gate for accelerators, AdamW groups, buckets, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.optim import M3, DeltaMomentum, base, checks
from nestlearn.optim.matrices import pack, unpack
from tests.contracts.optimizer import gap, gradient, parameters, same
from tests.optim.family import FAMILY
from tests.oracles import optimizers as truth

M3_MEMBER = FAMILY[0]


class Gate:
    """Stands for the flag of an accelerator, which the CPU of a test has not."""

    def __init__(self, finite: bool) -> None:
        self.flag = torch.tensor(finite)

    def check(self, gradients, step):
        return {torch.device("cpu"): self.flag}


SHAPES = [(4, 5), (4, 5), (6, 3), (7,)]


def stepped(member, steps, gate=None, broken=False):
    """Parameters and all state after so many steps, the last one behind a gate or with a nan in its gradient."""
    ps = parameters(SHAPES)
    optimizer = member.build([{"params": ps[:3]}, {"params": ps[3:], "rule": "adamw"}], weight_decay=0.3)
    for number in range(steps):
        for i, p in enumerate(ps):
            member.feed(optimizer, p, gradient(number, i, p))
        if number == steps - 1:
            optimizer._gate = gate or optimizer._gate
            if broken:
                ps[1].grad[0, 0] = float("nan")
        optimizer.step()
    return ps + [v for p in ps for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("member", FAMILY[:9], ids=lambda m: m.name)
def test_a_closed_gate_keeps_everything_and_an_open_one_changes_nothing(member):
    assert same(stepped(member, 4, Gate(False), broken=True), stepped(member, 3))
    assert same(stepped(member, 4, Gate(True)), stepped(member, 4))
    assert not same(stepped(member, 4), stepped(member, 3))


class Arrival:
    def __init__(self) -> None:
        self.arrived = False

    def query(self) -> bool:
        return self.arrived


def test_the_error_of_an_accelerator_comes_when_its_numbers_have_arrived():
    gate, arrival = checks.FiniteGate(), Arrival()
    gate._pending.append((arrival, torch.tensor([1.0, float("inf")]), ["'a'", "'b'"], 17))
    assert gate.check([], 18) == {}
    arrival.arrived = True
    with pytest.raises(UserError, match="parameter 'b': its gradient is not finite at step 17"):
        gate.check([], 19)
    assert gate.check([], 20) == {}


def test_a_large_finite_gradient_is_finite():
    p = torch.nn.Parameter(torch.zeros(3, 3))
    p.grad = torch.full((3, 3), 1e30)
    DeltaMomentum([p], lr=1e-3).step()
    assert p.isfinite().all() and p.any()


def test_adamw_groups_equal_the_sums_that_adamw_stands_for():
    ps = parameters([(7,), (4, 5), ()])
    settings = {"betas_adamw": (0.8, 0.9), "eps_adamw": 1e-3, "weight_decay": 0.2}
    expected = [
        truth.adamw(p.detach(), [gradient(n, i, p) for n in range(9)], lr=0.05, betas=(0.8, 0.9), eps=1e-3,
                    weight_decay=0.2)
        for i, p in enumerate(ps)
    ]  # fmt: skip
    optimizer = M3([{"params": ps, "rule": "adamw"} | settings], lr=0.05)
    for n in range(9):
        for i, p in enumerate(ps):
            p.grad = gradient(n, i, p)
        optimizer.step()
    assert gap(ps, expected) <= 1e-13
    with pytest.raises(UserError, match=r"betas_adamw\[1\] is 1.0"):
        M3([{"params": ps, "rule": "adamw", "betas_adamw": (0.9, 1.0)}], lr=0.05)


def test_copies_and_pickles_go_on_alike():
    runs = []
    for through in (lambda o: o, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        ps = parameters()
        optimizer = M3_MEMBER.build(ps)
        for steps in (range(4), range(4, 8)):
            for n in steps:
                for i, p in enumerate(optimizer.param_groups[0]["params"]):
                    p.grad = gradient(n, i, p)
                optimizer.step()
            optimizer = through(optimizer)
        runs.append(optimizer.param_groups[0]["params"])
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


def test_the_size_of_a_bucket_changes_nothing(monkeypatch):
    """One at a time or all at once, to rounding: how many are stacked is a matter of speed."""
    many = stepped(M3_MEMBER, 5)
    monkeypatch.setattr(base, "CPU_ELEMENTS", 1)
    assert gap(many, stepped(M3_MEMBER, 5)) <= 1e-12


def test_state_is_stacked_without_copies_after_the_first_step():
    ps = parameters([(4, 5)] * 3)
    stacked = torch.randn(3, 4, 5, dtype=torch.float64)
    parts = unpack(stacked, ps)
    assert pack(parts, ps).data_ptr() == stacked.data_ptr() and torch.equal(pack(parts, ps), stacked)
    assert torch.equal(pack(parts[::-1], ps), stacked.flip(0))
    assert torch.equal(pack([p.clone() for p in parts], ps), stacked)


def test_new_groups_may_join_and_old_settings_are_kept_where_a_checkpoint_has_none():
    first, second = parameters([(4, 5), (4, 5)])
    optimizer = M3_MEMBER.build([first])
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    with pytest.raises(UserError, match="parameter group 2: lr"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, 2))], "lr": -1})
    assert len(optimizer.param_groups) == 2
    saved = optimizer.state_dict()
    del saved["param_groups"][1]["slow_weight"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["slow_weight"] == 0.2 and optimizer.param_groups[1]["lr"] == 0.5


def test_tied_weights_are_stepped_once():
    one, two = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    two.weight = one.weight
    model = torch.nn.Sequential(one, two)
    optimizer = M3_MEMBER.build(list(model.parameters()))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(one.weight, two.weight) and optimizer.state[one.weight]["step"] == 1


@pytest.mark.slow
def test_inductor_equals_eager(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    runs = []
    for compiled in (False, True):
        ps = parameters([(8, 16), (8, 16)], torch.float32)
        optimizer = M3_MEMBER.build(ps, ns_dtype=torch.float32)
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        for n in range(4):
            for i, p in enumerate(ps):
                p.grad = gradient(n, i, p)
            step()
        runs.append(ps)
    torch._dynamo.reset()
    assert gap(*runs) <= 1e-6
