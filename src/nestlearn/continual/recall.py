"""What a stream knew before answers beside what it is now, so that reading on cannot lose it.

    p(x_t) = Σ_i w_i(t) p_i(x_t),      w_i(t + 1) = (1 − s) w_i(t) p_i(x_t) / p(x_t) + s / n

    i  the slow weights, marks of the stream, and the stream as it is: n voices      w_i(0) = 1 / n      s  share

The fixed share of Herbster and Warmuth, "Tracking the best expert", 1998. Whatever the text, its T tokens cost at most
log n − T log(1 − s) nats more than with the best voice alone, so what is forgotten is bounded however far the levels
have moved. The price is one forward for each voice, and the state of each mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.continual.online import OnlineLearner
from nestlearn.errors import UserError

SLOW, NOW = "slow weights", "now"
SHARE = 1e-3


@torch.no_grad()
def voices(learner: OnlineLearner, tokens: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """What each voice would pay for a text that none of them has read, from an empty context.

    tokens (B, T), T >= 2, a row for each stream; names: `SLOW`, marks of the stream, `NOW`; None: all that it has
    Returns by name the nats of each token but the first (B, T - 1), float64. The least sum says which voice knows such
    text best: a fork that forgets back to that mark goes on from there.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise UserError(f"tokens has the shape {tuple(tokens.shape)}, must be (streams, tokens), at least 2 tokens")
    own = [SLOW, *(mark.name for mark in cast(Any, learner.state.marks)), NOW]
    if len(set(own)) < len(own):
        raise UserError(f"a mark is named {SLOW!r} or {NOW!r}, which name voices: give it another name")
    return {name: _nats(learner, name, tokens) for name in (own if names is None else names)}


def mixed(nats: Tensor, share: float = SHARE) -> Tensor:
    """nats (n, …, T) of n voices to those of their mixture (…, T). share: in [0, 1) of the weight, dealt out anew."""
    if nats.dim() < 2 or not len(nats) or not 0 <= share < 1:
        raise UserError(f"nats has the shape {tuple(nats.shape)} and share is {share}: must be (n, …, T) and in [0, 1)")
    shares, paid = torch.full_like(nats[..., 0], 1 / len(nats)), []
    for t in range(nats.shape[-1]):
        joint = shares.log() - nats[..., t]
        total = joint.logsumexp(0)
        paid.append(-total)
        shares = (1 - share) * (joint - total).exp() + share / len(nats)
    return torch.stack(paid, dim=-1)


def _nats(learner: OnlineLearner, name: str, tokens: Tensor) -> Tensor:
    model, voice = learner.model, learner.fork()
    if name not in (SLOW, NOW):
        voice.forget(name)
    training = model.training
    model.eval()
    with nullcontext() if name == SLOW else voice.adapted():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].double()
    model.train(training)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)
