"""What every causal language model of ours must do, whatever mixes its tokens: ``check_model(config, tmp_path)``.

config  a HopeConfig of a small model: two layers, chunks of at most 16 tokens, an untied head

Equalities are checked twice: in float64 to 1e-10, on a model with large weights, where every part matters and amplifies
errors; in float32 to what the library promises, on a model as it is initialised.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.memory import State
from nestlearn.models.hf import HopeCache

LENGTH = 53  # several chunks of 16 and a rest


def check_model(config: HopeConfig, tmp_path: Path) -> None:
    ids = tokens(config, 3, LENGTH)
    for model in (large(config), initialised(config)):
        with torch.no_grad():
            is_causal(model, ids)
            rows_are_independent(model, ids)
            may_be_cut_anywhere(model, ids)
            padding_on_the_left_changes_nothing(model, ids)
            padding_on_the_right_changes_nothing(model, ids)
            selects_and_joins_rows(model, ids)
    model = large(config)
    with torch.no_grad():
        forks_do_not_interfere(model, ids)
        survives_saving(model, ids, tmp_path)
        the_cache_survives_saving(model, ids, tmp_path)
        generates_what_its_logits_say(model, ids)
        if config.mixer not in ("attention", "transformer"):
            does_not_grow(model, ids)
    every_parameter_learns(model, ids)
    checkpointing_changes_no_gradient(model, ids)
    with torch.no_grad():
        runs_in_bfloat16(initialised(config), ids)


def initialised(config: HopeConfig) -> HopeForCausalLM:
    torch.manual_seed(0)
    return HopeForCausalLM(config).eval()


def large(config: HopeConfig) -> HopeForCausalLM:
    """In float64; weights well above their starting size, logits of order 1."""
    model = initialised(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "mixer.conv" not in name and "read" not in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def rounding(model: HopeForCausalLM) -> float:
    """Between logits of two ways to cut one stream."""
    return 1e-10 if model.dtype == torch.float64 else 1e-5


def rows(model: HopeForCausalLM) -> float:
    """Between logits of a row alone and in a batch."""
    return 1e-10 if model.dtype == torch.float64 else 1e-6


def tokens(config: HopeConfig, rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model: HopeForCausalLM, ids: Tensor, cache: HopeCache | None = None, **given: Any) -> tuple[Tensor, HopeCache]:
    out = model(ids, past_key_values=cache, use_cache=True, **given)
    return out.logits, out.past_key_values


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def state_gap(a: State, b: State) -> float:
    return max(gap(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True) if x.numel())


def is_causal(model: HopeForCausalLM, ids: Tensor) -> None:
    """A token changes no logits before its own, and does change its own."""
    whole = model(ids[:1]).logits
    changed = ids[:1].repeat(LENGTH, 1)
    changed[range(LENGTH), range(LENGTH)] += 1
    changed %= model.config.vocab_size
    for at, logits in enumerate(model(changed).logits):
        assert at == 0 or gap(logits[:at], whole[0, :at]) <= rows(model)
        assert gap(logits[at], whole[0, at]) > 1e-3


def rows_are_independent(model: HopeForCausalLM, ids: Tensor) -> None:
    whole = model(ids).logits
    for row in range(len(ids)):
        assert gap(model(ids[row : row + 1]).logits[0], whole[row]) <= rows(model)
    other = ids.clone()
    other[0] = other[0].flip(0)
    assert gap(model(other).logits[1:], whole[1:]) <= rows(model)


def may_be_cut_anywhere(model: HopeForCausalLM, ids: Tensor) -> None:
    whole, end = read(model, ids)
    for cuts in ([1], [16], [17], [5, 6, 40], [15, 48], list(range(1, LENGTH))):
        parts, cache = [], None
        for begin, stop in zip([0, *cuts], [*cuts, LENGTH], strict=True):
            part, cache = read(model, ids[:, begin:stop], cache)
            parts.append(part)
        assert gap(torch.cat(parts, dim=1), whole) <= rounding(model)
        assert cache is not None and cache.get_seq_length() == LENGTH
        assert state_gap(cache.state, end.state) <= 10 * rounding(model)


def pad(ids: Tensor, left: list[int]) -> tuple[Tensor, Tensor]:
    """Rows pushed to the right by their number of pads, which hold a token of their own; (ids, mask)."""
    length = ids.shape[1] + max(left)
    padded, mask = torch.full((len(ids), length), 7), torch.zeros(len(ids), length, dtype=torch.long)
    for row, count in enumerate(left):
        used = length - count
        padded[row, count:], mask[row, count:] = ids[row].repeat(2)[:used], 1
    return padded, mask


def padding_on_the_left_changes_nothing(model: HopeForCausalLM, ids: Tensor) -> None:
    """In one piece, and in pieces: the rows then stand at different places of their streams."""
    left = [3, 0, 20]
    padded, mask = pad(ids, left)
    whole, end = read(model, padded, attention_mask=mask)
    parts, cache = [], None
    for begin, stop in ((0, 25), (25, 26), (26, 27), (27, 60), (60, padded.shape[1])):
        part, cache = read(model, padded[:, begin:stop], cache, attention_mask=mask[:, :stop])
        parts.append(part)
    assert cache is not None and cache.get_seq_length() == padded.shape[1]
    for logits, last in (
        (whole, end),
        (torch.cat(parts, dim=1), cache),
        (model(padded, mask, use_cache=False)[0], None),
    ):
        for row, count in enumerate(left):
            alone, state = read(model, padded[row : row + 1, count:])
            assert gap(logits[row, count:], alone[0]) <= rounding(model) and not logits[row, :count].any()
            following = padded[row : row + 1, :9]
            if last is not None:
                cut = HopeCache(last.state[row], 0)
                assert gap(read(model, following, cut)[0], read(model, following, state)[0]) <= rounding(model)


def padding_on_the_right_changes_nothing(model: HopeForCausalLM, ids: Tensor) -> None:
    """Rows of 30, 53 and 17 tokens: what the rows hold afterwards knows nothing of the pads."""
    lengths = [30, LENGTH, 17]
    mask = torch.arange(LENGTH)[None] < torch.tensor(lengths)[:, None]
    logits, cache = read(model, ids, attention_mask=mask)
    further, _ = read(model, ids[:, :5], cache)
    unread = model(ids, attention_mask=mask, use_cache=False).logits
    for row, length in enumerate(lengths):
        alone, state = read(model, ids[row : row + 1, :length])
        assert gap(logits[row, :length], alone[0]) <= rounding(model) and gap(
            unread[row, :length], alone[0]
        ) <= rounding(model)
        assert gap(further[row], read(model, ids[row : row + 1, :5], state)[0][0]) <= rounding(model)


def forks_do_not_interfere(model: HopeForCausalLM, ids: Tensor) -> None:
    _, cache = read(model, ids[:, :20])
    before = cache.state.clone()
    first, _ = read(model, ids[:, 20:], cache)
    other, _ = read(model, ids[:, 20:].flip(1), cache)
    again, _ = read(model, ids[:, 20:], cache)
    assert torch.equal(first, again) and gap(first, other) > 1e-3
    assert state_gap(before, cache.state) == 0 and cache.get_seq_length() == 20


def selects_and_joins_rows(model: HopeForCausalLM, ids: Tensor) -> None:
    whole, cache = read(model, ids[:, :20])
    whole, _ = read(model, ids[:, 20:], cache)
    order = torch.tensor([2, 0, 0])
    picked = cache.fork()
    picked.reorder_cache(order)
    assert gap(read(model, ids[order, 20:], picked)[0], whole[order]) <= rows(model)
    joined = HopeCache(State.cat([cache.state[2], cache.state[[0, 1]]]), 20)
    assert gap(read(model, ids[[2, 0, 1], 20:], joined)[0], whole[[2, 0, 1]]) <= rows(model)
    doubled = cache.fork()
    doubled.batch_repeat_interleave(2)
    assert gap(read(model, ids[:, 20:].repeat_interleave(2, 0), doubled)[0], whole.repeat_interleave(2, 0)) <= rows(
        model
    )


def does_not_grow(model: HopeForCausalLM, ids: Tensor) -> None:
    _, cache = read(model, ids[:, :1])
    shapes, size = [t.shape for t in cache.state.tensors()], cache.state.nbytes
    for _ in range(3):
        _, cache = read(model, ids, cache)
        assert [t.shape for t in cache.state.tensors()] == shapes and cache.state.nbytes == size


def survives_saving(model: HopeForCausalLM, ids: Tensor, folder: Path) -> None:
    model.save_pretrained(folder / "model")
    loaded = HopeForCausalLM.from_pretrained(folder / "model")
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def the_cache_survives_saving(model: HopeForCausalLM, ids: Tensor, folder: Path) -> None:
    _, cache = read(model, ids[:, :23])
    cache.save(folder / "stream.safetensors")
    loaded = HopeCache.load(folder / "stream.safetensors")
    assert loaded.get_seq_length() == 23
    assert torch.equal(read(model, ids[:, 23:], cache)[0], read(model, ids[:, 23:], loaded)[0])


def runs_in_bfloat16(model: HopeForCausalLM, ids: Tensor) -> None:
    """Finite and close, also token by token."""
    exact = model(ids).logits
    half = initialised(model.config).to(torch.bfloat16)
    logits, _ = read(half, ids)
    assert logits.isfinite().all()
    assert (logits - exact).norm() < 0.1 * exact.norm()
    _, cache = read(half, ids[:, :30])
    for at in range(30, LENGTH):
        step, cache = read(half, ids[:, at : at + 1], cache)
        assert (step[:, 0] - logits[:, at]).norm() < 0.1 * exact[:, at].norm()


def generates_what_its_logits_say(model: HopeForCausalLM, ids: Tensor) -> None:
    expected = prompt = ids[:2, :19]
    for _ in range(8):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    for use_cache in (True, False):
        got = model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=use_cache)
        assert torch.equal(got, expected)


def every_parameter_learns(model: HopeForCausalLM, ids: Tensor) -> None:
    """A gradient that is not zero reaches every parameter, through the inner updates; states carry gradients too."""
    model.zero_grad()
    loss(model(ids).logits, ids).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    whole = gradients(model)
    model.zero_grad()
    first = model(ids[:, :21], use_cache=True)
    second = model(ids[:, 21:], past_key_values=first.past_key_values)
    loss(torch.cat([first.logits, second.logits], dim=1), ids).backward()
    same_gradients(model, whole)


def checkpointing_changes_no_gradient(model: HopeForCausalLM, ids: Tensor) -> None:
    model.train().zero_grad()
    loss(model(ids).logits, ids).backward()
    plain = gradients(model)
    model.gradient_checkpointing_enable()
    model.zero_grad()
    loss(model(ids).logits, ids).backward()
    same_gradients(model, plain)
    model.gradient_checkpointing_disable()
    model.eval()


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    """The next-token loss in the model's own dtype; Hugging Face's is in float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model: HopeForCausalLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(model: HopeForCausalLM, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert gap(parameter.grad, expected[name]) <= 1e-9 * max(1.0, expected[name].abs().max().item()), name
