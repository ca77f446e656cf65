"""One file to its documents: .txt .md .py (one document each), .jsonl .parquet (one per row), and .gz/.xz of these.

Every fault of a file is one `UserError` that names the file and, where there is one, the line.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from nestlearn.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".parquet")
COMPRESSIONS = {".gz": gzip.decompress, ".xz": lzma.decompress}
SUPPORTED = f"{' '.join(TEXT_SUFFIXES + ROW_SUFFIXES)}, each also with {' or '.join(COMPRESSIONS)}"

TEXT_FIELDS = ("text", "content")


def text_suffix(path: Path) -> str | None:
    """The supported suffix of ``path`` without its compression, or None: ``books.JSONL.xz`` has ``.jsonl``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    supported = suffixes and suffixes[-1] in TEXT_SUFFIXES + ROW_SUFFIXES
    return suffixes[-1] if supported else None


def read_rows(path: Path) -> Iterator[bytes]:
    """The documents of one file, in order, empty ones left out. Raises UserError for bytes that the suffix belies."""
    suffix = text_suffix(path)
    if suffix is None:
        raise UserError(f"{path}: the suffix is not one of {SUPPORTED}: rename or convert the file")
    data = decompressed(path)
    if suffix == ".jsonl":
        rows = _jsonl(path, data)
    elif suffix == ".parquet":
        rows = _parquet(path, data)
    else:
        rows = iter([_plain(path, data)])
    return (row for row in rows if row)


def decompressed(path: Path) -> bytes:
    """The bytes of a file, unpacked as its suffix says."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions") from error
    decompress = COMPRESSIONS.get(path.suffix.lower())
    if decompress is None:
        return data
    try:
        if not data:  # `gzip` takes nothing for a whole file
            raise EOFError("it has 0 bytes")
        return decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        kind = path.suffix.lower()
        raise UserError(f"{path}: is not a whole {kind} file ({error}): fetch it again or rename it") from error


def _plain(path: Path, data: bytes) -> bytes:
    zero = data.find(b"\0")  # UTF-16, archives, pictures: text never has one
    if zero >= 0:
        raise UserError(
            f"{path}: has a NUL byte at offset {zero}, so it is not text: convert it to UTF-8 or leave it out"
        )
    return data


def _jsonl(path: Path, data: bytes) -> Iterator[bytes]:
    field = None
    for number, line in enumerate(io.BytesIO(data), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
            raise UserError(f"{where}: is not JSON ({error}): each line must be one JSON object") from error
        if not isinstance(row, dict):
            raise UserError(f'{where}: is a {type(row).__name__}, must be a JSON object such as {{"text": "..."}}')
        field = field or _text_field(where, (key for key, value in row.items() if isinstance(value, str)))
        yield _encoded(where, field, row.get(field))


def _parquet(path: Path, data: bytes) -> Iterator[bytes]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{path}: .parquet needs pyarrow: pip install 'nestlearn[train]'") from error
    number = 0
    try:
        table = pq.ParquetFile(pa.BufferReader(data))
        strings = (column.name for column in table.schema_arrow if _is_string(pa, column.type))
        field = _text_field(str(path), strings)
        for batch in table.iter_batches(columns=[field]):
            for value in batch.column(0):
                number += 1
                yield _encoded(f"{path}, row {number}", field, value.as_py())
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: is not a whole parquet file ({reason}): fetch it again or rename it") from error


def _is_string(pa, kind) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _text_field(where: str, strings: Iterable[str]) -> str:
    """The field that holds the text: "text", else "content", else the only string."""
    fields = list(strings)
    known = [field for field in TEXT_FIELDS if field in fields]
    if known or len(fields) == 1:
        return (known or fields)[0]
    found = f"the string fields {fields}" if fields else "no string field"
    raise UserError(f'{where}: has {found}, cannot tell which is the text: name it "text"')


def _encoded(where: str, field: str, value: object) -> bytes:
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} is {_short(value)}, must be a string")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} is not valid Unicode ({error.reason}): repair the row") from error


def _short(value: object) -> str:
    return "missing or null" if value is None else f"a {type(value).__name__}"
