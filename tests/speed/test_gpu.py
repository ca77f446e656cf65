"""benchmarks/gpu.py runs its whole logic at a tiny size on CPU, so that it cannot rot before it meets a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]


def run(*words, **variables):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if k not in ("NESTLEARN_KERNELS", "TRITON_INTERPRET")}
    return subprocess.run(command, capture_output=True, text=True, env={**environment, **variables}, cwd=ROOT)


@pytest.mark.slow
def test_a_smoke_run_finishes_every_stage_and_goes_on_where_it_was(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "gpu.json"
    done = run("--smoke", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert set(results) == {s for s in gpu.STAGES if not s.startswith(("check-usual", "check-large"))}
    assert results["check-small-float32"]["passed"] and results["check-small-bfloat16"]["worst"] > 1e-4
    assert set(results["train-340m-2048"]["models"]) >= {"hope", "transformer"}
    assert results["train-760m-8192"]["models"]["hope"]["tokens/s"] > 0
    assert results["decode-340m"]["models"]["transformer"]["step ms at 16"] > 0
    again = run("--smoke", "--out", out, "--stage", "environment", "optimizers")
    assert again.returncode == 0 and "finished" not in again.stdout.partition("smoke run")[0]


def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", tmp_path / "gpu.json", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "there is no GPU here" in done.stderr
    assert not (tmp_path / "gpu.json").exists()


def test_kernels_are_used_and_timed_only_after_they_have_passed():
    run = gpu.Run(device=gpu.torch.device("cuda"))
    good = {name: {"passed": True} for name in gpu.CHECKS}
    assert gpu.refusal("kernel-speed", good, run) is None and gpu.implementation("train-340m-2048", good) == "triton"
    bad = good | {"check-usual-bfloat16": {"passed": False}}
    assert "check-usual-bfloat16 must pass" in str(gpu.refusal("kernel-speed", bad, run))
    assert gpu.implementation("train-340m-2048", bad) == "torch" and gpu.implementation("optimizers", bad) is None
    measured = {"train-340m-2048": {"kernels": "torch"}}
    assert gpu.finished("train-340m-2048", bad | measured) and not gpu.finished("train-340m-2048", good | measured)


def test_the_table_judges_what_was_found_and_guesses_nothing():
    assert {row[2] for row in gpu.targets({})} == {"not measured"}
    models = {
        "hope": {"tokens/s": 60, "peak GB": 14, "utilisation": 0.2},
        "transformer": {"tokens/s": 100, "peak GB": 10},
    }
    rows = {row[0]: row[2] for row in gpu.targets({"train-340m-2048": {"models": models}})}
    assert rows["training, HOPE / Transformer, 340m at 2048"] == "met"
    assert rows["peak memory, HOPE / Transformer, 340m at 2048"] == "missed"
    assert rows["utilisation, 340m at 2048"] == "missed"
    assert rows["training, HOPE / Transformer, 340m at 8192"] == "not measured"
