"""The comparisons of benchmarks/ have the variants that they say, resume, and write what they promise."""

import json
import os
from pathlib import Path

import pytest

from benchmarks.quality import ablation, language_model
from benchmarks.speed import scaling
from nestlearn.compare.contenders import configured
from nestlearn.models.hf import HopeConfig
from nestlearn.train.config import TrainConfig
from tests.compare.small import Pretended, in_process

DATA = Path(os.environ.get("NESTLEARN_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))


def memory(name):
    base = TrainConfig(name="base", model={"hidden_size": 32, "num_attention_heads": 2})
    model = configured(ablation.VARIANTS[name], base).model
    return HopeConfig(intermediate_size=12, **model)


def test_a_variant_of_the_ablation_differs_from_hope_in_what_it_says():
    hope = memory("HOPE")
    assert (hope.memory["chunk"], hope.memory["momentum"], len(hope.levels)) == (64, 0.0, 3)
    changed = {
        name: {k: v for k, v in memory(name).memory.items() if v != hope.memory[k] and k != "memory_chunk"}
        for name in ablation.VARIANTS
    }
    assert changed == {
        "HOPE": {},
        "no DGD": {"dgd": False},
        "momentum 0.9": {"momentum": 0.9},
        "truncated at 1 chunk": {"truncate": 1},
        "no retention": {"retention": False},
        "no CMS": {},
        "static k": {"adaptive": ["v", "eta", "alpha"]},
        "static v": {"adaptive": ["k", "eta", "alpha"]},
        "static k, v, η, α": {"adaptive": []},
        "adaptive q": {"adaptive": ["k", "v", "eta", "alpha", "q"]},
        "chunk 1": {"chunk": 1},
        "chunk 16": {"chunk": 16},
        "chunk 256": {"chunk": 256},
        "read after the write": {"read": "after"},
        "target norm none": {"target_norm": "none"},
    }
    assert len(memory("no CMS").levels) == 1


def test_the_ablation_pairs_seeds(tmp_path, monkeypatch, capsys):
    """No training: units are made up. HOPE's seeds lie far apart, the variant is 0.1 above it in each."""
    novels = tmp_path / "books_eltec_eng"
    novels.mkdir()
    for name in ("train", "val"):
        rows = "".join(json.dumps({"text": f"{name} {n} of the novel. " * 20}) + "\n" for n in range(2))
        (novels / f"eltec_eng_{name}.jsonl").write_text(rows)
    monkeypatch.setattr(ablation, "about", dict)
    bits = Pretended(lambda model, c: 2 + c["seed"] + (0.1 if "dgd" in model else 0))
    run = ablation.run_comparison
    monkeypatch.setattr(ablation, "run_comparison", lambda plan, out, say: run(plan, out, say, bits))
    monkeypatch.setattr(ablation, "TEXTS", tuple(path.name for path in sorted(novels.iterdir())))
    words = ["--tokens", "1k", "--params", "100k", "--only", "no DGD", "--seeds", "2", "--data", str(tmp_path)]
    ablation.main([*words, "--out", str(tmp_path / "out"), "--set", "model.memory.hidden_width=8"])
    assert "| no DGD | 2.6000 ± 0.7071 | +0.1000 ± 0.0000 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/ablation.json").read_text())["variants"]["no DGD"] == "hope:memory.dgd=false"


def test_scaling_measures_and_goes_on(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    units = []

    def counted(module, folder):
        units.append(folder.name)
        return in_process(module, folder)

    words = ["--models", "transformer", "retnet", "--params", "60k", "--lengths", "16", "32", "--rounds", "2"]
    words += ["--steps", "1", "--tokens-per-step", "64", "--out", str(tmp_path / "out")]
    scaling.main(words, counted)
    result = json.loads((tmp_path / "out/scaling.json").read_text())
    assert len(units) == 8 and (tmp_path / "out/scaling.png").stat().st_size > 1000
    assert all(p["tokens_per_second"] > 0 for points in result["models"].values() for p in points.values())
    scaling.main(words, counted)
    assert len(units) == 8
    assert "speed over transformer" in capsys.readouterr().out


def test_what_does_not_fit_is_said_and_not_tried_at_greater_lengths(tmp_path, capsys):
    tried = []

    def launch(module, folder):
        tried.append(f"{folder.parent.name} {folder.name}")
        if "retnet" in str(folder) and "-32-" in folder.name:
            (folder / "result.json").write_text(json.dumps({"failed": "needs more than 1 GiB"}))
            return 0
        return Pretended(None)("speed_unit", folder)

    words = ["--models", "transformer", "retnet", "--params", "60k", "--lengths", "16", "32", "64", "--rounds", "2"]
    args = scaling.arguments([*words, "--out", str(tmp_path)])
    found = scaling.measured(args, launch)
    assert found["retnet"][32] == found["retnet"][64] == {"failed": "needs more than 1 GiB"}
    assert found["transformer"][64]["rounds"] == 2
    assert [unit for unit in tried if "retnet" in unit] == [
        "retnet length-16-round-1", "retnet length-16-round-2", "retnet length-32-round-1"
    ]  # fmt: skip
    assert "| retnet | 100, 0.00 GiB | needs more" in scaling.table(found, args.lengths)


def test_a_process_above_its_limit_is_stopped(tmp_path):
    (tmp_path / "unit.json").write_text("{}")
    assert scaling.limited(1e-6, 60)("nestlearn.compare.speed_unit", tmp_path) == 0
    assert json.loads((tmp_path / "result.json").read_text()) == {"failed": "needs more than 1e-06 GiB"}


@pytest.mark.skipif(not (DATA / "books_eltec_eng").is_dir(), reason="no novels here: set NESTLEARN_DATA")
def test_the_language_model_command_is_read_and_its_text_is_there():
    words = language_model.words(language_model.arguments(["--tokens", "1k", "--out", "x", "--data", str(DATA)]))
    paths = [word for word in words if word.endswith(".xz")]
    assert len(paths) == 2 and all(Path(path).is_file() for path in paths)
    assert words[0] == "compare" and "held_out_per_document=20_000" in words


def test_results_are_drawn(tmp_path):
    def model(name, *bits):
        windows, frozen, learning = ({"mean": value} for value in bits)
        return {"model": name, "bits_per_byte": windows, "stream": {"frozen": frozen, "learning": learning}}

    results = {"models": [model("titans:levels=[1]", 2.2, 2.4, None), model("hope", 2.1, 2.1, 2.0)]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    language_model.draw(tmp_path / "results.json", tmp_path / "novels.png")
    assert (tmp_path / "novels.png").read_bytes().startswith(b"\x89PNG")
