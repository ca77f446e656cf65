"""What every optimizer that is a memory must do. Each check takes a ``Member`` of tests/optim/family.py.

``CHECKS`` lists them; sharded parameters and checkpoints of several ranks are in tests/optim/test_distributed.py.
Gradients are small random numbers, the same in every run: number ``step`` of parameter ``i``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nestlearn.errors import UserError
from tests.optim.family import Member

SHAPES = [(4, 5), (4, 5), (6, 3), (2, 3, 4), (3, 2, 2, 2)]
STEPS = 20
Run = list[Tensor]


def parameters(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 0) -> Run:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype, copy=True))
        for s in shapes
    ]


def gradient(step: int, i: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + i)
    return (0.1 * torch.randn(like.shape, generator=generator, dtype=torch.float64)).to(like.dtype)


def walk(member: Member, optimizer: Any, ps: Run, steps: range, step: Callable[[], Any] | None = None) -> None:
    """Takes these steps."""
    for number in steps:
        for i, p in enumerate(ps):
            member.feed(optimizer, p, gradient(number, i, p))
        (step or optimizer.step)()


def after(member: Member, steps: int = 7, dtype: torch.dtype = torch.float64, **given: Any) -> tuple[Any, Run]:
    ps = parameters(dtype=dtype)
    optimizer = member.build(ps, **given)
    walk(member, optimizer, ps, range(steps))
    return optimizer, ps


def gap(a: Run, b: Run) -> float:
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True))


def same(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def as_matrices(t: Tensor) -> list[Tensor]:
    return list(t) if t.ndim == 3 else [t.reshape(len(t), -1)]


def truth(member: Member, ps: Run, gradients: list[Run], **given: Any) -> Run:
    """The oracle's parameters after these gradients, each in its own shape."""
    flat = [m for p in ps for m in as_matrices(p.detach().double())]
    steps = [[m for g in step for m in as_matrices(g.double())] for step in gradients]
    ends = iter(member.oracle(flat, steps, **member.settings | given))
    return [torch.stack([next(ends) for _ in as_matrices(p)]).reshape(p.shape) for p in ps]


DIMENSION = st.integers(1, 5)
SHAPE = st.one_of(
    st.tuples(DIMENSION, DIMENSION),
    st.tuples(st.integers(1, 3), DIMENSION, DIMENSION),
    st.tuples(DIMENSION, st.integers(1, 3), st.integers(1, 2), st.integers(1, 2)),
)


def equals_its_oracle(member: Member) -> None:
    """Float64 to 1e-10 after 20 steps, whatever the shapes; float32 and bfloat16 stay beside it."""

    @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(shapes=st.lists(SHAPE, min_size=1, max_size=3), weight_decay=st.sampled_from([0.0, 0.3]))
    def exact(shapes: list[tuple[int, ...]], weight_decay: float) -> None:
        assert error(shapes, torch.float64, weight_decay) <= 1e-10

    def error(shapes: list[tuple[int, ...]], dtype: torch.dtype, weight_decay: float = 0.1, **given: Any) -> float:
        ps = parameters(shapes, dtype)
        gradients = [[gradient(step, i, p) for i, p in enumerate(ps)] for step in range(STEPS)]
        expected = truth(member, ps, gradients, lr=0.02, weight_decay=weight_decay)
        start = [p.detach().clone() for p in ps]
        walk(member, member.build(ps, weight_decay=weight_decay, **given), ps, range(STEPS))
        assert gap(start, expected) > 1e-4
        return gap(ps, expected)

    exact()
    exact_products = {"ns_dtype": torch.float32} if "ns_dtype" in member.build(parameters()).defaults else {}
    assert error(SHAPES, torch.float32, **exact_products) <= 2e-5
    assert error(SHAPES, torch.float32) <= 0.02
    assert error(SHAPES, torch.bfloat16) <= 0.15  # parameters up to 3, rounded to 2⁻⁸ twenty times


def bfloat16_has_float32_state(member: Member) -> None:
    """It moves where a step is smaller than the parameter's rounding in sum only; loading does not cast the state."""
    optimizer, ps = after(member, dtype=torch.bfloat16)
    for state in (optimizer.state, reloaded(member, optimizer, ps).state):
        for p in ps:
            dtypes = {name: v.dtype for name, v in state[p].items() if isinstance(v, Tensor)}
            held = dtypes.pop("slow_direction", None)  # of M3: it is what Newton–Schulz returned, in its own dtype
            assert held in (None, torch.bfloat16), dtypes
            assert set(dtypes.values()) == {torch.float32} or (member.shared and p is not ps[0] and not dtypes), dtypes


def reloaded(member: Member, optimizer: Any, ps: Run) -> Any:
    new = member.build(ps)
    new.load_state_dict(optimizer.state_dict())
    return new


