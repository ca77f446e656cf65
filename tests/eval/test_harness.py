"""The harness's own adapter is the oracle for any Hugging Face model; ours are checked against reading anew."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data.byte_level import byte_tokenizer_json
from nestlearn.data.tokens import ByteTokenizer
from nestlearn.eval.families import Row, families
from nestlearn.eval.harness import HarnessModel, HuggingFaceCodec, OwnCodec
from nestlearn.eval.reading import Reader

WORDS = ("alpha", "beta,", "gamma.", "the", "of", "42", "\n")


def text(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


def choices(documents: int = 5) -> list[Any]:
    """Each context with three endings, one of them the empty context's, all of different lengths."""
    pairs = [(text(d, 3 + 4 * d), " " + text(50 + 9 * d + e, 1 + e)) for d in range(documents) for e in range(3)]
    return requests(*pairs, ("", text(1, 5)), ("ends in spaces  ", "word"))


def likeliest(model: torch.nn.Module) -> tuple[str, str]:
    """A context and the byte that this model finds likeliest after it, the first one that is a letter."""
    for context in (text(seed, 6) for seed in range(100)):
        byte = int(model(torch.tensor([list(context.encode())])).logits[0, -1].argmax())
        if byte < 128 and chr(byte).isalnum():
            return context, chr(byte)
    raise AssertionError("no letter is ever the likeliest")


def tokenizer(tmp_path: Any, **special: str) -> PreTrainedTokenizerFast:
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_tokenizer_json())
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **special)


def llama(longest: int = 256) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = LlamaConfig(vocab_size=258, max_position_embeddings=longest, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).eval()


def hope(**settings: Any) -> HopeForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = {"levels": [1], "memory": {"chunk": 8}, "initializer_range": 0.4, **settings}
    return HopeForCausalLM(HopeConfig(vocab_size=256, **sizes, **config)).eval()


@pytest.fixture(params=[{"eos_token": "<eos>"}, {"eos_token": "<eos>", "bos_token": "<bos>"}], ids=["eos", "bos"])
def both(request: Any, tmp_path: Any) -> tuple[HFLM, HarnessModel]:
    """The harness's adapter and ours, over one Llama."""
    words, model = tokenizer(tmp_path, **request.param), llama()
    model.generation_config.eos_token_id = words.eos_token_id  # as in a published folder: else HFLM reads on
    theirs = HFLM(pretrained=model, tokenizer=words, batch_size=4, device="cpu")
    return theirs, HarnessModel(model, HuggingFaceCodec(words), 4, progress=False)


def same(one: list[tuple[float, bool]], two: list[tuple[float, bool]], within: float = 1e-4) -> None:
    assert [greedy for _, greedy in one] == [greedy for _, greedy in two]
    assert torch.tensor([a for a, _ in one]).sub(torch.tensor([b for b, _ in two])).abs().max() < within


def test_a_llama_scores_as_in_the_harness(both):
    theirs, ours = both
    given = [*choices(), *requests(likeliest(theirs.model))]
    expected = theirs.loglikelihood(given, disable_tqdm=True)
    same(ours.loglikelihood(given, disable_tqdm=True), expected)
    assert {greedy for _, greedy in expected} == {True, False}


def test_a_context_that_is_too_long_loses_its_beginning_as_in_the_harness(both):
    theirs, ours = both
    given = requests((text(0, 80), " " + text(1, 20)), (text(0, 80), " beta"), (text(0, 3), " alpha"))
    assert len(ours.tok_encode(text(0, 80))) > 256
    same(ours.loglikelihood(given, disable_tqdm=True), theirs.loglikelihood(given, disable_tqdm=True))


