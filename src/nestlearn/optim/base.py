"""What every optimizer that is a memory shares: the bookkeeping around a rule that is a pure function.

    W ← (1 − lr · weight_decay) W + update(the memory's state, ∇W)            one step of one matrix

A subclass says which state a matrix starts with (``_initial``) and what one step does to it (``_update``). It sees
*buckets*: all matrices of one shape, dtype and age in a group, stacked as (n, out, in), float32 at least.
Nothing here reads a number from a device: ages and periods are Python ints in ``state[parameter]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestlearn.errors import UserError
from nestlearn.optim.adamw import ADAMW_DEFAULTS, adamw_initial, adamw_update, check_adamw
from nestlearn.optim.checks import FiniteGate, check_choice, check_count, check_gradient, check_number, check_parameter
from nestlearn.optim.matrices import local, pack, stack, unpack, whole

DEFAULTS = {"weight_decay": 0.0, "maximize": False, "rule": "memory", "steps": 0} | ADAMW_DEFAULTS
# Elements of one bucket: on a CPU temporaries should stay in the cache, on an accelerator launches should be few.
CPU_ELEMENTS, DEVICE_ELEMENTS = 2**18, 2**26


@dataclass
class Bucket:
    """Matrices of one group that are updated in one batched call: n of them, out × in.

    parameters  whose matrices they are        grad  (n, out, in), whole, negated for ``maximize``
    state       stacks (n, …), and ints that all of them share; ``_update`` replaces what it changes and writes
                into no tensor. ``state["step"]``: steps of these parameters including this one, >= 1
    tokens      behind this step, as ``step`` was told, else None
    """

    parameters: list[Tensor]
    grad: Tensor
    state: dict[str, Any]
    tokens: int | None = None

    @property
    def weight(self) -> Tensor:
        """The matrices themselves before this step, (n, out, in), like ``grad``."""
        return stack([whole(p) for p in self.parameters])

    def correction(self, beta: float) -> Tensor:
        """1 − βᵗ, Adam's bias correction, as a 0-d tensor: a compiled step sees no new constant at each step."""
        return torch.tensor(1 - beta ** self.state["step"], dtype=torch.float64)


