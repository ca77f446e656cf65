"""Local files become the hub's rows; the harness runs its own prompts over them."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import torch

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data.tokens import ByteTokenizer
from nestlearn.errors import UserError
from nestlearn.eval import local_data, reading
from nestlearn.eval.harness import HarnessModel, OwnCodec
from nestlearn.eval.tasks import Choice, check_names, paper_row, run_tasks, summary, write_results

DATA = Path(os.environ.get("NESTLEARN_DATA", Path(__file__).parents[2] / "../shared/data"))
PIQA = {"id": 0, "goal": "Open a door", "sol1": "push it", "sol2": "eat it", "label": 0}
SWAG = {
    "id": 0,
    "query": "Roof: A man sits. on Mr. Hill's roof. he sees: a",
    "endings": ["b.", "c.", "d.", "e."],
    "label": 2,
}
WIKI = "\n = One = \n \n Text of one . \n \n = = Part = = \n \n More . \n = Two = \n \n Text of two . \n"


def model(batch_size: int = 8) -> HarnessModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = HopeConfig(vocab_size=256, levels=[1], memory={"chunk": 32}, initializer_range=0.3, **sizes)
    return HarnessModel(HopeForCausalLM(config), OwnCodec(ByteTokenizer()), batch_size, progress=False)


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def converted(name: str, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return list(local_data.SOURCES[name].convert(text))


def test_rows_get_the_fields_of_the_hub():
    assert converted("lambada_openai", {"context": "a b,", "target": "c"}) == [{"text": "a b, c"}]
    assert converted("boolq", {"question": "is it?", "label": 1, "passage": "p"})[0]["question"] == "is it"
    assert [row["answer"] for row in converted("winogrande", {"label": 0}, {"label": 1})] == ["1", "2"]
    (arc,) = converted("arc_easy", {"id": 3, "question": "q", "choices": ["x", "y", "z"], "label": 1})
    assert arc["choices"] == {"text": ["x", "y", "z"], "label": ["A", "B", "C"]} and arc["answerKey"] == "B"


def test_hellaswag_gets_the_harness_s_prompt():
    datasets = pytest.importorskip("datasets")
    from lm_eval.tasks.hellaswag.utils import process_docs

    whole = {**SWAG, "query": "Bake: How to bake. First, heat the oven."}
    first, second = process_docs(datasets.Dataset.from_list(converted("hellaswag", SWAG, whole)))
    assert first["query"] == "Roof: A man sits. on Mr. Hill's roof. He sees: a"
    assert (first["choices"], first["gold"]) == (SWAG["endings"], 2)
    assert second["query"] == "Bake: How to bake. First, heat the oven."


def test_wikitext_is_cut_at_headings_of_the_first_level():
    one, two = (row["page"] for row in local_data.wikitext_pages(WIKI))
    assert one.startswith(" = One = \n") and "Part" in one and two.startswith(" = Two = \n")
    assert "\n" + one + "\n" + two == WIKI or one + "\n" + two == WIKI.removeprefix("\n")


def test_a_missing_file_is_named_with_its_origin_before_anything_runs(tmp_path):
    write(tmp_path / "piqa/piqa_valid.jsonl", PIQA)
    said: list[str] = []
    with pytest.raises(UserError, match=r"hellaswag_val.jsonl.*is missing.*Rowan/hellaswag"):
        run_tasks(model(), Choice(("piqa", "hellaswag"), tmp_path), said.append)
    assert not said


def test_a_foreign_file_is_refused(tmp_path):
    write(tmp_path / "arc/arc_easy_test.jsonl", PIQA)
    with pytest.raises(UserError, match="not what arc_easy is made from"):
        run_tasks(model(), Choice(("arc_easy",), tmp_path), print)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(("hellasweg",)), "did you mean 'hellaswag'"),
        (Choice(("piqa", "piqa")), "only once"),
        (Choice(("piqa",), limit=0), "--limit is 0"),
        (Choice(("ruler_multikey",)), "needs lengths"),
        (Choice(("piqa",), lengths=(512,)), "leave it out"),
    ],
)
def test_what_makes_no_sense_is_refused(choice, message):
    with pytest.raises(UserError, match=message):
        check_names(choice)


def test_the_harness_runs_local_files_of_both_layouts(tmp_path):
    rows = [{**PIQA, "goal": f"Open door {n}", "label": n % 2} for n in range(4)]
    write(tmp_path / "piqa/piqa_valid.jsonl.gz", *rows)
    swag = converted("hellaswag", *({**SWAG, "query": f"Roof: Man {n}. he"} for n in range(4)))
    write(tmp_path / "Rowan/hellaswag/data/validation-00000.jsonl", *swag)
    said: list[str] = []
    results = run_tasks(model(), Choice(("piqa", "hellaswag"), tmp_path, limit=3, fewshot=1), said.append)
    assert results["n-samples"]["piqa"]["effective"] == 3 and results["n-shot"] == {"piqa": 1, "hellaswag": 1}
    assert [line.split(":")[0] for line in said] == ["piqa", "hellaswag"] and "few-shot examples are other" in said[0]
    row = dict(paper_row(results["results"]))
    assert row["piqa"] == 100 * results["results"]["piqa"]["acc,none"] and row["boolq"] is None
    assert row["avg of 2/8"] == pytest.approx((row["piqa"] + row["hella acc_n"]) / 2)
    write_results(results, tmp_path / "new/results.json")
    assert json.loads((tmp_path / "new/results.json").read_text())["results"].keys() == {"piqa", "hellaswag"}


def test_long_contexts_are_tasks_like_any_other(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"Sentence {n} says {n * n % 89}." for n in range(400)))
    choice = Choice(("ruler_single_number",), None, limit=1, lengths=(1024, 1536), text=(book,))
    results = run_tasks(model(), choice, print)["results"]["ruler_single_number"]
    assert {"1024,none", "1536,none"} <= results.keys()


def test_a_long_prompt_is_read_once_and_in_pieces(monkeypatch):
    monkeypatch.setattr(reading, "TOKENS", 1024)
    seen: list[int] = []
    call = reading.Reader._call

    def watched(self, ids, state, **kwargs):
        seen.append(ids.shape[1])
        return call(self, ids, state, **kwargs)

    monkeypatch.setattr(reading.Reader, "_call", watched)
    run_tasks(model(), Choice(("ruler_single_passkey",), limit=1, lengths=(8192,)), print)
    assert max(seen) == 1024 and 7800 < sum(seen) <= 8192


def test_recall_is_a_task_like_any_other(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"Sentence {n} says {n * n % 89}." for n in range(400)))
    choice = Choice(("mqar_4",), None, limit=2, lengths=(0, 512), text=(book,))
    results = run_tasks(model(), choice, print)["results"]["mqar_4"]
    assert all(0 <= results[f"{metric}_{n},none"] <= 1 for metric in ("acc", "exact") for n in (0, 512))
    assert {f"acc_{n},none" for n in (0,)} <= run_tasks(model(), Choice(("mqar_8",), limit=1, lengths=(0,)), print)[
        "results"
    ]["mqar_8"].keys()


def test_a_summary_is_one_line_and_its_remarks():
    metrics = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.25, "name": "x", "sample_len": 3}
    assert summary("x", metrics, ["beware"]) == "x: acc 0.5 ± 0.25\n  note: beware"


@pytest.mark.skipif(not (DATA / "hellaswag").is_dir(), reason="no data")
def test_all_local_tasks_run():
    names = [name for name in local_data.SOURCES if name not in ("social_iqa", "wikitext")]
    results = run_tasks(model(), Choice(tuple(names), DATA, limit=2), print)["results"]
    assert list(results) == names


@pytest.mark.skipif(not (DATA / "babi").is_dir(), reason="no bAbI")
def test_babilong_runs_with_the_harness_s_prompts():
    results = run_tasks(model(), Choice(("babilong_qa1",), DATA, limit=1, lengths=(0,)), print)["results"]
    assert 0 <= results["babilong_qa1_0"]["acc,none"] <= 1
