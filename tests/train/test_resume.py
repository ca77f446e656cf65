"""A run that is stopped, however it is stopped, continues bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import nestlearn.train.loop
from nestlearn.train.checkpoint import checkpoints, find_checkpoint
from nestlearn.train.loop import Interrupted
from tests.train.tiny import STEP, assert_same_end, config, metrics, run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption: (its config, its folder)."""
    folder = tmp_path_factory.mktemp("whole")
    settings = config(folder)
    run(settings, folder / "run")
    return settings, folder / "run"


def stop_after(monkeypatch, steps):
    """As Ctrl-C does while step number ``steps`` is under way."""
    step, count = nestlearn.train.loop.train_step, iter(range(1, 10**6))

    def counted(*args):
        if next(count) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(nestlearn.train.loop, "train_step", counted)


def test_the_same_config_gives_the_same_bits(whole, tmp_path):
    run(whole[0], tmp_path / "run")
    assert_same_end(whole[1], tmp_path / "run")


@pytest.mark.parametrize("steps", [1, 4, 7])  # of 12; levels step at every, every third and every fifth one
def test_ctrl_c_saves_and_the_resumed_run_is_bit_equal(whole, tmp_path, monkeypatch, steps):
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"stopped at {steps * STEP} of 384 tokens"):
        stop_after(patch, steps)
        run(whole[0], tmp_path / "run")
    assert find_checkpoint(tmp_path / "run").name == f"checkpoint-{steps * STEP:08d}"
    run(whole[0], tmp_path / "run", start=tmp_path / "run")
    assert_same_end(whole[1], tmp_path / "run")


def test_the_signal_handlers_are_given_back(whole, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(whole[0], shutil.copytree(whole[1], tmp_path / "run"), start=whole[1])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_was_logged_after_the_checkpoint_is_logged_once(whole, tmp_path):
    folder = shutil.copytree(whole[1], tmp_path / "run")
    shutil.rmtree(find_checkpoint(folder))  # leaves the lines of a future that has not happened
    assert metrics(folder)[-1]["tokens"] == 12 * STEP > 8 * STEP
    run(whole[0], folder, start=folder)
    assert_same_end(whole[1], folder)


def test_a_finished_run_has_nothing_left_to_train(whole, tmp_path):
    folder = shutil.copytree(whole[1], tmp_path / "run")
    model, progress = run(whole[0], folder, start=folder)
    assert progress.tokens == 12 * STEP
    assert_same_end(whole[1], folder)


@pytest.mark.parametrize("moment", ["optimizer", "rename"])
def test_kill_9_while_a_checkpoint_is_written(whole, tmp_path, moment):
    """The child trains, and sleeps in the middle of its second checkpoint until it is killed."""
    child = textwrap.dedent("""
        import pathlib, sys, time
        import torch
        from nestlearn.train import checkpoint
        from tests.train.tiny import config, run

        folder, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
        torch.set_num_threads(int(sys.argv[3]))
        owner, name = {"optimizer": (torch, "save"), "rename": (pathlib.Path, "rename")}[moment]
        whole = getattr(owner, name)

        def stuck(*args, **kwargs):
            if len(checkpoint.checkpoints(folder / "run")) == 1:
                if moment == "optimizer":
                    args[1].write(b"half a file")
                    args[1].flush()
                (folder / "now").touch()
                time.sleep(600)
            return whole(*args, **kwargs)

        setattr(owner, name, stuck)
        run(config(folder), folder / "run")
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    command = [sys.executable, "-c", child, str(tmp_path), moment, str(torch.get_num_threads())]
    process = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "now").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "run" / f"checkpoint-{8 * STEP:08d}.partial").exists()
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"checkpoint-{4 * STEP:08d}"]
    run(config(tmp_path), tmp_path / "run", start=tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.partial"))
    assert_same_end(whole[1], tmp_path / "run")
