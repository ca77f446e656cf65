"""Tokenizers: bytes, a `tokenizers` file trained here, a Hugging Face folder saved here."""

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers, trainers

from nestlearn.data import Document, Documents, load_tokenizer, tokenize, tokens
from nestlearn.errors import UserError

TEXT = "def f(x):\n    return x + 1\n\n\nclass A:\n    'größe 𝕏 <|endoftext|>'\n" * 40


def trained(special=("<|endoftext|>",), byte_level=True, vocab_size=300):
    inner = Inner(models.BPE())
    alphabet = []
    if byte_level:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([TEXT], trainer)
    return inner


@pytest.fixture
def file(tmp_path):
    trained().save(str(tmp_path / "bpe.json"))
    return tmp_path / "bpe.json"


@pytest.fixture
def folder(tmp_path):
    outer = transformers.PreTrainedTokenizerFast(tokenizer_object=trained(), eos_token="<|endoftext|>")
    outer.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@given(st.binary(max_size=200))
def test_bytes_are_their_own_ids(data):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(data)
    assert ids.dtype == np.uint16 and ids.tolist() == list(data)
    assert tokenizer.decode(ids) == data


def test_documents_are_joined_by_the_separator():
    documents = Documents([Document("a", b"one"), Document("b", b"two")])
    ids = tokenize(documents, load_tokenizer("bytes"))
    assert bytes(ids.tolist()) == documents.joined() and len(ids) == documents.bytes
    assert tokenize([], load_tokenizer("bytes")).shape == (0,)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_file_and_folder_agree_with_their_library(kind, request):
    tokenizer = load_tokenizer(str(request.getfixturevalue(kind)))
    plain = TEXT.replace("<|endoftext|>", "")
    ids = tokenizer.encode(plain.encode())
    assert ids.tolist() == trained().encode(plain).ids
    assert tokenizer.decode(ids) == plain.encode()
    assert tokenizer.separator_id == trained().token_to_id("<|endoftext|>")
    assert tokenizer.vocab_size == trained().get_vocab_size()


def test_text_cannot_forge_a_separator(file):
    tokenizer = load_tokenizer(str(file))
    ids = tokenizer.encode(TEXT.encode())
    assert tokenizer.separator_id not in ids
    assert tokenizer.decode(ids) == TEXT.encode()


@pytest.mark.parametrize("kind", ["bytes", "file", "folder"])
def test_saved_is_loaded_the_same_here_and_in_transformers(kind, tmp_path, request):
    spec = "bytes" if kind == "bytes" else str(request.getfixturevalue(kind))
    tokenizer = load_tokenizer(spec)
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    foreign = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "grüße\n\x1c 'll  𝕏 def f(x):"
    assert again.fingerprint() == tokenizer.fingerprint() == load_tokenizer(spec).fingerprint()
    assert (again.name, again.separator_id) == (tokenizer.name, tokenizer.separator_id)
    assert again.encode(text.encode()).tolist() == tokenizer.encode(text.encode()).tolist() == foreign(text).input_ids
    assert foreign.decode(foreign(text).input_ids) == text and len(foreign) == tokenizer.vocab_size


def test_fingerprints_differ(tmp_path, file):
    trained(vocab_size=290).save(str(tmp_path / "other.json"))
    prints = {load_tokenizer(spec).fingerprint() for spec in ("bytes", str(file), str(tmp_path / "other.json"))}
    assert len(prints) == 3


def test_a_large_vocabulary_needs_32_bits(tmp_path):
    vocab = {f"w{index}": index for index in range(70_000)} | {"</s>": 70_000}
    inner = Inner(models.WordLevel(vocab, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(str(tmp_path / "words.json"))
    ids = tokenize([Document("a", b"w69999 w1"), Document("b", b"w2")], tokenizer)
    assert ids.dtype == np.uint32 and ids.tolist() == [69_999, 1, 70_000, 2]


def test_long_documents_are_encoded_in_pieces_with_the_same_ids(file, monkeypatch):
    tokenizer = load_tokenizer(str(file))
    whole = tokenizer.encode(TEXT.encode())
    monkeypatch.setattr(tokens, "_PIECE", 100)
    assert tokenizer.encode(TEXT.encode()).tolist() == whole.tolist()
    one_line = ("é" * 1001).encode()
    assert tokenizer.decode(tokenizer.encode(one_line)) == one_line


def test_separator_of_a_file_without_special_tokens(tmp_path):
    trained(special=()).save(str(tmp_path / "a.json"))
    tokenizer = load_tokenizer(str(tmp_path / "a.json"))
    assert tokenizer.decode([tokenizer.separator_id]) == b"\x1c"


def test_no_separator_at_all(tmp_path):
    inner = Inner(models.WordLevel({"a": 0}, unk_token="a"))
    inner.save(str(tmp_path / "a.json"))
    with pytest.raises(UserError, match="no token to separate documents: add a special token"):
        load_tokenizer(str(tmp_path / "a.json"))


def test_text_that_is_not_utf8_names_document_and_byte(file):
    tokenizer = load_tokenizer(str(file))
    with pytest.raises(UserError, match=r"^old\.txt: not UTF-8 \(byte 0xe9, .*\): tokenizer bpe.json needs UTF-8; "):
        tokenize([Document("old.txt", "caf\xe9 au lait".encode("latin-1"))], tokenizer)


def test_bad_tokenizers_are_one_line(tmp_path, file):
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    load_tokenizer(str(file)).save(tmp_path / "saved")
    (tmp_path / "saved" / "nestlearn_tokenizer.json").write_text('{"kind": ')
    for spec in ["byts", str(tmp_path / "no.json"), str(tmp_path / "empty"), str(tmp_path / "saved")]:
        with pytest.raises(UserError) as error:
            load_tokenizer(spec)
        assert "\n" not in str(error.value) and spec.split("/")[-1] in str(error.value)
