"""Documents to one array of token ids. The default token is the byte; other tokenizers come from files.

A tokenizer is saved beside a checkpoint as a folder that both `load_tokenizer` and `transformers.AutoTokenizer` read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nestlearn.data.byte_level import byte_tokenizer_json
from nestlearn.data.text import SEPARATOR, Document
from nestlearn.errors import UserError

# Tokens that end a document, in the order in which a tokenizer without a declared one is searched.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
_SAVED = "nestlearn_tokenizer.json"

# A tokenizer keeps far more than an id per token while it works, so a long document is encoded in pieces, cut where a
# line starts with a non-space: there byte-level tokenizers cut in any case.
_PIECE = 1 << 20
_LINE_START = re.compile(rb"\n(?=\S)")


class Tokenizer(Protocol):
    """Bytes to ids and back.

    vocab_size    ids are in [0, vocab_size)
    separator_id  the id between two documents
    """

    name: str
    vocab_size: int
    separator_id: int

    def encode(self, text: bytes) -> np.ndarray:
        """(N,) ids, uint16 where the vocabulary allows, else uint32. UserError for text it cannot read."""
        ...

    def decode(self, ids: Iterable[int]) -> bytes: ...

    def fingerprint(self) -> str:
        """The sha256 of all that decides which ids a text becomes."""
        ...

    def save(self, folder: Path | str) -> None:
        """Write what ``load_tokenizer(str(folder))`` needs to make this tokenizer again."""
        ...


class ByteTokenizer:
    """A token is a byte; documents are separated by byte 0x1C, ASCII's file separator."""

    name = "bytes"
    vocab_size = 256
    separator_id = SEPARATOR[0]

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> bytes:
        return bytes(int(index) for index in ids)

    def fingerprint(self) -> str:
        return hashlib.sha256(b"nestlearn bytes, separator 0x1c").hexdigest()

    def save(self, folder: Path | str) -> None:
        _save(Path(folder), self, byte_tokenizer_json(), end=None)  # a byte cannot be a special token as well


class FileTokenizer:
    """A tokenizer of the `tokenizers` library. Text that looks like a special token is encoded as ordinary text.

    What such a tokenizer does with characters that it does not know (drop, or an unknown token) is its own rule.
    """

    def __init__(self, inner: Any, name: str, separator_id: int) -> None:
        self.name = name
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.separator_id = separator_id
        self._json = inner.to_str()
        self._inner = inner
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()

    def encode(self, text: bytes) -> np.ndarray:
        ids = [self._encode_piece(piece) for piece in _pieces(text)]
        return np.concatenate(ids) if ids else np.zeros(0, dtype=_dtype(self))

    def _encode_piece(self, piece: bytes) -> np.ndarray:
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:
            reason = f"byte 0x{piece[error.start]:02x}, {error.reason}"
            raise UserError(
                f"not UTF-8 ({reason}): tokenizer {self.name} needs UTF-8; convert it or use bytes"
            ) from error
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, dtype=_dtype(self))

    def decode(self, ids: Iterable[int]) -> bytes:
        return self._inner.decode([int(index) for index in ids], skip_special_tokens=False).encode()

    def fingerprint(self) -> str:
        canonical = json.dumps([json.loads(self._json), self.separator_id], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, folder: Path | str) -> None:
        _save(Path(folder), self, self._json, self._inner.id_to_token(self.separator_id))


def load_tokenizer(spec: str) -> Tokenizer:
    """For "bytes", a `tokenizers` JSON file, a folder that `Tokenizer.save` wrote, or a Hugging Face tokenizer folder.

    Raises UserError for what is none of these, and for a tokenizer that has no token to put between documents.
    """
    path = Path(spec)
    if spec == "bytes":
        return ByteTokenizer()
    if (path / _SAVED).is_file():
        return _load_saved(path)
    if path.is_dir():
        return _load_hugging_face(path)
    if path.is_file():
        inner = _read_json_tokenizer(path)
        return FileTokenizer(inner, path.name, _find_separator(inner, path))
    raise UserError(f"tokenizer {spec!r}: no such file or folder: give bytes, a tokenizers JSON file or a HF folder")


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> np.ndarray:
    """(N,) ids of the documents, joined by ``separator_id``: uint16 where the vocabulary allows, else uint32.

    Raises UserError, with the document's name, for text that the tokenizer cannot read.
    """
    dtype = _dtype(tokenizer)
    separator = np.array([tokenizer.separator_id], dtype=dtype)
    parts: list[np.ndarray] = []
    for document in documents:
        parts += [separator] * bool(parts) + [_encode(document, tokenizer)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def _encode(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    try:
        return tokenizer.encode(document.data)
    except UserError as error:
        raise UserError(f"{document.name}: {error}") from error


def _dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def _pieces(text: bytes) -> Iterator[bytes]:
    start = 0
    while len(text) - start > _PIECE:
        found = _LINE_START.search(text, start + _PIECE, start + 2 * _PIECE)
        end = found.end() if found else start + _PIECE
        while end < len(text) and text[end] & 0xC0 == 0x80:  # never inside a UTF-8 character
            end += 1
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _load_saved(folder: Path) -> Tokenizer:
    try:
        saved = json.loads((folder / _SAVED).read_text())
        if saved["kind"] == "bytes":
            return ByteTokenizer()
        return FileTokenizer(_read_json_tokenizer(folder / "tokenizer.json"), saved["name"], saved["separator_id"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / _SAVED}: is damaged ({error!r}): save the tokenizer again") from error


def _load_hugging_face(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        outer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # anything can go wrong in foreign files
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder}: has no tokenizer that transformers can load ({reason}): give another folder"
        ) from error
    inner = getattr(outer, "backend_tokenizer", None)
    if inner is None:
        raise UserError(f"{folder}: {type(outer).__name__} has no tokenizer.json form: convert it to a fast tokenizer")
    declared = outer.eos_token_id if outer.eos_token_id is not None else outer.sep_token_id
    return FileTokenizer(inner, folder.name, _find_separator(inner, folder) if declared is None else declared)


def _read_json_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer as Inner

    try:
        return Inner.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise UserError(
            f"{path}: is not a `tokenizers` JSON file ({error}): give the file that its save() wrote"
        ) from error


def _find_separator(inner: Any, path: Path) -> int:
    """The id of a known end-of-text token, or of a character that by itself is one token: 0x1C, else a line break."""
    for end in _ENDS:
        if inner.token_to_id(end) is not None:
            return inner.token_to_id(end)
    for character in (chr(SEPARATOR[0]), "\n"):
        ids = inner.encode(character, add_special_tokens=False).ids
        if len(ids) == 1 and inner.decode(ids, skip_special_tokens=False) == character:
            return ids[0]
    raise UserError(f"{path}: has no token to separate documents: add a special token such as <|endoftext|> to it")


def _save(folder: Path, tokenizer: Tokenizer, inner_json: str, end: str | None) -> None:
    """``tokenizer.json`` and its config are for `transformers`; ours says what those two cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    outer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
    }
    kind = "bytes" if isinstance(tokenizer, ByteTokenizer) else "file"
    ours = {"kind": kind, "name": tokenizer.name, "separator_id": tokenizer.separator_id}
    (folder / "tokenizer.json").write_text(inner_json)
    (folder / "tokenizer_config.json").write_text(json.dumps(outer, indent=2) + "\n")
    (folder / _SAVED).write_text(json.dumps(ours, indent=2) + "\n")