def through_torch_save(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(saved: dict[str, Any]) -> dict[str, Any]:
    """Tensors to safetensors, everything else to JSON."""
    tensors = {f"{i}.{name}": v for i, s in saved["state"].items() for name, v in s.items() if isinstance(v, Tensor)}
    numbers = {i: {n: v for n, v in s.items() if not isinstance(v, Tensor)} for i, s in saved["state"].items()}
    text, data = json.dumps({"groups": saved["param_groups"], "numbers": numbers}), save_safetensors(tensors)
    back = json.loads(text)
    state: dict[int, dict[str, Any]] = {int(i): values for i, values in back["numbers"].items()}
    for key, value in load_safetensors(data).items():
        i, name = key.split(".", 1)
        state[int(i)][name] = value
    return {"state": state, "param_groups": back["groups"]}


def resumes_bit_for_bit(member: Member) -> None:
    """Saved in the middle of a period of three, and of four, loaded, and on: as if nothing had happened."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        _, whole = after(member, 13, dtype)
        for through in (lambda saved: saved, through_torch_save, through_safetensors):
            optimizer, ps = after(member, 5, dtype)
            copies = [torch.nn.Parameter(p.detach().clone()) for p in ps]
            resumed = member.build(copies)
            resumed.load_state_dict(through(optimizer.state_dict()))
            walk(member, resumed, copies, range(5, 13))
            assert same(copies, whole), (dtype, through)


def a_saved_state_does_not_change(member: Member) -> None:
    optimizer, ps = after(member, 3)
    saved = optimizer.state_dict()
    before = [v.clone() for s in saved["state"].values() for v in s.values() if isinstance(v, Tensor)]
    walk(member, optimizer, ps, range(3, 6))
    assert same([v for s in saved["state"].values() for v in s.values() if isinstance(v, Tensor)], before)


def takes_a_closure(member: Member) -> None:
    _, whole = after(member, 4)
    ps = parameters()
    optimizer = member.build(ps)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        for i, p in enumerate(ps):
            member.feed(optimizer, p, gradient(closure.number, i, p))
        closure.number += 1
        return torch.tensor(7.0)

    closure.number = 0
    assert [optimizer.step(closure).item() for _ in range(4)] == [7.0] * 4
    assert same(ps, whole)


def maximizes(member: Member) -> None:
    """As minimising with the opposite gradients, and that is another way."""
    _, up = after(member, maximize=True)
    ps = parameters()
    optimizer = member.build(ps)
    for number in range(7):
        for i, p in enumerate(ps):
            member.feed(optimizer, p, -gradient(number, i, p))
        optimizer.step()
    assert same(up, ps) and not same(up, after(member)[1])


def groups_have_settings_of_their_own(member: Member) -> None:
    """Each group as if it were alone; one of them is stepped by AdamW, and equals torch's."""
    ps = parameters([(4, 5), (4, 5), (4, 5), (7,)])
    twins = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    adamw = {"rule": "adamw", "lr": 0.03, "weight_decay": 0.2}
    groups = [{"params": ps[:1], "lr": 0.05}, {"params": ps[1:2], "weight_decay": 0.2}, {"params": ps[2:]} | adamw]
    walk(member, member.build(groups), ps, range(6))
    alone = [member.build(twins[:1], lr=0.05), member.build(twins[1:2], weight_decay=0.2),
             torch.optim.AdamW(twins[2:], lr=0.03, betas=(0.9, 0.95), weight_decay=0.2)]  # fmt: skip
    for number in range(6):
        for i, (p, optimizer) in enumerate(zip(twins, [*alone, alone[-1]], strict=True)):
            member.feed(optimizer, p, gradient(number, i, p))
        for optimizer in alone:
            optimizer.step()
    assert same(ps[:2], twins[:2]) and gap(ps[2:], twins[2:]) <= 1e-14


def leaves_alone_what_has_no_gradient(member: Member) -> None:
    """Untouched and frozen parameters and their state do not move; who joins late is as young as its state."""
    ps = parameters([(4, 5), (4, 5), (6, 3)])
    ps[2].requires_grad_(False)
    ps[2].grad = gradient(0, 2, ps[2])  # left over from before it was frozen
    optimizer = member.build(ps, weight_decay=0.3)
    start = [p.detach().clone() for p in ps]
    walk(member, optimizer, ps[:1], range(5))
    assert same(ps[1:], start[1:]) and ps[1] not in optimizer.state and not same(ps[:1], start[:1])
    ps[0].grad = None
    held, state = ps[0].detach().clone(), dict(optimizer.state[ps[0]])
    for number in range(4):
        member.feed(optimizer, ps[1], gradient(number, 1, ps[1]))
        optimizer.step()
    own = {"step"} if member.shared else set(state)
    assert torch.equal(ps[0], held) and all(optimizer.state[ps[0]][name] is state[name] for name in own)
    if member.shared:
        return
    alone = parameters([(4, 5), (4, 5)])[1:]
    late = member.build(alone, weight_decay=0.3)
    for number in range(4):
        member.feed(late, alone[0], gradient(number, 1, alone[0]))
        late.step()
    assert same(alone, ps[1:2])


def refuses_gradients_that_it_cannot_use(member: Member) -> None:
    """Sparse, complex, not finite: names the parameter (and the step), and nothing has changed."""
    ps = parameters([(4, 5), (6, 3)])
    optimizer = member.build([("first.weight", ps[0]), ("second.weight", ps[1])])
    walk(member, optimizer, ps, range(2))
    before = [p.detach().clone() for p in ps]
    for broken in (float("nan"), float("inf"), -float("inf")):
        for i, p in enumerate(ps):
            member.feed(optimizer, p, gradient(2, i, p))
        ps[1].grad[1, 1] = broken
        with pytest.raises(UserError, match=r"'second\.weight'.*not finite at step 3"):
            optimizer.step()
        assert same(ps, before) and optimizer.state[ps[0]]["step"] == 2
    ps[1].grad = gradient(2, 1, ps[1]).to_sparse()
    with pytest.raises(UserError, match=r"'second\.weight'.*sparse"):
        optimizer.step()
    z = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    with pytest.raises(UserError, match=r"complex64"):
        member.build([z])
    walk(member, optimizer, ps, range(2, 9))
    assert same(ps, walked(member, [(4, 5), (6, 3)], 9))


def walked(member: Member, shapes: list[tuple[int, ...]], steps: int) -> Run:
    ps = parameters(shapes)
    walk(member, member.build(ps), ps, range(steps))
    return ps


def refuses_bad_settings(member: Member) -> None:
    """One line that names the group and the hyperparameter. Parameters that are no matrices, and given twice, too."""
    p = torch.nn.Parameter(torch.zeros(3, 3))
    for bad in ({"lr": -1.0}, {"lr": float("nan")}, {"lr": torch.ones(2)}, {"weight_decay": -0.1}, *member.bad):
        name = next(iter(bad))
        with pytest.raises(UserError, match=f"parameter group 1: {name}") as caught:
            member.build([{"params": [torch.nn.Parameter(torch.zeros(3, 3))]}, {"params": [p]} | bad])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"'bias' has the shape \(3,\).*parameter_groups"):
        member.build([("bias", torch.nn.Parameter(torch.zeros(3)))])
    with pytest.warns(UserWarning), pytest.raises(UserError, match="twice"):
        member.build([p, p])
    with pytest.raises(UserError, match="rule is 'adam'.*did you mean 'adamw'"):
        member.build([{"params": [p], "rule": "adam"}])