class MemoryOptimizer(Optimizer):
    """Base class; see the module's docstring. ``defaults`` holds every hyperparameter of a group, ``lr`` among them.

    A group with ``rule="adamw"`` (vectors, embeddings, heads, as ``parameter_groups`` makes them) is stepped by AdamW
    with its own ``betas_adamw`` and ``eps_adamw``. In any other group each parameter has at least two dimensions:
    2-D is a matrix; 3-D, (heads, out, in), a stack of them; 4-D and more, a convolution, is (out, everything else).

    Raises UserError for a hyperparameter outside its range, a parameter below two dimensions, a parameter given
    twice, a sparse or complex gradient, and one that is not finite: on a CPU before anything is changed; on an
    accelerator, where asking would wait for the device, that step changes nothing and a later one raises.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._gate = FiniteGate()
        super().__init__(params, DEFAULTS | defaults)

    # What a subclass supplies.

    def _check(self, group: dict[str, Any], where: str) -> None:
        """Raises UserError for a hyperparameter of this optimizer outside its range; ``where`` names the group."""

    def _initial(self, group: dict[str, Any], grad: Tensor) -> dict[str, Any]:
        """State before the first step for grad (n, out, in): tensors (n, …), ints. All keys that it will ever have."""
        raise NotImplementedError

    def _update(self, group: dict[str, Any], bucket: Bucket) -> Tensor:
        """What is added to the matrices, (n, out, in), −lr included. Replaces entries of ``bucket.state``."""
        raise NotImplementedError

    # Bookkeeping.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            self._check_group(group, f"parameter group {index}")
        except UserError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    @torch.compiler.disable(recursive=False)  # the rules are compiled, the bookkeeping around them is not
    def step(self, closure: Callable[[], Any] | None = None, *, tokens: int | None = None) -> Any:  # pyright: ignore
        """One step. Returns the closure's value. tokens behind it: for an optimizer whose period is in tokens."""
        if tokens is not None:
            check_count("step", "tokens", tokens)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        finite = self._gate.check(self._gradients(), 1 + max((g["steps"] for g in self.param_groups), default=0))
        for group in self.param_groups:
            group["steps"] += 1
            for parameters in self._buckets(group):
                self._step_bucket(group, parameters, finite.get(parameters[0].device), tokens)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's, without the functions that a group was given: whoever loads it gives them again."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            for name in [name for name, value in group.items() if callable(value)]:
                del group[name]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but the state keeps its dtype, which torch would cast to the parameter's."""
        before = self.param_groups
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, before, strict=True):
            group.update({name: value for name, value in own.items() if name not in group})
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        ours = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, ours, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._gate = FiniteGate()

    def name_of(self, parameter: Tensor) -> str:
        """For messages: its name where the optimizer was given names, else its place."""
        for at, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                if p is parameter:
                    return _names(group, at)[index]
        raise KeyError("not a parameter of this optimizer")

    def _check_group(self, group: dict[str, Any], where: str) -> None:
        check_choice(where, "rule", group["rule"], ("memory", "adamw"))
        check_number(where, "lr", group["lr"], low=0)
        check_number(where, "weight_decay", group["weight_decay"], low=0)
        check_adamw(group, where) if group["rule"] == "adamw" else self._check(group, where)
        if len(set(group["params"])) < len(group["params"]):
            raise UserError(f"{where}: a parameter is given twice: give each once, as parameter_groups(model) does")
        for p in group["params"]:
            check_parameter(self.name_of(p), p, matrix=group["rule"] == "memory")

    def _gradients(self) -> list[tuple[str, Tensor]]:
        """All that this step will use, each with its parameter's name."""
        found = []
        for at, group in enumerate(self.param_groups):
            for name, p in zip(_names(group, at), group["params"], strict=True):
                if has_gradient(p):
                    check_gradient(name, p.grad)
                    found.append((name, p.grad))
        return found

    def _bucket_key(self, group: dict[str, Any], p: Tensor) -> tuple:
        """Parameters of a group with equal keys are stacked. The ints of the state are their age."""
        ages = tuple(value for value in self.state[p].values() if isinstance(value, int))
        return (p.shape, p.dtype, p.device, ages)

    def _buckets(self, group: dict[str, Any]) -> Iterator[list[Tensor]]:
        buckets: dict[tuple, list[Tensor]] = {}
        for p in filter(has_gradient, group["params"]):
            buckets.setdefault(self._bucket_key(group, p), []).append(p)
        for parameters in buckets.values():
            limit = CPU_ELEMENTS if parameters[0].device.type == "cpu" else DEVICE_ELEMENTS
            count = max(1, limit // parameters[0].numel())
            yield from (parameters[i : i + count] for i in range(0, len(parameters), count))

    @torch.compiler.disable(recursive=False)
    def _step_bucket(
        self, group: dict[str, Any], parameters: list[Tensor], finite: Tensor | None, tokens: int | None
    ) -> None:
        bucket = self._load(group, parameters, tokens)
        if finite is not None:  # a rule never sees a nan, which a decomposition would refuse
            bucket.grad = torch.where(finite, bucket.grad, 0)
        before = bucket.state.copy()
        bucket.state["step"] += 1
        update = adamw_update(group, bucket) if group["rule"] == "adamw" else self._update(group, bucket)
        if finite is not None:  # on the device: a step with a gradient that is not finite changes nothing
            update = torch.where(finite, update, 0)
            for name, new in bucket.state.items():
                if isinstance(new, Tensor):
                    bucket.state[name] = torch.where(finite, new, before[name])
        self._store(bucket)
        _apply(group, parameters, update, finite)

    @torch.compiler.disable()
    def _load(self, group: dict[str, Any], parameters: list[Tensor], tokens: int | None) -> Bucket:
        grad = stack([whole(p.grad) for p in parameters if p.grad is not None])
        if group["maximize"]:
            grad = -grad
        states = [self.state[p] for p in parameters]
        if states[0]:
            state = {name: _join([s[name] for s in states], parameters) for name in states[0]}
        else:
            state = {"step": 0} | (adamw_initial(grad) if group["rule"] == "adamw" else self._initial(group, grad))
        return Bucket(parameters, grad, state, tokens)

    @torch.compiler.disable()
    def _store(self, bucket: Bucket) -> None:
        """Into new dicts: a ``state_dict()`` that somebody holds stays what it was."""
        own: list[dict[str, Any]] = [{} for _ in bucket.parameters]
        for name, value in bucket.state.items():
            is_int = not isinstance(value, Tensor)
            values = [value] * len(own) if is_int else unpack(value, bucket.parameters)
            for state, part in zip(own, values, strict=True):
                state[name] = part
        for p, state in zip(bucket.parameters, own, strict=True):
            self.state[p] = self.state[p] | state


def has_gradient(p: Tensor) -> bool:
    """Whether a step moves it: frozen, untouched and empty parameters, and their state, stay as they are."""
    return p.requires_grad and p.grad is not None and p.numel() > 0


def _names(group: dict[str, Any], at: int) -> list[str]:
    if "param_names" in group:
        return [repr(name) for name in group["param_names"]]
    return [f"{index} of group {at}" for index in range(len(group["params"]))]


def _join(values: list[Any], parameters: list[Tensor]) -> Any:
    return pack(values, parameters) if isinstance(values[0], Tensor) else values[0]


@torch.compiler.disable()
def _apply(group: dict[str, Any], parameters: list[Tensor], update: Tensor, finite: Tensor | None) -> None:
    """W ← (1 − lr λ) W + update, in float32 at least, rounded to the parameter's dtype once."""
    decay = None
    if group["weight_decay"]:
        shrink = group["lr"] * group["weight_decay"]
        decay = 1 - (shrink if finite is None else shrink * finite.double())
    for p, own in zip(parameters, unpack(update, parameters), strict=True):
        target, own = local(p), local(own)
        if target.dtype != own.dtype:
            own = target.to(own.dtype).mul_(1 if decay is None else decay).add_(own)
            target.copy_(own)
        else:
            if decay is not None:
                target.mul_(decay)
            target.add_(own)
