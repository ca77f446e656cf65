"""The page is whole, complete in itself, escaped, and honest about what is missing."""

import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data.tokens import ByteTokenizer
from nestlearn.errors import UserError
from nestlearn.eval import score
from nestlearn.eval.gather import Report, gather, newest_checkpoint
from nestlearn.eval.passage import passage, visible
from nestlearn.eval.report import page, write_report
from nestlearn.eval.run_record import Evaluation, Results
from tests.eval import made_up

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Outline(HTMLParser):
    """Fails where tags do not nest; keeps the text outside of script and style, and all attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def report(run: Path, shown=None, **changes) -> Report:
    found = gather(made_up.write_run(run, **changes))
    return Report(found.record, found.curve, found.rate_zero, shown if shown is not None else found.passage)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> str:
    return page(report(tmp_path_factory.mktemp("run"), made_up.traced()))


def test_tags_nest(full):
    outline = Outline(full)
    assert outline.tags.count("section") == 8
    assert outline.tags.count("svg") > 10


def test_the_page_needs_nothing_else(full):
    outline = Outline(full)
    assert not re.search(r"https?://|@import|url\((?!data:)", full)
    assert not [
        value for name, value in outline.attributes if name in ("src", "href") and not value.startswith("data:")
    ]
    assert "link" not in outline.tags


def test_text_is_escaped(full):
    assert made_up.NASTY not in full
    assert "</script><b>not bold</b>" not in full
    assert '<script>alert("&amp;")</script>' in "".join(Outline(full).text)
    assert full.count("</script>") == full.count("<script")
    assert escape("lib/<made up>.py") in full


def test_every_character_of_the_passage_is_shown_in_order(full):
    spans = re.findall(r"<tspan x=\"[\d.]+\"[^>]*>([^<]*)</tspan>", full)
    shown = "".join(map(escape, visible([bytes([b]) for b in made_up.TEXT])))
    assert "".join(spans) == 2 * shown  # once per layer


def test_headline_says_both_models_and_both_compressors(full):
    for number in ("2.070", "2.160", "1.731", "1.842", "4.2 % lower"):
        assert number in full


def test_no_number_became_nan(full):
    drawn = re.findall(r' (?:d|x|y|x1|x2|y1|y2|width|height|cx|cy)="([^"]*)"', full)
    assert not [value for value in drawn if "nan" in value or "inf" in value]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"results": Results()}, "no held-out result"),
        ({"sample": None}, "before it generated a sample"),
        ({"levels": []}, "lists no levels"),
        ({"twin": False, "results": Results(Evaluation(2.0, 10, 10, [2.0] * 8), 1.9, 2.1)}, "No rate-0 twin"),
        ({"steps": 0}, "nothing was logged"),
        ({"steps": 1}, "Learning"),
        (
            {"results": Results(Evaluation(2.0, 10, 10, [2.0, 2.0]), 1.9, 2.1, Evaluation(2.0, 10, 10, [2.0]))},
            "too short",
        ),
        ({"commit": "abc1234"}, "abc1234"),
    ],
)
def test_a_missing_part_says_why(tmp_path, changes: dict, said: str):
    html = page(report(tmp_path, made_up.traced(), **changes))
    Outline(html)
    assert said in html


def test_without_a_checkpoint_the_passage_is_absent(tmp_path):
    html = page(report(tmp_path))
    Outline(html)
    assert "holds no checkpoint" in html


def test_without_memories_their_curves_are_absent(tmp_path):
    html = page(report(tmp_path, made_up.traced(memories=False)))
    Outline(html)
    assert "no self-modifying memories" in html
    assert "no fast weights" in html


def test_many_layers_show_some(tmp_path):
    html = page(report(tmp_path, made_up.traced(layers=9)))
    assert "6 of 9 layers are shown" in html


@pytest.mark.parametrize("text", [b"ab", b"\xff" * 200, "漢字かな🙂é".encode() * 20, b"\x00\x1c\r\n\t" * 30])
def test_any_bytes_can_be_a_passage(tmp_path, text: bytes):
    Outline(page(report(tmp_path, made_up.traced(text))))


def test_flat_and_infinite_signals_are_drawn(tmp_path):
    shown = made_up.traced()
    for signal in shown.signals:
        signal.surprise[:] = 1.0
    shown.signals[0].surprise[3] = np.inf
    html = page(report(tmp_path, shown))
    assert "nan" not in "".join(re.findall(r' d="([^"]*)"', html))


def test_bytes_of_one_character_appear_with_its_last_byte():
    assert visible([b"\xc3", b"\xa9", b" ", b"\n\t", b"\x1c", b"\xff", b"a"]) == ["‥", "é", "·", "↵⇥", "¶", "�", "a"]


def test_tokens_are_never_split_and_rows_never_too_long():
    texts = ["x" * n for n in (1, 5, 88, 3, 200, 2)] + ["漢"] * 50
    starts, widths = score.layout(texts)
    assert widths[:6] == [1, 5, 88, 3, score.COLUMNS, 2]
    assert set(widths[6:]) == {2}
    assert all(column + width <= score.COLUMNS for (_, column), width in zip(starts, widths, strict=True))
    assert [row for row, _ in starts] == sorted(row for row, _ in starts)


def test_loss_of_the_first_token_is_unknown_and_the_rest_are_bits():
    read = passage([b"a", b"b", b"c"], torch.log(torch.tensor([2.0, 8.0])), [])
    np.testing.assert_allclose(read.loss, [np.nan, 1.0, 3.0], rtol=1e-6)


def test_the_newest_whole_checkpoint_counts(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for name in ("checkpoint-00000999", "checkpoint-00100000", "checkpoint-00200000.partial", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-00100000"


@pytest.mark.parametrize("mixer", ["self_modifying", "attention", "gated_delta"])
def test_a_model_reads_the_passage(tmp_path, mixer: str):
    torch.manual_seed(0)
    model = HopeForCausalLM(HopeConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=48, mixer=mixer))
    checkpoint = tmp_path / "checkpoint-00004096"
    model.save_pretrained(checkpoint)
    ByteTokenizer().save(checkpoint)
    made_up.write_run(tmp_path, steps=3)
    path = write_report(tmp_path)
    html = path.read_text()
    Outline(html)
    assert path == tmp_path / "report.html"
    assert "<h4>layer 1</h4>" in html
    assert ("rate η" in html) is (mixer == "self_modifying")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"run\.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