def test_documents_are_cut_into_the_harness_s_windows_for_a_llama(both):
    theirs, ours = both
    given = requests((text(0, 150),), (text(1, 30),), (text(2, 4),))
    expected = theirs.loglikelihood_rolling(given, disable_tqdm=True)
    got = ours.loglikelihood_rolling(given, disable_tqdm=True)
    assert torch.tensor(got).sub(torch.tensor(expected)).abs().max() < 1e-3  # a sum over 700 tokens
    assert ours.loglikelihood_rolling(requests(("",)), disable_tqdm=True) == [0.0]


@pytest.mark.parametrize("until", [["\n\n", "a"], "e", []])
def test_a_llama_generates_the_texts_of_the_harness(both, until):
    theirs, ours = both
    settings = {"until": until, "max_gen_toks": 12, "do_sample": False}
    given = requests(*((text(seed, 2 + 3 * seed), dict(settings)) for seed in range(6)))
    assert ours.generate_until(given, disable_tqdm=True) == theirs.generate_until(given, disable_tqdm=True)


@pytest.mark.parametrize("mixer", ["self_modifying", "attention", "titans_mac"])
def test_reusing_states_changes_no_score(mixer):
    model = hope(mixer=mixer)
    quick = HarnessModel(model, OwnCodec(ByteTokenizer()), 5, progress=False)
    plain = HarnessModel(model, OwnCodec(ByteTokenizer()), 1, reuse=False, progress=False)
    given = choices()
    same(quick.loglikelihood(given, disable_tqdm=True), plain.loglikelihood(given, disable_tqdm=True))
    assert quick.reader.tokens_read < 0.7 * plain.reader.tokens_read


def test_a_document_is_one_stream_cut_into_pieces(monkeypatch):
    model = hope()
    ids = torch.tensor([[0x1C, *text(3, 60).encode()]])
    whole = torch.log_softmax(model(ids).logits.double(), -1)[0, :-1].gather(1, ids[0, 1:, None]).sum().item()
    monkeypatch.setattr("nestlearn.eval.reading.TOKENS", 64)
    ours = HarnessModel(model, OwnCodec(ByteTokenizer()), 4, progress=False)
    given = requests((text(3, 60),), (text(4, 2),), (text(5, 30),))
    assert ours.loglikelihood_rolling(given, disable_tqdm=True)[0] == pytest.approx(whole, abs=1e-3)
    assert ids.shape[1] > 3 * 64  # read in four pieces


def test_a_streaming_model_generates_what_generate_does():
    model, codec = hope(), OwnCodec(ByteTokenizer())
    ours = HarnessModel(model, codec, 3, progress=False)
    prompts = [text(seed, 1 + 2 * seed) for seed in range(4)] + ["x", text(9, 3)]
    got = ours.generate_until(requests(*((p, {"until": [], "max_gen_toks": 9}) for p in prompts)), disable_tqdm=True)
    for prompt, found in zip(prompts, got, strict=True):
        ids = torch.tensor([codec.encode(prompt)])
        settings = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": 0x1C, "pad_token_id": 0x1C}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()
        assert found == codec.decode(out)


def test_families_cover_every_row_once_and_share_what_they_say():
    rows = [Row(tuple(f"{text(d, 20)} {text(d + e, 2)}".encode()), 3) for d in range(4) for e in range(3)]
    rows += [rows[0], Row((1, 2, 3), 2)]
    found = families(rows)
    assert sorted(index for family in found for index in family.rows) == list(range(len(rows)))
    for family in found:
        starts = {rows[index].ids[: family.shared] for index in family.rows}
        assert len(starts) == 1 and all(family.shared <= rows[index].free for index in family.rows)
    assert sum(family.shared * (len(family.rows) - 1) for family in found) > 8 * 60


def test_a_prefix_of_all_requests_is_read_once():
    """A few-shot prefix: longer than what one document's choices share beyond it."""
    prefix = tuple(text(0, 100).encode())
    rows = [Row((*prefix, *text(d, 3).encode(), e), 1) for d in range(1, 5) for e in range(2)]
    reader = Reader(hope(), 8)
    reader.score(rows)
    assert reader.tokens_read < 1.5 * (len(prefix) + 8 * 30)
