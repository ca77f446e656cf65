"""FSDP2 and distributed checkpoints: two ranks on gloo train, save, and resume; one process takes over."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from tests.contracts.optimizer import gap
from tests.optim.family import SHARDED
from tests.optim.sharded import AFTER, BEFORE, RANKS, build, load, rank, walk, whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two ranks leave behind; they check 2 → 2 bit for bit themselves."""
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank, args=(path,), nprocs=RANKS)
    return path


@pytest.mark.parametrize("member", SHARDED, ids=lambda member: member.name)
def test_two_ranks_equal_one_and_one_takes_over(member, folder):
    """Sharded matrices are updated as whole matrices; a checkpoint of two ranks goes on in one process."""
    assert [path.read_text() for path in sorted(folder.glob(f"{member.name}.?.error"))] == []
    ends = torch.load(folder / f"{member.name}.pt")
    model, optimizer = build(member, sharded=False)
    walk(member, model, optimizer, range(BEFORE + AFTER))
    assert gap(whole(model), ends) <= 1e-12
    resumed, its_optimizer = build(member, sharded=False)
    load(folder / member.name, resumed, its_optimizer)
    walk(member, resumed, its_optimizer, range(BEFORE, BEFORE + AFTER))
    assert gap(whole(resumed), ends) <= 1e-6
    assert gap(whole(resumed), whole(model)) <= 1e-12
