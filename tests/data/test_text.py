"""What is read, in which order, and what is held out."""

import gzip
import hashlib
import json
import os
import sysconfig
from pathlib import Path

import pytest

from nestlearn.data import Document, Documents, read_texts, standard_library
from nestlearn.data.text import HELD_OUT_SHARE, first_bytes, separate_texts
from nestlearn.errors import UserError

DATA = Path(os.environ.get("NESTLEARN_DATA", "../shared/data"))


def names(documents):
    return [document.name for document in documents]


def everything(corpus):
    return {document.name: document.data for document in [*corpus.train, *corpus.held_out]}


def fill(folder, count, prefix="f"):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / f"{prefix}{index}.txt").write_text(f"text of {prefix}{index}\n")
    return folder


def refused(*paths):
    with pytest.raises(UserError) as error:
        read_texts(paths)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_size_and_sum_are_those_of_the_joined_documents():
    documents = Documents([Document("a", b"one"), Document("b", b"two"), Document("c", b"three")])
    assert documents.joined() == b"one\x1ctwo\x1cthree"
    assert documents.bytes == len(documents.joined())
    assert documents.sha256 == hashlib.sha256(documents.joined()).hexdigest()
    assert Documents().bytes == 0


def test_a_folder_is_read_recursively_in_order_without_hidden_files(tmp_path):
    fill(tmp_path / "b" / "deep", 30)
    fill(tmp_path / "a", 30)
    fill(tmp_path / ".git", 1)
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\0")
    (tmp_path / "empty.py").touch()
    corpus = read_texts([tmp_path])
    assert names(corpus.train) == sorted(names(corpus.train))
    assert set(everything(corpus)) == {f"{folder}/f{i}.txt" for folder in ("a", "b/deep") for i in range(30)}


def test_the_split_depends_on_names_alone(tmp_path):
    first, second = fill(tmp_path / "x", 200), fill(tmp_path / "elsewhere" / "y", 200)
    held_out = names(read_texts([first]).held_out)
    assert held_out == names(read_texts([second]).held_out)
    assert 0 < len(held_out) < 200 * HELD_OUT_SHARE * 3
    for index in range(200, 400):
        (first / f"f{index}.txt").write_text("more")
    assert set(held_out) <= set(names(read_texts([first]).held_out)), "new files do not move the old ones"


@pytest.mark.parametrize("count", range(2, 8))
def test_few_documents_have_one_on_each_side(tmp_path, count):
    corpus = read_texts([fill(tmp_path, count)])
    assert len(corpus.held_out) >= 1 and len(corpus.train) >= 1
    assert len(corpus.held_out) + len(corpus.train) == count


def test_files_of_one_name_are_not_all_held_out(tmp_path):
    paths = [fill(tmp_path / str(index), 1) / "f0.txt" for index in range(3)]
    corpus = read_texts(paths)
    assert (len(corpus.train), len(corpus.held_out)) == (2, 1)


def test_a_file_named_twice_is_read_once(tmp_path):
    fill(tmp_path, 20)
    assert everything(read_texts([tmp_path, tmp_path / "f3.txt"])) == everything(read_texts([tmp_path]))


