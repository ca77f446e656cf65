"""The byte tokenizer as a `tokenizers` JSON file, so that `transformers` can load it beside a checkpoint.

It is a byte-level BPE without merges. Such a model names each byte by a printable character: itself where the byte is
one in Latin-1, else the next free character from U+0100 on. Here the id of each is the byte, so ids equal bytes.
"""

from __future__ import annotations

import json

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


def byte_names() -> list[str]:
    """256 characters: the name of each byte."""
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    names = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    return [names[byte] for byte in range(256)]


def byte_tokenizer_json() -> str:
    """The text of ``tokenizer.json``."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bpe = {"type": "BPE", "vocab": {name: byte for byte, name in enumerate(byte_names())}, "merges": []}
    plain = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    return json.dumps(
        plain | {"pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": bpe}
    )
