"""Each format gives its documents; each fault gives one line that names the file, the rule and the fix."""

import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nestlearn.data.formats import read_rows, text_suffix
from nestlearn.errors import UserError

ROWS = ["first row\nof two lines", "zweite Zeile, ümlaut 𝕏", "third"]


def jsonl(rows, field="text"):
    return "".join(json.dumps({"id": index, field: row}) + "\n" for index, row in enumerate(rows)).encode()


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def write(path, data):
    path.write_bytes(data)
    return path


def fault(path):
    with pytest.raises(UserError) as error:
        list(read_rows(path))
    message = str(error.value)
    assert "\n" not in message and path.name in message and ": " in message
    return message


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
@pytest.mark.parametrize("pack, ending", [(bytes, ""), (gzip.compress, ".gz"), (lzma.compress, ".xz")])
def test_plain_text_is_one_document(tmp_path, suffix, pack, ending):
    path = write(tmp_path / f"a{suffix}{ending}", pack("grüße\r\n\x1c end".encode()))
    assert list(read_rows(path)) == ["grüße\r\n\x1c end".encode()]


@pytest.mark.parametrize("pack, ending", [(bytes, ""), (gzip.compress, ".gz"), (lzma.compress, ".XZ")])
def test_jsonl_is_a_document_per_row(tmp_path, pack, ending):
    path = write(tmp_path / f"a.jsonl{ending}", pack(jsonl(ROWS)))
    assert [row.decode() for row in read_rows(path)] == ROWS


def test_parquet_is_a_document_per_row(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=ROWS, id=[1, 2, 3])
    packed = write(tmp_path / "b.parquet.xz", lzma.compress(path.read_bytes()))
    assert [row.decode() for row in read_rows(path)] == ROWS
    assert list(read_rows(packed)) == list(read_rows(path))


@pytest.mark.parametrize("field", ["text", "content", "sentence"])
def test_the_text_field_is_found(tmp_path, field):
    path = write(tmp_path / "a.jsonl", jsonl(ROWS, field))
    assert len(list(read_rows(path))) == 3
    assert len(list(read_rows(parquet(tmp_path / "a.parquet", n=[1], **{field: ["x"]})))) == 1


def test_text_wins_over_other_strings(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"title": "no", "text": "yes"}\n')
    assert list(read_rows(path)) == [b"yes"]


def test_empty_rows_and_blank_lines_are_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n\n{"text": ""}\n  \n{"text": "b"}')
    assert list(read_rows(path)) == [b"a", b"b"]


@pytest.mark.parametrize("name", ["a.gz", "a.txt.bz2", "a", "a.json", "a.csv.gz"])
def test_unknown_suffix(tmp_path, name):
    path = write(tmp_path / name, b"x")
    assert text_suffix(path) is None
    assert ".jsonl .parquet" in fault(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.txt.gz"])
def test_missing_file_and_folder_in_place_of_a_file(tmp_path, name):
    assert "No such file" in fault(tmp_path / name)
    (tmp_path / name).mkdir()
    assert "directory" in fault(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz", "a.jsonl.gz", "a.parquet.xz", "a.parquet"])
@pytest.mark.parametrize("data", [b"plain text, not what the name says", b""])
def test_bytes_that_are_not_what_the_suffix_says(tmp_path, name, data):
    message = fault(write(tmp_path / name, data))
    assert f"is not a whole .{name.split('.')[-1]} file" in message or "is not a whole parquet file" in message


@pytest.mark.parametrize("pack, ending", [(gzip.compress, ".gz"), (lzma.compress, ".xz")])
def test_truncated_compression(tmp_path, pack, ending):
    whole = pack(b"some text " * 1000)
    assert "is not a whole" in fault(write(tmp_path / f"a.txt{ending}", whole[:-9]))


def test_truncated_parquet(tmp_path):
    whole = parquet(tmp_path / "whole.parquet", text=ROWS).read_bytes()
    assert "is not a whole parquet file" in fault(write(tmp_path / "a.parquet", whole[:-20]))


@pytest.mark.parametrize("data", [gzip.compress(b"text" * 99), "text".encode("utf-16")], ids=["gzip", "utf-16"])
def test_bytes_that_are_not_text(tmp_path, data):
    assert "NUL byte at offset" in fault(write(tmp_path / "a.txt", data))


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "cut', "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'"a string"', "is a str, must be a JSON object"),
        (b'{"other": "x"}', "is missing or null"),
        (b'{"text": null}', "is missing or null"),
        (b'{"text": 3}', "is a int, must be a string"),
        (b'{"text": "\\ud800"}', "is not valid Unicode"),
    ],
)
def test_broken_jsonl_names_its_line(tmp_path, line, reason):
    message = fault(write(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + line + b"\n"))
    assert "line 3: " in message and reason in message


def test_no_text_field(tmp_path):
    assert "the string fields ['a', 'b']" in fault(write(tmp_path / "a.jsonl", b'{"a": "x", "b": "y"}'))
    assert "no string field" in fault(write(tmp_path / "b.jsonl", b'{"a": 1}'))
    assert "the string fields ['a', 'b']" in fault(parquet(tmp_path / "a.parquet", a=["x"], b=["y"]))
    assert "row 2: field 'text' is missing or null" in fault(parquet(tmp_path / "b.parquet", text=["x", None]))
