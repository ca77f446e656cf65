"""Training with documents read apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nestlearn.data import Batches
from nestlearn.data.batches import positions
from nestlearn.errors import UserError
from tests.train.tiny import STEP, assert_same_end, config, metrics, run


def test_a_document_begins_at_its_separator():
    inputs = torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 1, 2, 3, 4, 5, 6]])
    assert positions(inputs, 0).tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    batches = Batches(np.array([5, 6, 0, 7, 0, 0, 8, 9]), 1, 7, 0, separator=0)
    batch, _ = batches.next(batches.initial())
    assert batch.positions is not None and batch.positions.tolist() == [[0, 1, 0, 1, 0, 0, 1]]
    assert Batches(np.arange(8), 1, 7, 0).next(batches.initial())[0].positions is None


def test_a_run_is_trained_so(tmp_path):
    (tmp_path / "many").mkdir()
    for number in range(60):
        (tmp_path / "many" / f"{number}.txt").write_text(f"document {number * number % 97}\n" * 2)
    given = {"text": (str(tmp_path / "many"),), "tokens": 6 * STEP}
    for name, pack in (("packed", True), ("again", True), ("joined", False)):
        run(config(tmp_path, **given, pack_documents=pack), tmp_path / name)
    assert_same_end(tmp_path / "packed", tmp_path / "again")
    assert metrics(tmp_path / "packed") != metrics(tmp_path / "joined")


def test_a_state_is_carried_or_documents_are_apart(tmp_path):
    with pytest.raises(UserError, match="pack_documents is True: must be false where carry_state is true"):
        config(tmp_path, pack_documents=True, carry_state=True)