def test_rows_of_one_file_split_by_number(tmp_path):
    rows = [json.dumps({"text": f"row {index}"}) for index in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "renamed.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    plain, packed = read_texts([tmp_path / "a.jsonl"]), read_texts([tmp_path / "renamed.jsonl.gz"])
    assert plain.held_out.sha256 == packed.held_out.sha256 and plain.train.sha256 == packed.train.sha256
    assert everything(plain)["a.jsonl#12"] == b"row 12"
    assert len(plain.held_out) < 45


def test_a_single_document_holds_out_its_end_between_characters(tmp_path):
    (tmp_path / "a.md").write_text("é" * 1000)
    corpus = read_texts([str(tmp_path / "a.md")])
    assert corpus.train.joined() + corpus.held_out.joined() == ("é" * 1000).encode()
    assert corpus.held_out.joined().decode() == "é" * 100
    (tmp_path / "b.txt").write_bytes(b"\xe9" * 1000)  # Latin-1 is read as the bytes that it is
    assert read_texts([tmp_path / "b.txt"]).held_out.bytes == 100


def test_links_are_read_by_their_own_names(tmp_path):
    (tmp_path / "blob").write_text("text behind a link " * 9)
    (tmp_path / "linked.txt").symlink_to(tmp_path / "blob")
    assert names(read_texts([tmp_path]).train) == ["linked.txt"]


def test_summary_has_sizes_and_sums(tmp_path):
    corpus = read_texts([fill(tmp_path, 30)])
    assert str(tmp_path) in corpus.description
    for split in (corpus.train, corpus.held_out):
        assert f"{split.bytes:,} bytes, sha256 {split.sha256}" in corpus.summary


def test_bad_input_is_one_line(tmp_path):
    fill(tmp_path / "good", 3)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "a.py").touch()
    assert "no text was given" in refused()
    assert "no such file or folder" in refused(tmp_path / "missing.txt")
    assert "no such file or folder" in refused(tmp_path / "missing")
    assert "suffix is not one of" in refused(tmp_path / "pictures" / "a.png")
    assert "is empty (0 bytes)" in refused(tmp_path / "good", tmp_path / "empty.txt")
    assert "no file with a supported suffix (.txt .md .py .jsonl .parquet, each also" in refused(tmp_path / "pictures")
    assert "holds no text at all" in refused(tmp_path / "hollow")
    assert "has 1 bytes, too few" in refused(tmp_path / "one.txt")
    (tmp_path / "good" / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert "broken.txt: cannot be read" in refused(tmp_path / "good")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(tmp_path):
    inner = fill(tmp_path / "inner", 2)
    fill(tmp_path, 2)
    inner.chmod(0)
    try:
        assert "cannot be read" in refused(tmp_path)
    finally:
        inner.chmod(0o755)


def test_standard_library_is_code_of_the_library_alone():
    corpus = standard_library()
    files = everything(corpus)
    assert names(corpus.train) == sorted(names(corpus.train)) and len(files) > 300
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(files)
    parts = {part for name in files for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
    assert files["os.py"] == (Path(sysconfig.get_path("stdlib")) / "os.py").read_bytes()
    assert 0.01 < corpus.held_out.bytes / corpus.train.bytes < 0.15
    assert corpus == standard_library()


def test_standard_library_without_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(UserError, match="no standard library source in .* --text"):
        standard_library()


@pytest.mark.skipif(not DATA.is_dir(), reason="the project's data folder is not here")
@pytest.mark.parametrize("file", ["tinyshakespeare/tinyshakespeare.txt.xz", "clinc150/clinc150_full.jsonl.gz"])
def test_real_files(file):
    if not (DATA / file).exists():
        pytest.skip(f"{file} is not here")
    corpus = read_texts([DATA / file])
    assert corpus.train.bytes > 3 * corpus.held_out.bytes > 0


# --- separate held-out text


def test_separate_files_are_trained_on_and_held_out_in_full(tmp_path):
    train, kept = fill(tmp_path / "train", 40), fill(tmp_path / "kept", 3, "g")
    corpus = separate_texts([train], [kept])
    assert (names(corpus.train), names(corpus.held_out)) == (
        sorted(f"f{n}.txt" for n in range(40)),
        ["g0.txt", "g1.txt", "g2.txt"],
    )


def test_what_is_trained_on_cannot_be_held_out(tmp_path):
    train = fill(tmp_path / "train", 3)
    with pytest.raises(UserError, match="name it in one of the two"):
        separate_texts([train], [train / "f1.txt"])
    (tmp_path / "copy.txt").write_text("text of f2\n")
    with pytest.raises(UserError, match="copy.txt is also trained on"):
        separate_texts([train], [tmp_path / "copy.txt"])


def test_the_first_bytes_of_each_held_out_document(tmp_path):
    (tmp_path / "a.txt").write_text("abcdé and more")
    (tmp_path / "b.txt").write_text("abc")
    corpus = first_bytes(separate_texts([fill(tmp_path / "train", 2)], [tmp_path / "a.txt", tmp_path / "b.txt"]), 5)
    assert [document.data for document in corpus.held_out] == [b"abcd", b"abc"]  # é is two bytes, the 5th and 6th
    assert "at most 5 bytes of each held-out document" in corpus.description
    assert names(corpus.train) == ["f0.txt", "f1.txt"]
