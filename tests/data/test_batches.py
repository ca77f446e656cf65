"""Batches are a pure function of the state; an epoch is every window once; targets are inputs one token later."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlearn.data import Batches, BatchState
from nestlearn.errors import UserError


def take(batches, count, state=None):
    state = state or batches.initial()
    taken = []
    for _ in range(count):
        batch, state = batches.next(state)
        taken.append(batch)
    return taken, state


def starts(taken):
    """The first token of every row: with tokens 0, 1, 2, … that is where its window starts."""
    return torch.cat([batch.inputs[:, 0] for batch in taken]).tolist()


def test_shapes_types_and_shift():
    batch, _ = Batches(np.arange(1000, dtype=np.uint16), 4, 16, seed=0).next(BatchState(0, 0))
    assert batch.inputs.shape == batch.targets.shape == (4, 16)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.targets, batch.inputs + 1)


@settings(deadline=None)
@given(length=st.integers(2, 300), batch=st.integers(1, 9), width=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_every_epoch_is_every_window_once(length, batch, width, seed):
    if length - 1 < width:
        return
    batches = Batches(np.arange(length), batch, width, seed)
    windows = (length - 1) // width
    taken, state = take(batches, windows)  # batch × windows rows: exactly `batch` epochs
    assert state == BatchState(batch, 0)
    rows = starts(taken)
    for epoch in range(batch):
        assert sorted(rows[epoch * windows : (epoch + 1) * windows]) == [width * index for index in range(windows)]


def test_epochs_and_seeds_are_in_different_orders():
    batches = Batches(np.arange(64 * 8 + 1), 8, 8, seed=3)
    first, state = take(batches, 8)
    second, _ = take(batches, 8, state)
    other, _ = take(Batches(np.arange(64 * 8 + 1), 8, 8, seed=4), 8)
    assert starts(first) != starts(second) and starts(first) != starts(other) and starts(first) != sorted(starts(first))


def test_same_state_same_batch_and_resume_through_json():
    tokens = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint16)
    straight, end = take(Batches(tokens, 3, 32, seed=1), 200)
    head, state = take(Batches(tokens, 3, 32, seed=1), 77)
    state = BatchState(**json.loads(json.dumps(asdict(state))))
    tail, resumed_end = take(Batches(tokens, 3, 32, seed=1), 123, state)
    assert end == resumed_end
    for one, other in zip(straight, head + tail, strict=True):
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)
    batches = Batches(tokens, 3, 32, seed=1)
    assert torch.equal(batches.next(state)[0].inputs, batches.next(state)[0].inputs)


def test_tokens_on_disk_are_not_copied(tmp_path):
    tokens = np.lib.format.open_memmap(tmp_path / "tokens.npy", mode="w+", dtype=np.uint32, shape=(1000,))
    tokens[:] = np.arange(1000)
    batches = Batches(tokens, 2, 10, seed=0)
    batch, _ = batches.next(batches.initial())
    assert batches.tokens is tokens and torch.equal(batch.targets, batch.inputs + 1)
    batch.inputs.zero_()
    assert tokens[1:].all(), "a batch is a copy"


def test_text_shorter_than_one_sequence_names_both_numbers():
    with pytest.raises(UserError, match="has 512 tokens, less than one sequence of 512 .* at most 511"):
        Batches(np.arange(512), 1, 512, seed=0)
    assert Batches(np.arange(513), 1, 512, seed=0).windows == 1
    with pytest.raises(UserError, match="has 0 tokens"):
        Batches(np.arange(0), 1, 4, seed=0)


@pytest.mark.parametrize("batch, width, seed", [(0, 4, 0), (1, 0, 0), (1, 4, -1)])
def test_bad_sizes(batch, width, seed):
    with pytest.raises(UserError, match="at least 1|0 or more"):
        Batches(np.arange(100), batch, width, seed)


@pytest.mark.parametrize("state", [BatchState(0, 25), BatchState(0, -1), BatchState(-1, 0)])
def test_a_state_of_another_text_is_refused(state):
    with pytest.raises(UserError, match="resume with the text it was saved with"):
        Batches(np.arange(101), 2, 4, seed=0).next(state)
