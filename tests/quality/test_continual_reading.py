"""benchmarks/quality/continual_reading.py from two small runs to a table, on made-up text."""

import json
import lzma

import numpy as np
import pytest

from benchmarks.quality import continual_reading as script
from nestlearn.cli import main as nestlearn

SMALL = ["compare_rate_zero=false", "held_out_tokens=500", "sample_tokens=1", "sequence_length=32", "batch_size=2",
         "model.hidden_size=16", "model.intermediate_size=24"]  # fmt: skip
LEVELS = 'model.levels=[{"name":"fast","period":64},{"name":"slow","period":256}]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading")
    (folder / "text.txt").write_text("A line of text that says nothing.\n" * 400)
    for name, more in (("hope", [LEVELS]), ("transformer", ["model.mixer=transformer", "model.levels=[1]"])):
        words = ["train", "--text", str(folder / "text.txt"), "--tokens", "300", "--out", str(folder / name)]
        assert nestlearn([*words, "--set", *SMALL, *more]) == 0
    novels = "\n".join(
        json.dumps({"id": name, "text": f"{name} wrote of rain and of trains. " * 900})
        for name in (script.TUNING, *script.NOVELS)
    )
    texts = {
        "books_eltec_eng/eltec_eng_val.jsonl.xz": novels,
        "wikitext2/wikitext2_valid.txt.xz": "= A river = It flows. " * 900,
        "tinyshakespeare/tinyshakespeare.txt.xz": "ROMEO: Soft! What light? " * 900,
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(lzma.compress(text.encode()))
    return folder


def run(folder, benchmark, *more, runs=("hope",)):
    words = [benchmark, *(str(folder / name) for name in runs), "--out", str(folder / f"{benchmark}.json")]
    words += ["--data", str(folder), "--rates", "0.3", "--bytes", "512", "--asked", "64", "--tune-bytes", "128"]
    return script.measure(script.arguments([*words, *more]))


def test_domains_frozen_adapted_and_gone_on_with(folder, capsys):
    found = run(folder, "domains", "--periods", "32", runs=("hope", "transformer"))
    names = ["frozen", "levels-1 32", "levels-2 32", "online 32"]
    assert list(found["results"]) == [f"hope {n}" for n in names] + [f"transformer {names[i]}" for i in (0, 1, 3)]
    for name, result in found["results"].items():
        measured = np.array(result["bits_per_byte"])
        assert result["processor_ms_per_byte"] > 0 and result["parameters"] > 1_000
        assert measured.shape == (6, 5) and (np.ptp(measured, axis=0) == 0).all() == ("frozen" in name)
        gains = script.gains(found["results"][name.split()[0] + " frozen"], result)
        assert all(len(g) == script.WINDOWS for g in gains["gain_by_position"])
        assert (max(gains["gain_second_half"][1:4]) > 0.01) == ("frozen" not in name), name
    capsys.readouterr()
    again = run(folder, "domains", "--periods", "32", runs=("hope", "transformer"))
    assert again == found and capsys.readouterr().out == ""
    assert script.table(found).count("\n") == 6


def test_a_bound_keeps_the_first_domain(folder):
    free, bound = "levels-2 32", "levels-2 32 bound=0.001 retention=0.9"
    found = run(folder, "domains", "--kinds", "frozen", free, bound)["results"]
    kept = {kind: abs(np.array(found[f"hope {kind}"]["first_against_before"])).max() for kind in (free, bound)}
    assert 0 < kept[bound] < 0.2 * kept[free]
    assert found["hope frozen"]["first_against_before"] == [0.0] * 5


def test_recall_keeps_the_first_domain_and_own_levels_learn(folder):
    free, kept = "levels-2 32", "levels-2 32 recall=marks"
    found = run(folder, "domains", "--kinds", "frozen", free, kept, "own", "--out", str(folder / "recall.json"))
    lost = {kind: max(found["results"][f"hope {kind}"]["forgotten"]) for kind in (free, kept)}
    assert lost[kept] < 0.5 * lost[free] and lost[free] > 0.01, lost
    results = script.short(found)["results"]
    assert "curves" not in results[f"hope {free}"]
    assert results[f"hope {kept}"]["gain_second_half"] == results[f"hope {free}"]["gain_second_half"]
    assert results["hope own"]["rate"] is None and max(results["hope own"]["gain_second_half"]) > 0


def test_facts_for_every_lowest_period(folder):
    found = run(folder, "facts", "--people", "4", "--choices", "2", "--periods", "64", "4096")["results"]
    assert list(found) == [f"hope {n}" for n in ("frozen", "levels-1 64", "levels-2 64", "levels-1 4096",
                                                 "levels-2 4096", "online 64")]  # fmt: skip
    frozen = found["hope frozen"]["recall"]
    assert frozen["before"] == frozen["after"] == frozen["later"]
    assert found["hope levels-1 4096"]["recall"]["after"] == frozen["after"]  # its period has not come yet


def test_languages(folder):
    more = ("--people", "4", "--choices", "2", "--sentences", "10", "--kinds", "frozen", "levels-2 32")
    found = run(folder, "languages", *more)["results"]
    frozen, adapted = found["hope frozen"], found["hope levels-2 32"]
    assert frozen["accuracies"] == [frozen["before"]] * 2 and np.shape(adapted["accuracies"]) == (2, 2)


def test_what_was_read_is_written_in_every_way(folder):
    ways = run(folder, "written", "--periods", "64")["results"]["hope levels-2 64"]["consolidated"]
    assert set(ways) == {"average", "replay", "distill", "replay and rehearsal", "distill and rehearsal"}
    assert all(way["new"] < way["base"] and way["moved"] > 0 and way["kept_new"] is not None for way in ways.values())
