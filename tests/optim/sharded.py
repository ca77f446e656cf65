"""What one rank does in tests/optim/test_distributed.py: it stands in a file of its own, since it is spawned."""

from __future__ import annotations

import os
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.contracts.optimizer import gradient
from tests.optim.family import FAMILY, SHARDED, Member

SHAPES = [(4, 5), (4, 5), (5, 3), (2, 3, 4), (3, 2, 2, 2)]  # 5, 3: rows that two ranks cannot share equally
BEFORE, AFTER = 5, 4  # steps before the checkpoint, in the middle of a period of 3 and of 4, and after it
RANKS = 2


class Matrices(nn.Module):
    """A module with nothing but parameters; the last one is a vector, for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for i, shape in enumerate([*SHAPES, (7,)]):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)))


def build(member: Member, sharded: bool) -> tuple[nn.Module, Any]:
    model = Matrices()
    if sharded:
        fully_shard(model)
    *matrices, vector = model.named_parameters()
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": [vector], "rule": "adamw"}]
    return model, member.build(groups)


def walk(member: Member, model: nn.Module, optimizer: Any, steps: range) -> None:
    for number in steps:
        for i, p in enumerate(model.parameters()):
            full = gradient(number, i, torch.empty(p.shape, dtype=p.dtype))
            if isinstance(p, DTensor):
                full = distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)
            member.feed(optimizer, p, full)
        optimizer.step()


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def everything(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def load(folder: Path, model: nn.Module, optimizer: Any) -> None:
    state = everything(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def rank(number: int, folder: Path) -> None:
    """The whole family in one process group; what goes wrong with a member is left for its own test to report."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    for member in SHARDED:
        try:
            saves_and_resumes(member, folder, number)
        except Exception:
            (folder / f"{member.name}.{number}.error").write_text(traceback.format_exc())
    refuses_together(number)
    dist.barrier()  # nobody leaves while the other still talks to it
    dist.destroy_process_group()


def saves_and_resumes(member: Member, folder: Path, number: int) -> None:
    """Steps, a checkpoint, more steps; the latter again from the checkpoint, bit for bit."""
    model, optimizer = build(member, sharded=True)
    walk(member, model, optimizer, range(BEFORE))
    dcp.save(everything(model, optimizer), checkpoint_id=folder / member.name)
    walk(member, model, optimizer, range(BEFORE, BEFORE + AFTER))
    resumed, its_optimizer = build(member, sharded=True)
    load(folder / member.name, resumed, its_optimizer)
    walk(member, resumed, its_optimizer, range(BEFORE, BEFORE + AFTER))
    if member.name == "m3":
        state_is_sharded(model, optimizer)
    ends = whole(model)
    assert all(torch.equal(a, b) for a, b in zip(ends, whole(resumed), strict=True)), "2 ranks to 2, bit for bit"
    if number == 0:
        torch.save(ends, folder / f"{member.name}.pt")


def state_is_sharded(model: nn.Module, optimizer: Any) -> None:
    """The memories of M3 have the parameter's shape, and are held as the parameter is."""
    for p in list(model.parameters())[:-1]:
        memories = [v for v in optimizer.state[p].values() if isinstance(v, Tensor)]
        assert len(memories) == 5
        assert all(isinstance(v, DTensor) and v.placements == p.placements for v in memories)


def refuses_together(number: int) -> None:
    """A gradient that is not finite in the shard of one rank is refused by both, which would otherwise wait forever."""
    member = FAMILY[0]
    model, optimizer = build(member, sharded=True)
    walk(member, model, optimizer, range(2))
    before = whole(model)
    if number == 1:
        model.p0.grad.to_local()[0, 0] = float("nan")
    try:
        optimizer.step()
    except ValueError as error:
        assert "'p0'" in str(error) and "step 3" in str(error), error
    else:
        raise AssertionError("nothing was refused")
    assert all(torch.equal(a, b) for a, b in zip(before, whole(model), strict=True))
