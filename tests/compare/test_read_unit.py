"""Whole documents as streams: frozen it is the model's own loss, learning it is an OnlineLearner's, each alone."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nestlearn import HopeConfig, HopeForCausalLM, OnlineLearner
from nestlearn.compare.child import RESULT, do_unit
from nestlearn.compare.read_unit import bits_per_byte, documents, levels_at, read
from nestlearn.compare.run import READ, TRAIN, run_comparison
from nestlearn.data.tokens import ByteTokenizer
from nestlearn.errors import UserError
from tests.compare.small import Counted, Pretended, in_process, plan
from tests.train.tiny import config

LENGTHS = (40, 23, 40, 40)


def silent(text):
    pass


def make_model(mixer):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    memory = {"chunk": 8} if mixer == "self_modifying" else None
    return HopeForCausalLM(HopeConfig(**shape, mixer=mixer, levels=[1], memory=memory, initializer_range=0.3))


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return [rng.integers(97, 123, size=n).astype(np.uint16) for n in LENGTHS]


def losses(model, ids):
    logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1]
    return F.cross_entropy(logits, torch.from_numpy(ids[1:].astype(np.int64)), reduction="none").detach().numpy()


@pytest.mark.parametrize("mixer", ["self_modifying", "attention"])
def test_at_rate_zero_it_is_the_models_own_loss(mixer, texts, tmp_path):
    model, settings = make_model(mixer), config(tmp_path, sequence_length=16, batch_size=2)
    found = read(model, texts, levels_at(model, 0.0, 8), settings)
    for document, nats in zip(texts, found, strict=True):
        assert math.isnan(nats[0]) and len(nats) == len(document)
        if mixer == "attention":  # the last token before a cut is the first input after it
            pieces = [document[max(0, at - 1) : at + 16] for at in range(0, len(document), 16)]
            expected = np.concatenate([losses(model, piece) for piece in pieces])
        else:
            expected = losses(model, document)
        np.testing.assert_allclose(nats[1:], expected, atol=2e-5)


def test_learning_is_what_an_online_learner_does_with_each_document_alone(texts, tmp_path):
    model = make_model("self_modifying")
    found = read(model, texts, levels_at(model, 0.5, 8), config(tmp_path, sequence_length=16, batch_size=2))
    for document, nats in zip(texts, found, strict=True):
        learner = OnlineLearner(model, levels_at(model, 0.5, 8), context=math.inf)
        alone = learner.read(torch.from_numpy(document.astype(np.int64))).numpy()
        np.testing.assert_allclose(nats[1:], alone[1:], atol=2e-5)
        assert np.abs(nats[1:] - losses(model, document)).max() > 1e-3


def test_a_slower_level_keeps_its_period():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    levels = levels_at(HopeForCausalLM(HopeConfig(**shape, levels=[1, 512])), 0.5, 64)
    assert [(level.period, level.lr) for level in levels] == [(64, 0.5), (512, 0.5)]


def test_documents_are_cut_at_the_separators():
    tokenizer = ByteTokenizer()
    text = np.frombuffer(b"first\x1csecond\x1c\x1cx\x1clast", dtype=np.uint8).astype(np.uint16)
    assert [bytes(d.astype(np.uint8)) for d in documents(text, tokenizer, None)] == [b"first", b"second", b"last"]
    assert [len(d) for d in documents(text, tokenizer, 9)] == [5, 3]
    with pytest.raises(UserError, match="no document of two tokens"):
        documents(text[:1], tokenizer, None)


def test_bits_per_byte_are_of_all_texts_together():
    texts = [np.zeros(4, np.uint16), np.zeros(12, np.uint16)]
    nats = [np.full(4, math.log(2)), np.full(12, 2 * math.log(2))]
    assert bits_per_byte(list(zip(nats, texts, strict=True)), ByteTokenizer()) == pytest.approx(28 / 16)
    assert bits_per_byte([(np.array([math.nan]), texts[0])], ByteTokenizer()) is None


def test_a_trained_model_is_read(tmp_path):
    settings = config(tmp_path, tokens=64)
    do_unit(TRAIN, tmp_path / "seed-0", {"config": settings.to_dict(), "keep": True}, in_process)
    unit = {"config": settings.to_dict(), "trained": "seed-0", "rate": 0.5, "period": 8}
    result = do_unit(READ, tmp_path / "read", unit, in_process)
    assert result == json.loads((tmp_path / "read" / RESULT).read_text())
    assert 0 < result["bits_per_byte"] < 16 and result["documents"] >= 1 and result["tokens"] > 10
    frozen = do_unit(READ, tmp_path / "frozen", unit | {"rate": 0.0}, in_process)
    assert frozen["bits_per_byte"] != result["bits_per_byte"] and frozen["tokens"] == result["tokens"]


def test_the_rate_is_chosen_with_the_first_seed_and_the_table_shows_it(tmp_path):
    pretended = Pretended(lambda model, c: 2.0, read=lambda rate: 2.5 - rate if rate < 2 else 3.0)
    made = plan(tmp_path, online_rates=(0.5, 1.0), online_period=8)
    results = run_comparison(made, tmp_path / "out", silent, pretended)
    for model in results["models"]:
        assert [tried["rate"] for tried in model["stream"]["tuning"]] == [0.5, 1.0, 2.0]
        assert model["stream"]["rate"] == 1.0 and "0.5" not in model["stream"]["note"]
        assert (model["stream"]["frozen"]["mean"], model["stream"]["learning"]["mean"]) == (2.5, 1.5)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| as a stream | learning from it | at the rate |" in table and "| 2.5000 ± 0.0000 | 1.5000 ±" in table
    assert "while the model&#x27;s levels change every 8 tokens" in (tmp_path / "out" / "compare.html").read_text()


def test_a_finished_comparison_can_be_read_later(tmp_path):
    first, later = Counted(), Counted()
    run_comparison(plan(tmp_path, seeds=1), tmp_path / "out", silent, first)
    asked = plan(tmp_path, seeds=1, online_rates=(0.1,), online_period=8)
    results = run_comparison(asked, tmp_path / "out", silent, later)
    names = [f"{model}/read-seed-0-{rate}" for model in ("transformer", "retnet") for rate in ("0", "0.1")]
    assert later.units == names and not any("read" in unit for unit in first.units)
    assert all(model["stream"]["frozen"]["mean"] > 0 for model in results["models"])
    with pytest.raises(UserError, match="online_period 8, not 16"):
        run_comparison(dataclasses.replace(asked, online_period=16), tmp_path / "out", silent, later)


def test_a_stream_without_a_finite_loss_is_a_result(tmp_path):
    pretended = Pretended(lambda model, c: 2.0, read=lambda rate: None if rate else 2.5)
    results = run_comparison(plan(tmp_path, online_rates=(0.5, 1.0)), tmp_path / "out", silent, pretended)
    assert all(model["stream"]["rate"] is None for model in results["models"])
    assert "| 2.5000 ± 0.0000 | broke down | – |" in (tmp_path / "out" / "table.md").read_text()
