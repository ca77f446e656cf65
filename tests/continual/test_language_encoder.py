"""A run of `nestlearn train` as the encoder of the continual benchmark."""

import copy
from typing import Any

import pytest
import torch

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.cli import main
from nestlearn.continual.benchmark import Plan, run_benchmark
from nestlearn.continual.classifier import Classifier
from nestlearn.continual.encoder import load_encoder
from nestlearn.continual.language_encoder import LanguageEncoder
from nestlearn.continual.methods import methods, prepare, trainable
from nestlearn.continual.protocol import Settings
from nestlearn.data.tokens import ByteTokenizer
from nestlearn.errors import UserError
from tests.continual import small

TEXTS = ["a b", "where is my luggage", "w3 w4 w5 w3"]


def language_encoder(trained=2):
    torch.manual_seed(0)
    levels = [{"name": "fast", "period": 8}, {"name": "slow", "period": 32}]
    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = HopeConfig(**sizes, intermediate_size=24, levels=levels, memory={"chunk": 4})
    return LanguageEncoder(HopeForCausalLM(config), ByteTokenizer(), trained)


@pytest.mark.parametrize("trained", [1, 3])
def test_a_feature_is_the_mean_of_the_model_s_own_hidden_states(trained):
    encoder = language_encoder(trained)
    torch.manual_seed(0)
    whole = language_encoder().model
    encoded = encoder.encode(TEXTS, [0, 1, 2])
    assert encoded.frozen.shape == (3, 16) and [len(h) for h in encoded.hidden] == [len(t) for t in TEXTS]
    for text, feature in zip(TEXTS, encoded.frozen, strict=True):
        hidden = whole["embedding"](torch.tensor([list(text.encode())]))
        for layer in whole["layers"]:
            hidden = layer(hidden)
        alone = torch.nn.functional.normalize(whole["norm"](hidden)[0].mean(0), dim=0)
        assert torch.allclose(feature, alone, atol=1e-5)
    assert torch.allclose(encoder(*encoded.padded()), encoded.frozen, atol=1e-5)


def test_it_is_the_hidden_state_that_the_head_reads():
    torch.manual_seed(0)
    config = HopeConfig(vocab_size=256, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, levels=[8, 16])
    model = HopeForCausalLM(config).eval()
    ids = torch.tensor([list(b"the head")])
    expected = model(ids, output_hidden_states=True).hidden_states[-1]
    _, last, _ = LanguageEncoder(copy.deepcopy(model), ByteTokenizer(), 1).read(["the head"])
    assert torch.allclose(last, expected, atol=1e-6)


def test_the_methods_train_its_upper_levels_only():
    for name, count in (("levels-2", 0), ("sequential", 2), ("levels-4", 2)):
        method = methods((64, 256))[name]
        model = Classifier(language_encoder(), method.head, 3, reads=method.reads)
        prepare(model, method, 2)
        learn = {id(p) for p in trainable(model.encoder)}
        layers: Any = model.encoder.layers  # pyright: ignore[reportAttributeAccessIssue]
        own = [{id(p) for p in layer.mlp.parameters()} for layer in layers[1:]]
        assert learn == (own[0] | own[1] if count else set()), name


def test_a_run_stands_in_for_a_pretrained_encoder(tmp_path):
    (tmp_path / "text.txt").write_text("where is my luggage? w3 w4 w5\n" * 200)
    settings = ["compare_rate_zero=false", "held_out_tokens=200", "sample_tokens=1", "sequence_length=32",
                "batch_size=2", "model.hidden_size=16", "model.intermediate_size=24", "model.levels=[64]"]  # fmt: skip
    run = tmp_path / "run"
    words = ["train", "--text", str(tmp_path / "text.txt"), "--tokens", "256", "--out", str(run), "--set", *settings]
    assert main(words) == 0
    data = small.write(tmp_path / "rows.jsonl", small.rows())
    plan = Plan(str(data), str(run), tasks=3, train=4, valid=2, test=2, periods=(64,), rates=(1e-2,),
                settings=Settings(trained=1, epochs=2, batch=4))  # fmt: skip
    said = []
    assert run_benchmark(plan, ["levels-2", "levels-3", "sequential"], [0], tmp_path / "out", say=said.append)
    assert len(said) == 3
    with pytest.raises(UserError, match="trained layers are 9"):
        load_encoder(str(run), 9)


def test_a_text_without_tokens_is_refused():
    with pytest.raises(UserError, match="leave empty texts out"):
        language_encoder().encode(["a", ""], [0, 1])
