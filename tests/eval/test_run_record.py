import json
import math

import numpy as np
import pytest

from nestlearn.errors import UserError
from nestlearn.eval.curves import count, duration, read_curve, relative, smooth
from nestlearn.eval.run_record import read_record, write_record
from tests.eval import made_up


def test_a_record_survives_its_file(tmp_path):
    record = made_up.record()
    assert any(row.period == math.inf for row in record.levels)
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_record_of_an_unfinished_run_survives_its_file(tmp_path):
    record = made_up.record(results=made_up.Results(), sample=None, passage=None, levels=[], commit=None)
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no run.json"):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"corpus": {}}', '{"corpus": 3, "unknown": 1}'])
def test_a_broken_record_is_one_line(tmp_path, text: str):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match="not the record of a training run") as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)


def line(tokens: int, loss: float = 2.0) -> str:
    return json.dumps({"tokens": tokens, "seconds": tokens / 10, "loss_bits_per_byte": loss}) + "\n"


def test_after_a_resume_the_later_lines_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2) + line(3) + line(2, 7.0) + line(4))
    curve = read_curve(path)
    assert curve is not None
    assert curve.tokens.tolist() == [1, 2, 4]
    assert curve.loss.tolist() == [2, 7, 2]


def test_an_unfinished_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2)[:-9])
    curve = read_curve(path)
    assert curve is not None and curve.tokens.tolist() == [1]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + "{oops}\n" + line(2))
    with pytest.raises(UserError, match="line 2"):
        read_curve(path)


def test_no_metrics_no_curve(tmp_path):
    assert read_curve(tmp_path / "metrics.jsonl") is None
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_curve(tmp_path / "metrics.jsonl") is None


@pytest.mark.parametrize("width", [0, 1, 2, 5, 100])
def test_smoothing_averages_what_lies_within_reach(width: int):
    values = np.random.default_rng(0).normal(size=30)
    reach = width // 2
    expected = [values[max(0, i - reach) : i + reach + 1].mean() for i in range(30)]
    np.testing.assert_allclose(smooth(values, width), expected, atol=1e-12)


def test_numbers_in_words():
    assert [count(v) for v in (0, 950, 9_999, 12_345, 1_638_400, 2e9)] == [
        "0",
        "950",
        "9,999",
        "12.3 k",
        "1.64 M",
        "2 G",
    ]
    assert [duration(s) for s in (0.5, 59, 252, 7260)] == ["0.5 s", "59 s", "4 min 12 s", "2 h 1 min"]
    assert (relative(95.8, 100), relative(101, 100)) == ("4.2 % lower", "1.0 % higher")
