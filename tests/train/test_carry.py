"""Training on streams longer than memory: the state at the end of a batch starts the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nestlearn.data import Batches, BatchState, Streams
from nestlearn.data.batches import Batch
from nestlearn.errors import UserError
from nestlearn.train.build import build_model
from nestlearn.train.step import train_step
from tests.train.tiny import SETTINGS, assert_same_end, config, run

ROOT = Path(__file__).resolve().parents[2]
CARRY = {"carry_state": True, "sequence_length": 20, "batch_size": 2, "tokens": 480}  # 20 is no multiple of the chunk
STILL = SimpleNamespace(param_groups=[], fired=set(), step=lambda tokens: None, zero_grad=lambda: None)


def test_rows_go_on_where_they_ended():
    streams = Streams(np.arange(103), batch_size=2, sequence_length=10)
    state, rows = streams.initial(), []
    for _ in range(streams.windows):
        assert streams.begins(state) == (not rows)
        batch, state = streams.next(state)
        assert torch.equal(batch.targets, batch.inputs + 1)
        rows.append(batch.inputs)
    assert torch.equal(torch.cat(rows, dim=1), torch.arange(100).view(2, 50))
    assert state == BatchState(1, 0) and streams.begins(state)
    assert Batches(np.arange(103), 2, 10, seed=0).begins(BatchState(0, 3))


def test_bad_streams_are_refused():
    with pytest.raises(UserError, match="2 streams of one sequence of 10"):
        Streams(np.arange(20), 2, 10)
    with pytest.raises(UserError, match="not a place"):
        Streams(np.arange(21), 2, 10).next(BatchState(0, 1))


@pytest.mark.parametrize("mixer", ["self_modifying", "titans", "gated_delta", "window_attention"])
def test_two_carried_batches_are_one_of_twice_the_length(tmp_path, mixer):
    settings = config(tmp_path, **CARRY, model={**SETTINGS["model"], "mixer": mixer})
    model = build_model(settings, 256).double()
    ids = torch.randint(256, (2, 41), generator=torch.Generator().manual_seed(0))
    once = train_step(model, STILL, Batch(ids[:, :-1], ids[:, 1:]), 0, settings)
    halves = [Batch(ids[:, a : a + 20], ids[:, a + 1 : a + 21]) for a in (0, 20)]
    first = train_step(model, STILL, halves[0], 0, settings)
    second = train_step(model, STILL, halves[1], 0, settings, first.stream)
    assert abs((first.loss + second.loss) / 2 - once.loss) < 1e-6  # the loss is taken in float32
    for a, b in zip(once.stream.tensors(), second.stream.tensors(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10) and not b.requires_grad
    anew = train_step(model, STILL, halves[1], 0, settings)
    assert abs(anew.loss - second.loss) > 1e-6


def test_memories_that_never_change_go_on_learning(tmp_path):
    """They are parameters, not memory of the stream: their present value is used, and gets its gradient."""
    memory = {"chunk": 8, "adaptive": ["v"]}
    settings = config(tmp_path, **CARRY, model={**SETTINGS["model"], "memory": memory})
    model = build_model(settings, 256)
    ids = torch.randint(256, (2, 41), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :20], ids[:, 1:21])
    stream = train_step(model, STILL, batch, 0, settings).stream
    key = model.model.layers[0].mixer.memory.initial["k"].w1
    with torch.no_grad():
        key += 1
    past = model.continued(stream)
    model(ids[:, 20:40], past_key_values=past).logits.square().sum().backward()
    assert torch.equal(past.state.layers[0].memory.w1[:, 0], key.expand(2, -1, -1, -1))
    assert key.grad is not None and key.grad.abs().sum() > 0


def test_a_state_that_grows_is_refused(tmp_path):
    settings = config(tmp_path, **CARRY, model={**SETTINGS["model"], "mixer": "attention"})
    with pytest.raises(UserError, match="keeps every token"):
        run(settings, tmp_path / "run")


def test_kill_9_and_resume_are_bit_equal_and_the_state_matters(tmp_path):
    whole = config(tmp_path, **CARRY, checkpoint_every=160)
    run(whole, tmp_path / "whole")
    child = textwrap.dedent("""
        import pathlib, sys, time
        import torch
        import nestlearn.train.loop as loop
        from tests.train.tiny import config, run
        from tests.train.test_carry import CARRY

        folder = pathlib.Path(sys.argv[1])
        torch.set_num_threads(int(sys.argv[2]))
        step, count = loop.train_step, iter(range(1, 1000))

        def stuck(*args):
            if next(count) == 7:
                (folder / "now").touch()
                time.sleep(600)
            return step(*args)

        loop.train_step = stuck
        run(config(folder, **CARRY, checkpoint_every=160), folder / "run")
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    process = subprocess.Popen(
        [sys.executable, "-c", child, str(tmp_path), str(torch.get_num_threads())], env=environment
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "now").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(whole, tmp_path / "run", start=tmp_path / "run")
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    ends = [sorted((tmp_path / name).glob("checkpoint-*"))[-1] / "stream.safetensors" for name in ("whole", "run")]
    whole_end, run_end = (load_file(end) for end in ends)
    assert whole_end.keys() == run_end.keys()
    assert all(torch.equal(tensor, run_end[name]) for name, tensor in whole_end.items())