class NoHostSync(TorchDispatchMode):
    """Fails at an operation that would wait for an accelerator."""

    FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"aten.{name} waits for the device"
        return func(*args, **kwargs or {})


def never_waits_for_the_device(member: Member) -> None:
    """With lr a number and a tensor, over steps that fire a slow memory and steps that do not."""
    with pytest.raises(AssertionError, match="waits"), NoHostSync():
        torch.ones(()).item()
    for lr in (0.02, torch.tensor(0.02, dtype=torch.float64)):
        ps = parameters()
        optimizer = member.build(ps, lr=lr, weight_decay=0.1)
        for number in range(5):
            for i, p in enumerate(ps):
                member.feed(optimizer, p, gradient(number, i, p))
            with NoHostSync():
                optimizer.step()


def takes_a_tensor_and_a_schedule_as_lr(member: Member) -> None:
    """The same path as with numbers, also when a scheduler changes it."""
    runs = []
    for lr in (0.02, torch.tensor(0.02, dtype=torch.float64)):
        ps = parameters()
        optimizer = member.build(ps, lr=lr, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        walk(member, optimizer, ps, range(6), lambda o=optimizer, s=schedule: (o.step(), s.step()))
        runs.append(ps)
    assert gap(*runs) <= 1e-12
    assert gap(runs[0], after(member, 6, weight_decay=0.1)[1]) > 1e-4


def compiled_equals_eager(member: Member) -> None:
    """Through dynamo and AOT autograd; something is compiled, and after the first periods nothing more."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    lr, runs = torch.tensor(0.02, dtype=torch.float64), []
    for compiled in (False, True):
        ps = parameters([(4, 5), (4, 5)])
        optimizer = member.build(ps, lr=lr)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else None
        walk(member, optimizer, ps, range(4), step)
        seen = graphs()
        walk(member, optimizer, ps, range(4, 12), step)
        runs.append(ps)
    assert gap(*runs) <= 1e-6
    assert 0 < seen == graphs(), "compiles anew"
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


CHECKS = [
    equals_its_oracle,
    bfloat16_has_float32_state,
    resumes_bit_for_bit,
    a_saved_state_does_not_change,
    takes_a_closure,
    maximizes,
    groups_have_settings_of_their_own,
    leaves_alone_what_has_no_gradient,
    refuses_gradients_that_it_cannot_use,
    refuses_bad_settings,
    never_waits_for_the_device,
    takes_a_tensor_and_a_schedule_as_lr,
    compiled_equals_eager,
]
