"""What every learning rule must do, whatever it learns. Call ``check_rule(rule, oracle, window)`` once per rule.

window: None for a rule that writes one token, else the number of tokens it sees. oracle: the rule for one row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[..., Tensor]
BATCH, HEADS, OUT, IN = 3, 2, 4, 5


def case(window: int | None, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """state, key, value, rate, retain of a batch of heads."""
    generator = torch.Generator().manual_seed(seed)
    seen = () if window is None else (window,)

    def random(*shape: int) -> Tensor:
        return torch.randn(BATCH, HEADS, *shape, generator=generator, dtype=torch.float64)

    rows = [random(OUT, IN), random(*seen, IN), random(*seen, OUT), random(*seen).sigmoid(), random().sigmoid()]
    return [t.to(dtype) for t in rows]


def check_rule(rule: Rule, oracle: Rule, window: int | None) -> None:
    equals_its_oracle(rule, oracle, window)
    keeps_shape_and_dtype(rule, window)
    has_independent_rows(rule, window)
    only_retains_at_rate_zero(rule, window)
    leaves_its_arguments_alone(rule, window)
    is_differentiable(rule, window)


def equals_its_oracle(rule: Rule, oracle: Rule, window: int | None) -> None:
    arguments = case(window)
    truth = torch.stack(
        [torch.stack([oracle(*(t[b, h] for t in arguments)) for h in range(HEADS)]) for b in range(BATCH)]
    )
    assert (rule(*arguments) - truth).abs().max() <= 1e-12
    single = rule(*(t.float() for t in arguments)).double()
    assert (single - truth).norm() / truth.norm() <= 1e-6


def keeps_shape_and_dtype(rule: Rule, window: int | None) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        state, *rest = case(window, dtype)
        written = rule(state, *rest)
        assert written.shape == state.shape and written.dtype == dtype
        unbatched = rule(state[0, 0], *(t[0, 0] for t in rest))
        assert unbatched.shape == (OUT, IN)


def has_independent_rows(rule: Rule, window: int | None) -> None:
    arguments = case(window)
    whole = rule(*arguments)
    arguments[1][0] += 1
    arguments[2][0] = float("nan")
    changed = rule(*arguments)
    assert torch.equal(whole[1:], changed[1:]) and changed[0].isnan().any()


def only_retains_at_rate_zero(rule: Rule, window: int | None) -> None:
    state, key, value, rate, retain = case(window)
    written = rule(state, key, value, torch.zeros_like(rate), retain)
    assert torch.allclose(written, retain[..., None, None] * state, rtol=1e-14, atol=0)


def leaves_its_arguments_alone(rule: Rule, window: int | None) -> None:
    arguments = case(window)
    copies = [t.clone() for t in arguments]
    rule(*arguments)
    assert all(torch.equal(t, copy) for t, copy in zip(arguments, copies, strict=True))


def is_differentiable(rule: Rule, window: int | None) -> None:
    arguments = [t[:1, :1].requires_grad_() for t in case(window)]
    assert torch.autograd.gradcheck(rule, arguments)
