"""Packed documents are each document alone: logits, losses, gradients, and the state at the end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.errors import UserError
from nestlearn.models.hope import MIXER_NAMES

ROWS = [[1, 13, 8, 20], [17, 2, 23]]  # lengths of the documents of two rows; the chunk is 8, the window 5


def model_of(mixer: str = "self_modifying", **settings) -> HopeForCausalLM:
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, mixer=mixer,
        window=5, memory={"chunk": 8, "momentum": 0.5}, initializer_range=0.3, **settings,
    )  # fmt: skip
    return HopeForCausalLM(config).double()


def packed() -> tuple[Tensor, Tensor]:
    """input_ids and position_ids."""
    ids = torch.randint(32, (2, sum(ROWS[0])), generator=torch.Generator().manual_seed(1))
    return ids, torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ROWS])


def alone(ids: Tensor) -> list[list[Tensor]]:
    """The documents of each row, (1, length) each."""
    return [list(row[None].split(lengths, dim=1)) for row, lengths in zip(ids, ROWS, strict=True)]


def gradients(model: HopeForCausalLM) -> dict[str, Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_packed_is_alone(mixer, use_cache):
    model, (ids, positions) = model_of(mixer), packed()
    weight = torch.linspace(-1, 1, ids.numel() * 32, dtype=torch.double).view(*ids.shape, 32)
    out = model(ids, position_ids=positions, use_cache=use_cache)
    (out.logits * weight).sum().backward()
    found, rows = gradients(model), alone(ids)
    single = [[model(document, use_cache=True) for document in row] for row in rows]
    logits = torch.cat([torch.cat([one.logits for one in row], dim=1) for row in single])
    (logits * weight).sum().backward()
    assert torch.allclose(out.logits, logits, rtol=1e-10, atol=1e-10)
    for name, right in gradients(model).items():
        assert (found[name] - right).norm() <= 1e-10 * (1 + right.norm()), name
    if not use_cache:
        assert out.past_key_values is None
        return
    for number, row in enumerate(single):  # the cache goes on with each row's last document
        new = torch.tensor([[3, 5, 7]])
        right = model(new, past_key_values=row[-1].past_key_values).logits
        cache = out.past_key_values.fork()
        cache.batch_select_indices(torch.tensor([number]))
        assert torch.allclose(model(new, past_key_values=cache).logits, right, rtol=1e-10, atol=1e-10)


def test_the_loss_predicts_nothing_across_documents():
    model, (ids, positions) = model_of(), packed()
    loss = model(ids, position_ids=positions, labels=ids).loss
    losses = [(model(d, labels=d).loss, d.shape[1] - 1) for row in alone(ids) for d in row if d.shape[1] > 1]
    assert abs(loss - sum(one * n for one, n in losses) / sum(n for _, n in losses)) < 1e-6


def test_checkpointing_and_hidden_states():
    model, (ids, positions) = model_of(), packed()
    plain = model(ids, position_ids=positions, output_hidden_states=True)
    assert [h.shape for h in plain.hidden_states] == [(2, 42, 16)] * 3
    plain.logits.square().sum().backward()
    right = gradients(model)
    model.train().gradient_checkpointing_enable()
    model(ids, position_ids=positions).logits.square().sum().backward()
    for name, found in gradients(model).items():
        assert (found - right[name]).norm() <= 1e-12 * (1 + right[name].norm()), name


def test_what_the_collator_of_transformers_makes():
    from transformers import DataCollatorWithFlattening

    documents = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6]}, {"input_ids": [7, 8, 9]}]
    batch = DataCollatorWithFlattening(return_seq_idx=True)(documents)
    model = model_of()
    found = model(**batch)
    ids = [torch.tensor([d["input_ids"]]) for d in documents]
    assert torch.allclose(found.logits, torch.cat([model(one).logits for one in ids], dim=1), atol=1e-10)
    mean = sum(model(one, labels=one).loss * (one.shape[1] - 1) for one in ids) / 6
    assert abs(found.loss - mean) < 1e-6


def test_positions_of_one_stream_change_nothing():
    model, ids = model_of(), packed()[0]
    positions = torch.arange(42)[None]
    assert torch.equal(model(ids, position_ids=positions.expand(2, -1)).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_ids": torch.tensor([[1, 2, 3]])}, "must begin with 0"),
        ({"position_ids": torch.tensor([[0, 2, 3]])}, "must begin with 0"),
        ({"position_ids": torch.tensor([[0, 1]])}, "shape"),
        ({"position_ids": torch.tensor([[0, 1, 0]]), "attention_mask": torch.ones(1, 3)}, "attention_mask cannot"),
        ({"seq_idx": torch.tensor([[0, 0, 1]])}, "position_ids"),
    ],
)
def test_other_positions_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        model_of()(torch.zeros(1, 3, dtype=torch.long), **changes)


def test_a_cache_and_packed_documents_are_refused():
    model, ids = model_of(), torch.zeros(1, 3, dtype=torch.long)
    cache = model(ids).past_key_values
    with pytest.raises(UserError, match="past_key_values cannot"):
        model(ids, position_ids=torch.tensor([[0, 1, 0]]), past_key_values=cache)
