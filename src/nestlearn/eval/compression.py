"""What general-purpose compressors make of the same bytes: the yardstick beside a model's bits per byte.

Each compressor sees the held-out bytes alone, as one stream, at its highest level; its container's few dozen bytes of
header and checksum count, as they do on disk.
"""

import bz2
import lzma
from typing import NamedTuple

from nestlearn.errors import UserError


class Compression(NamedTuple):
    """Bits per byte of the text, below 8 where it compresses at all."""

    xz: float
    bz2: float


def compression(text: bytes) -> Compression:
    """`xz -9` and `bz2 -9` of `text`, in bits per byte. UserError where the text is empty."""
    if not text:
        raise UserError("the text to compress is empty: bits per byte needs at least 1 byte")
    sizes = len(lzma.compress(text, preset=9)), len(bz2.compress(text, compresslevel=9))
    return Compression(*(8 * size / len(text) for size in sizes))
