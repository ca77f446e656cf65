"""What the loop writes, when it stops, and how one step goes."""

import math

import pytest
import torch

import nestlearn.train.loop
from nestlearn.errors import UserError
from nestlearn.train.build import build_model, build_optimizer
from nestlearn.train.checkpoint import checkpoints, load_checkpoint
from nestlearn.train.config import TrainConfig
from nestlearn.train.step import learning_rate, train_step
from tests.train.tiny import STEP, config, metrics, run


def test_learns_and_logs(tmp_path):
    model, progress = run(config(tmp_path, tokens=40 * STEP, learning_rate=0.02), tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert [line["tokens"] for line in lines] == [n * STEP for n in (*range(3, 40, 3), 40)]
    assert set(lines[0]) == {"tokens", "loss_bits_per_byte", "lr", "grad_norm"}
    assert lines[-1]["loss_bits_per_byte"] < 0.8 * lines[0]["loss_bits_per_byte"]
    assert lines[0]["loss_bits_per_byte"] < 20 and len(progress.history) == len(lines)
    assert model.training


def test_a_slow_level_keeps_its_bits_between_its_periods(tmp_path):
    settings = config(tmp_path)
    torch.manual_seed(0)
    model = build_model(settings, 256)
    optimizer = build_optimizer(settings, model)
    periods = model.parameter_periods()
    batch = batch_of(settings)
    for step in range(12):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train_step(model, optimizer, batch, step * STEP, settings)
        for name, p in model.named_parameters():
            due = periods[name] == 1 or (step + 1) % (periods[name] / STEP) == 0
            assert torch.equal(p, before[name]) != due, (name, step)
            assert p.grad is None


def batch_of(settings):
    from nestlearn.data.batches import Batch

    ids = torch.arange(settings.batch_size * (settings.sequence_length + 1)).view(settings.batch_size, -1) % 256
    return Batch(ids[:, :-1], ids[:, 1:])


@pytest.mark.parametrize("bad_loss", [True, False])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, monkeypatch, bad_loss):
    step = nestlearn.train.loop.train_step

    def exploding(model, optimizer, batch, tokens, *others):
        result = step(model, optimizer, batch, tokens, *others)
        bad = {"loss" if bad_loss else "gradient_norm": torch.tensor(math.nan)}
        return result._replace(**bad) if tokens == 6 * STEP else result

    monkeypatch.setattr(nestlearn.train.loop, "train_step", exploding)
    with pytest.raises(UserError) as stop:
        run(config(tmp_path, log_every=100 * STEP), tmp_path / "run")
    assert str(stop.value).startswith(
        f"the {'loss' if bad_loss else 'gradient'} is nan in one of the 8 steps before 256"
    )
    assert "checkpoint-00000128 is the last good checkpoint; try a learning_rate below 0.003" in str(stop.value)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-00000128"]
    assert load_checkpoint(tmp_path / "run" / "checkpoint-00000128")


def test_a_step_never_waits_for_the_device(tmp_path):
    """On the meta device a tensor has no values: any .item(), or branch on a tensor, would raise."""
    settings = config(tmp_path)
    with torch.device("meta"):
        model = build_model(settings, 256)
    optimizer = build_optimizer(settings, model)
    for step in range(6):  # through steps of the slow levels
        result = train_step(model, optimizer, batch_of(settings), step * STEP, settings)
    assert result.loss.is_meta and result.gradient_norm.is_meta


def test_learning_rate_rises_linearly_and_falls_as_a_cosine():
    settings = TrainConfig("test", tokens=1000, learning_rate=1.0, warmup=0.1, final_rate=0.2)
    assert learning_rate(settings, 50) == pytest.approx(0.5)
    assert learning_rate(settings, 100) == pytest.approx(1.0)
    assert learning_rate(settings, 550) == pytest.approx(0.6)
    assert learning_rate(settings, 1000) == learning_rate(settings, 1500) == pytest.approx(0.2)
    assert learning_rate(TrainConfig("test", tokens=1000, learning_rate=1.0, warmup=0.0), 1) == pytest.approx(
        1.0, abs=1e-5
    )
