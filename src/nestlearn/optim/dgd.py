"""DGD: a gradient step that also forgets what the map held at its inputs, exact for a whole batch (NL Eq. 56–57)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.optim.base import Bucket, MemoryOptimizer
from nestlearn.optim.capture import captured_for, forget_inputs
from nestlearn.optim.checks import check_choice, check_decay
from nestlearn.rules.dgd_batch import Proximal, dgd_batch, dgd_in_turn, proximal, proximal_of_gram


class InputOptimizer(MemoryOptimizer):
    """An optimizer that needs each weight's inputs as well as its gradient; see ``capture_inputs``.

    Raises UserError, before anything is changed, for a weight with a gradient and no captured inputs, unless lr is 0.
    """

    def _needs_inputs(self, group: dict[str, Any]) -> bool:
        return group["rule"] == "memory"

    def _needs_errors(self, group: dict[str, Any]) -> bool:
        raise NotImplementedError

    @torch.compiler.disable(recursive=False)
    def step(self, closure: Callable[[], Any] | None = None, *, tokens: int | None = None) -> Any:  # pyright: ignore
        loss = super().step(closure, tokens=tokens)
        self._forget_inputs()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._forget_inputs()

    def _forget_inputs(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                forget_inputs(p)

    def _gradients(self) -> list[tuple[str, Tensor]]:
        for group in self.param_groups:
            for p in group["params"] if self._needs_inputs(group) else ():
                if p.requires_grad and p.grad is not None:
                    self._check_captured(group, p)
        return super()._gradients()

    @torch.compiler.disable()
    def _check_captured(self, group: dict[str, Any], p: Tensor) -> None:
        captured = captured_for(p)
        if captured is None and float(group["lr"]) == 0:
            return  # it moves nothing; torch.distributed.checkpoint steps so to have a state to load into
        if captured is None:
            raise UserError(
                f"parameter {self.name_of(p)} has a gradient but no captured inputs: run its forward and backward pass "
                'inside `with capture_inputs(model):`; a weight of no nn.Linear belongs in a group with rule="adamw"'
            )
        if self._needs_errors(group) and len(captured.errors) != len(captured.inputs):
            raise UserError(
                f"parameter {self.name_of(p)} has no captured output gradients: use capture_inputs(model, errors=True)"
            )

    @torch.compiler.disable()
    def _seen(self, p: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inputs (n, N, in) and errors (n, N, out) of this process, for a parameter of n matrices."""
        captured = captured_for(p)
        if captured is None:
            return like.new_zeros(len(like), 1, like.shape[2]), like.new_zeros(len(like), 1, like.shape[1])
        return captured.joined(like.dtype)


class DGD(InputOptimizer):
    """Delta gradient descent on the weights of ``nn.Linear`` layers.

        D = (I + lr s XᵀX)⁻¹
        m ← μ m − lr ∇W D
        W ← W D + m − lr λ W

    X (N, in): every input row since the last step; ∇W is ``.grad``: clipping, unscaling and accumulation act as usual.

    lr          η >= 0; "joint" is bounded for every η
    momentum    μ in [0, 1)
    reduction   "mean": the loss is a mean, s = 1/N with N the rows that this layer saw; "sum": s = 1
    batch       "joint": the proximal step of the whole batch. "sequential": one sample after the other, each NL Eq. 57
                at the rate η s; N steps of Python, on the captured errors instead of ``.grad`` (capture_inputs(model,
                errors=True); neither clipping nor a GradScaler reaches them)
    weight_decay  λ >= 0; the retention of NL Eq. 88 is α = 1 − lr λ

    A fixed point has W x = −∇_y L on average: DGD minimises the loss plus ½ ‖y‖² of each layer's output, by the letter.
    Biases, norms and everything that is no weight of an ``nn.Linear`` belong in a group with ``rule="adamw"``; a matrix
    that is used in another way may join by ``nestlearn.optim.capture.record_inputs``.
    Across processes "joint" sums XᵀX and N over the default process group: data parallelism, as ``.grad`` is averaged.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *,
        momentum: float = 0.0,
        reduction: str = "mean",
        batch: str = "joint",
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        options = {"momentum": momentum, "reduction": reduction, "batch": batch, "lr": lr}
        super().__init__(params, options | {"weight_decay": weight_decay, "maximize": maximize})

    def _check(self, group: dict[str, Any], where: str) -> None:
        check_decay(where, "momentum", group["momentum"])
        check_choice(where, "reduction", group["reduction"], ("mean", "sum"))
        check_choice(where, "batch", group["batch"], ("joint", "sequential"))

    def _needs_errors(self, group: dict[str, Any]) -> bool:
        return group["batch"] == "sequential"

    def _initial(self, group: dict[str, Any], grad: Tensor) -> dict[str, Any]:
        return {"momentum": torch.zeros_like(grad)}

    def _update(self, group: dict[str, Any], bucket: Bucket) -> Tensor:
        step = self._in_turn if group["batch"] == "sequential" else self._joint
        stacks = (bucket.weight, bucket.state["momentum"], bucket.grad)
        steps = [step(group, p, *own) for p, *own in each(bucket.parameters, *stacks)]
        changes, momenta = zip(*steps, strict=True)
        bucket.state["momentum"] = torch.cat(momenta)
        return torch.cat(changes)

    def _joint(self, group: dict[str, Any], p: Tensor, w: Tensor, m: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        d = proximal_of_all(self._seen(p, w)[0], group["lr"], group["reduction"])
        return dgd_batch(w, m, grad, group["lr"], group["momentum"], d)

    def _in_turn(self, group: dict[str, Any], p: Tensor, w: Tensor, m: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        if processes() > 1:
            raise UserError('batch="sequential" needs all samples in one process: use batch="joint"')
        inputs, errors = self._seen(p, w)
        assert errors is not None
        share = 1 / inputs.shape[1] if group["reduction"] == "mean" else 1.0
        errors = -errors if group["maximize"] else errors
        return dgd_in_turn(w, m, inputs, errors, group["lr"], share, group["momentum"])


def each(parameters: list[Tensor], *stacks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For each parameter of a bucket: it, and its own part (matrices, …) of every stack."""
    return zip(parameters, *(stack.chunk(len(parameters)) for stack in stacks), strict=True)


def proximal_of_all(inputs: Tensor, rate: float | Tensor, reduction: str) -> Proximal:
    """D of the inputs (n, N, in) of all processes."""
    if processes() == 1:
        share = 1 / inputs.shape[1] if reduction == "mean" else 1.0
        return proximal(inputs, rate * share)
    share = 1 / total(inputs.new_tensor(inputs.shape[1])) if reduction == "mean" else 1.0
    return proximal_of_gram(total(inputs.mT @ inputs) * (rate * share))


def total(own: Tensor) -> Tensor:
    """The sum over all processes."""
    if processes() > 1:
        dist.all_reduce(own)
    return own


@torch.compiler.disable()
def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
