"""Labelled text from whatever it comes in."""

import gzip
import json
import lzma
from pathlib import Path

import pytest

from nestlearn.continual.labelled import Row, read_labelled
from nestlearn.errors import UserError

ROWS = [("book a table", "book", "food", "train"), ("how hot is it", "weather", "talk", "test")]
CLINC = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "clinc150"


def jsonl(text="text", label="label", task="task"):
    return "".join(json.dumps({text: t, label: c, task: d, "split": s}) + "\n" for t, c, d, s in ROWS)


@pytest.mark.parametrize("names", [(), ("sentence", "intent", "domain"), ("input", "output", "task")])
def test_jsonl_by_any_of_its_usual_names(tmp_path, names):
    path = tmp_path / "rows.jsonl"
    path.write_text(jsonl(*names))
    assert read_labelled(path) == [Row(*row) for row in ROWS]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed(tmp_path, suffix, pack):
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(pack(jsonl().encode()))
    assert read_labelled(path) == [Row(*row) for row in ROWS]


def test_csv_with_and_without_a_header(tmp_path):
    with_header, without = tmp_path / "with.csv", tmp_path / "test.csv"
    with_header.write_text('category,text\nbook,"a table, please"\nweather,how hot\n')
    assert read_labelled(with_header) == [
        Row("a table, please", "book", None, None),
        Row("how hot", "weather", None, None),
    ]
    without.write_text('1,Title,"a long text"\n2,Other,"another"\n1,Third,"a third"\n')
    assert read_labelled(without)[1] == Row("Other another", "2", None, "test")


def test_clinc_in_its_own_format_and_a_folder_with_its_domains(tmp_path):
    own = {"train": [["book a table", "book"]], "oos_train": [["hm", "oos"]], "val": [["how hot", "weather"]]}
    (tmp_path / "data_full.json").write_text(json.dumps(own))
    (tmp_path / "domains.json").write_text(json.dumps({"food": ["book"], "talk": ["weather"]}))
    expected = [Row("book a table", "book", "food", "train"), Row("how hot", "weather", "talk", "valid")]
    assert read_labelled(tmp_path) == expected
    assert read_labelled(tmp_path / "data_full.json") == [row._replace(task=None) for row in expected]


def test_rows_within_an_object(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"Definition": ["about"], "Instances": [{"input": "Some firm", "output": "Company"}]}))
    assert read_labelled(path) == [Row("Some firm", "Company", None, "train")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n', "none of which is its label"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"te', "line 2: is not JSON"),
        ("a.jsonl", "3\n", "must be an object"),
        ("a.csv", "text,label\na,b\nc\n", "row 3: has 1 columns, the first has 2"),
        ("a.csv", "only\none\n", "one column"),
        ("a.txt", "x", "the suffix is not one of"),
        ("a.json", "{}", "holds no labelled text"),
        ("a.jsonl.gz", "x", "not a whole .gz file"),
    ],
)
def test_what_is_no_labelled_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_labelled(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        read_labelled(tmp_path / "nothing.csv")


@pytest.mark.skipif(not CLINC.is_dir(), reason="the shared data is not here")
def test_clinc150_as_it_is_shared():
    rows = read_labelled(CLINC)
    assert len(rows) == 22500 and len({row.label for row in rows}) == 150
    assert len({row.task for row in rows}) == 10 and {row.split for row in rows} == {"train", "valid", "test"}
