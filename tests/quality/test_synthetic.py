"""Made-up tasks: the benchmarks' bookkeeping, and a small version of what the mixed objective is for."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from benchmarks.quality import formal_languages, mad
from benchmarks.quality.synthetic import BASELINES, Results, as_large_as, make_model, pace, table
from nestlearn.eval.synthetic import IGNORED, MAD_TASKS, Example

SHAPE = {"vocabulary": 5, "width": 16, "layers": 1, "heads": 1, "seed": 0}


def test_results_go_on_where_they_were(tmp_path):
    path, calls = tmp_path / "results.json", []

    def run(rate: float) -> dict:
        calls.append(rate)
        return {"validation": rate, "loss": 1.0, "longer": 0.5}

    for _ in range(2):
        results = Results(path, {"steps": 3, "memory": [("chunk", 1)]})
        for rate in (0.25, 0.5):
            results.once({"model": "hope", "rate": rate}, lambda rate=rate: run(rate))
    assert calls == [0.25, 0.5] and len(json.loads(path.read_text())["runs"]) == 2
    best = results.best(model="hope")
    assert best is not None and best["rate"] == 0.5 and results.best(model="none") is None
    with pytest.raises(SystemExit, match="other settings"):
        Results(path, {"steps": 4})


def test_the_rate_rises_and_falls():
    paces = [pace(step, 100) for step in range(100)]
    assert paces[0] == 0.05 and max(paces) > 0.85 and paces[-1] < 0.01
    assert paces[:18] == sorted(paces[:18]) and paces[20:] == sorted(paces[20:], reverse=True)


def test_baselines_are_as_large_as_hope():
    hope = make_model({"memory": {"chunk": 8}}, **SHAPE)
    wanted = sum(p.numel() for p in hope.parameters())
    for settings in BASELINES.values():
        found = sum(p.numel() for p in as_large_as(hope, settings, **SHAPE).parameters())
        assert abs(found / wanted - 1) < 0.02


def test_a_batch_of_strings_is_padded_behind_and_padding_never_counts():
    examples = [Example("11", "01"), Example("0110", "1011")]
    ids, right, real = formal_languages.batch_of("parity", examples)
    assert ids[0, :2].tolist() == [1, 1] and real.tolist() == [[True, True, False, False], [True] * 4]
    assert right[1].argmax(-1).tolist() == [1, 0, 1, 1]

    class Says(torch.nn.Module):
        """Right everywhere but at one place."""

        def __init__(self, row: int, at: int) -> None:
            super().__init__()
            self.answers = right * 2 - 1
            self.answers[row, at] *= -1

        def forward(self, ids: torch.Tensor, use_cache: bool) -> Says:
            self.logits = self.answers
            return self

    def shares(row: int, at: int) -> tuple[float, float]:
        return formal_languages.accuracy(Says(row, at), "parity", examples)  # pyright: ignore

    assert shares(0, 3) == (1.0, 1.0) and shares(0, 1) == (0.5, 5 / 6) and shares(1, 3) == (0.5, 5 / 6)


def test_a_start_symbol_comes_first_and_answers_nothing():
    model = make_model(BASELINES["transformer"], **SHAPE)
    ids, started = torch.zeros(2, 6, dtype=torch.long), formal_languages.Started(model)
    plain, told = (formal_languages.answers(m, ids, 2)[0] for m in (model, started))
    assert told.shape == plain.shape == (6, 2)
    assert torch.allclose(plain, plain[:1], atol=1e-5) and not torch.allclose(told, told[:1], atol=1e-3)


def test_only_what_is_asked_counts_in_mad():
    task = MAD_TASKS["in-context-recall"]
    inputs, targets = mad.tensors(*task.split(0, training=False))
    few = (inputs[:8], targets[:8])
    model = make_model(BASELINES["retnet"], **{**SHAPE, "vocabulary": task.vocabulary})
    said = model(few[0], use_cache=False).logits.argmax(-1)
    asked = few[1] != IGNORED
    assert mad.accuracy(model, few, size=3) == pytest.approx((said == few[1])[asked].float().mean().item())


def test_the_last_state_is_all_that_compression_decodes():
    model = mad.FromLast(make_model(BASELINES["deltanet"], **{**SHAPE, "vocabulary": 16}), length=8)
    ids = torch.randint(16, (2, 8))
    logits = model(ids)
    assert logits.shape == (2, 8, 16) and not torch.equal(logits[:, 0], logits[:, 1])
    hidden: list[torch.Tensor] = []
    model.model.model.register_forward_hook(lambda _, __, out: hidden.append(out[0]))
    model(ids)
    assert torch.allclose(logits, model.decoder(hidden[0][:, -1:] + model.places))


def test_tables_are_in_percent():
    assert table({"hope": [1.0, 0.123]}, ["a", "b"]).splitlines()[-1] == "| hope | 100.0 | 12.3 |"


def flips(objective: str, length: int = 16, steps: int = 100) -> float:
    """Accuracy of a small HOPE that has learned parity for so many steps, on fresh strings of twice the length."""
    memory = {**formal_languages.HOPE_MEMORY, "objective": objective, "mix_start": 0.9, "rate_start": 0.1}
    model = make_model({"memory": memory}, **{**SHAPE, "width": 32})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)

    def right(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        bits = torch.randint(2, (batch, length), generator=generator)
        return model(bits, use_cache=False).logits[..., :2], bits.cumsum(1) % 2

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * pace(step, steps)
        logits, parity = right(32, length)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.mT, parity).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        logits, parity = right(64, 2 * length)
    return (logits.argmax(-1) == parity).float().mean().item()


@pytest.mark.slow
def test_the_mixed_objective_counts_modulo_two_and_dot_does_not():
    assert flips("mix") > 0.97
    assert flips("dot") < 0.75


def test_later_seeds_take_the_rate_that_was_best_with_the_first(tmp_path):
    results = Results(None, {})
    args = argparse.Namespace(rates=[1e-3, 2e-3], seeds=[0, 1])
    assert formal_languages.rates_for(results, args, "hope", "parity", 0) == [1e-3, 2e-3]
    for seed, rate, right in ((0, 1e-3, 0.5), (0, 2e-3, 0.9), (1, 1e-3, 1.0)):
        key = {"model": "hope", "language": "parity", "rate": rate, "seed": seed}
        results.once(key, lambda right=right: {"validation": right, "loss": 1.0})
    assert formal_languages.rates_for(results, args, "hope", "parity", 1) == [2e-3]
