"""The commands, run in-process on a tiny model; bad input is one line, exit code 2, and nothing lost."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nestlearn.train.loop
from nestlearn import __version__
from nestlearn.cli import main
from tests.train.tiny import STEP, assert_same_end, write_text

MODEL = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=2"]
MODEL += ["model.intermediate_size=24", f"model.levels=[{STEP}, {3 * STEP}, {5 * STEP}]", 'model.memory={"chunk": 8}']
SETTINGS = [*MODEL, "batch_size=2", "sequence_length=16", f"log_every={STEP}", f"checkpoint_every={2 * STEP}"]
SETTINGS += ["held_out_tokens=256", "sample_tokens=8"]
TOKENS = str(6 * STEP)


def train_words(
    folder: Path, *more: str, out: str = "run", tokens: str = TOKENS, settings: tuple[str, ...] = ()
) -> list[str]:
    text = str(write_text(folder / "text"))
    return [
        "train",
        "--text",
        text,
        "--tokens",
        tokens,
        "--out",
        str(folder / out),
        *more,
        "--set",
        *SETTINGS,
        *settings,
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with its rate-0 twin and report; reading tests share it."""
    folder = tmp_path_factory.mktemp("cli")
    assert main(train_words(folder)) == 0
    return folder


def refused(capsys, words: list[str]) -> str:
    """The one line that ``words`` are refused with."""
    capsys.readouterr()
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("nestlearn: ") and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    return printed.err


# --- what works


def test_train_makes_a_run_with_its_twin_and_report(trained):
    run = trained / "run"
    names = {path.name for path in run.iterdir()}
    assert names == {
        "checkpoint-00000128",
        "checkpoint-00000192",
        "metrics.jsonl",
        "run.json",
        "report.html",
        "rate-zero",
    }
    assert (run / "rate-zero" / "metrics.jsonl").read_text().count("\n") == 6


def test_train_says_what_it_read_and_what_came_out(tmp_path, capsys):
    assert main(train_words(tmp_path, settings=("compare_rate_zero=false",))) == 0
    printed = capsys.readouterr().out
    for pattern in (
        r"train: 1 document, [\d,]+ bytes, sha256 [0-9a-f]{64}",
        r"held out: [\d.]+ bits per byte of .*xz -9: .*bz2 -9: ",
        r"sample, after the prompt",
        r"checkpoint: .*checkpoint-00000192",
        r"report: .*report.html",
    ):
        assert re.search(pattern, printed), pattern
    assert "without adaptation" not in printed


def test_eval_measures_what_was_held_out_or_a_given_text(trained, capsys):
    assert main(["eval", str(trained / "run")]) == 0
    held_out = capsys.readouterr().out
    assert re.search(r"[\d.]+ bits per byte of 256 bytes", held_out) and "xz -9" in held_out
    assert main(["eval", str(trained / "run"), "--text", str(trained / "text"), "--tokens", "100"]) == 0
    assert "of 100 bytes, 100 tokens" in capsys.readouterr().out


def test_eval_runs_tasks_on_local_files(trained, capsys):
    pytest.importorskip("lm_eval")
    (trained / "data/piqa").mkdir(parents=True)
    rows = [{"goal": f"Open door {n}", "sol1": "push", "sol2": "eat it", "label": n % 2} for n in range(3)]
    (trained / "data/piqa/piqa_valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", str(trained / "run"), "--tasks", "piqa", "--data", str(trained / "data"), "--limit", "2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "piqa: acc " in printed and "hella acc_n" in printed
    results = json.loads((trained / "run/tasks-checkpoint-00000192.json").read_text())
    assert results["n-samples"]["piqa"] == {"original": 3, "effective": 2}
    for more, message in (
        (["--limit", "2"], "--limit 2 is given without --tasks"),
        (["--tasks", "piqa", "--data", str(trained / "none")], "is not a folder"),
        (["--tasks", "boolq", "--data", str(trained / "data")], "boolq_validation.jsonl"),
        (["--tasks", "pika"], "did you mean 'piqa'?"),
        (["--tasks", "piqa", "--tokens", "5"], "--tokens 5 together with --tasks"),
    ):
        assert message in refused(capsys, ["eval", str(trained / "run"), *more])


def test_generate_is_a_function_of_its_seed(trained, capsys):
    def text(*more):
        assert main(["generate", str(trained / "run"), "--prompt", "a line", "--tokens", "20", *more]) == 0
        return capsys.readouterr().out

    assert text().startswith("a line") and text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    assert text("--temperature", "0") == text("--temperature", "0", "--seed", "5")


@pytest.mark.parametrize("what", ["tiny-cpu", "hope-340m", "run"])
def test_levels_lists_model_and_optimizer(trained, capsys, what):
    assert main(["levels", str(trained / "run") if what == "run" else what]) == 0
    printed = capsys.readouterr().out
    assert "parameters" in printed and "AdamW / second moment" in printed and "CMS" in printed


def test_report_writes_the_page_again(trained, capsys):
    (trained / "run" / "report.html").unlink()
    assert main(["report", str(trained / "run")]) == 0
    assert Path(capsys.readouterr().out.strip()).stat().st_size > 1000


def test_version_and_help_are_fast(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"nestlearn {__version__}\n"
    code = "import sys; from nestlearn.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "generate" in done.stdout, done.stderr


# --- stopped and resumed


def stop_in_step(monkeypatch, number):
    step, count = nestlearn.train.loop.train_step, iter(range(1, 10**6))

    def counted(*args):
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(nestlearn.train.loop, "train_step", counted)


@pytest.mark.parametrize("step", [3, 9])  # of the run, and of its twin, which starts after step 6
def test_ctrl_c_says_how_to_go_on_and_the_end_is_the_same(trained, tmp_path, capsys, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_in_step(patch, step)
        message = refused(capsys, train_words(tmp_path))
    assert "stopped at 96 of 192 tokens and saved checkpoint-00000096: " in message
    assert message.endswith(f"go on with nestlearn train --resume {tmp_path / 'run'}\n")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert_same_end(trained / "run", tmp_path / "run")
    assert_same_end(trained / "run" / "rate-zero", tmp_path / "run" / "rate-zero")


def test_a_real_ctrl_c_exits_with_2_and_one_line(tmp_path):
    words = train_words(tmp_path, tokens="100M", settings=("compare_rate_zero=false", "checkpoint_every=1G"))
    process = subprocess.Popen([sys.executable, "-m", "nestlearn.cli", *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and "go on with nestlearn train --resume" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr


def test_a_finished_run_can_be_trained_longer(trained, tmp_path, capsys):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    assert main(["train", "--resume", str(run), "--tokens", str(8 * STEP), "--set", "compare_rate_zero=false"]) == 0
    assert "checkpoint: " + str(run / "checkpoint-00000256") in capsys.readouterr().out


def test_a_resumed_run_changes_nothing_else(trained, tmp_path, capsys):
    run = str(trained / "run")
    for words, message in (
        (["--seed", "1"], "--seed 1 together with --resume"),
        (["--preset", "tiny-cpu"], "--preset tiny-cpu together with --resume"),
        (["--out", str(tmp_path / "new")], "together with --resume"),
        (["--set", "model.hidden_size=32"], "a resumed run keeps its model"),
        (["--set", "batch_size=3"], "a resumed run keeps its batch_size"),
        (["--tokenizer", str(tokenizer_file(tmp_path))], "is not the one that"),
        (["--text", str(another_text(tmp_path))], "the text is not the one that"),
    ):
        assert message in refused(capsys, ["train", "--resume", run, *words])
    assert not (tmp_path / "new").exists()


def tokenizer_file(folder: Path) -> Path:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")).save(str(folder / "other.json"))
    return folder / "other.json"


def another_text(folder: Path) -> Path:
    (folder / "another.txt").write_text("quite another text, " * 50)
    return folder / "another.txt"


# --- bad input


@pytest.mark.parametrize(
    "words, message",
    [
        (["--preset", "tiny-cp"], "unknown preset 'tiny-cp' (did you mean 'tiny-cpu'?)"),
        (["--set", "lerning_rate=1"], "unknown key 'lerning_rate' (did you mean 'learning_rate'?)"),
        (["--set", "model.hiden_size=64"], "unknown key 'model.hiden_size' (did you mean 'hidden_size'?)"),
        (["--set", "model.memory.rate_mx=1"], "memory has the unknown key 'rate_mx' (did you mean 'rate_max'?)"),
        (
            ["--set", "model.memory.memory_chunk=7"],
            "chunk is 64 and memory_chunk 7: chunk must be a multiple of memory_chunk",
        ),
        (["--set", "model.hidden_size=31"], "hidden_size must be divisible by num_attention_heads"),
        (["--set", "model.hidden_size=wide"], "model.hidden_size is 'wide': must be a whole number"),
        (["--set", "model.levels=[64, 32]"], "order them from the fastest"),
        (["--set", 'model.levels=["often"]'], "level period is 'often'"),
        (["--set", "model.vocab_size=4"], "the tokenizer has 256 tokens"),
        (["--tokens", "many"], "'many' is not a number of tokens"),
        (["--seed", "-1"], "seed is -1: must be"),
        (["--tokenizer", "nothing.json"], "nothing.json"),
        (["--text", "nothing.txt"], "nothing.txt"),
        (["--resume", "nothing"], "nothing is not a folder"),
        (["--tokens", "1k", "--tokens", "2k"], "--tokens is given twice"),
    ],
)
def test_bad_training_input(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, ["train", *words])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.txt", b"", "empty.txt"),
        ("short.txt", b"too short", "less than one sequence of 512"),
        ("rows.jsonl", b"{not json", "rows.jsonl"),
        ("zipped.txt.gz", b"no gzip at all", "zipped.txt.gz"),
        ("table.parquet", b"no parquet at all", "table.parquet"),
        ("picture.png", b"\x89PNG", "picture.png"),
    ],
)
def test_bad_text(name, content, message, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    words = ["train", "--text", str(tmp_path / name), "--out", str(tmp_path / "run")]
    assert message in refused(capsys, words)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_with_files_is_never_overwritten(trained, capsys):
    before = sorted((path, path.stat().st_mtime_ns) for path in (trained / "run").rglob("*"))
    message = refused(capsys, train_words(trained))
    assert "exists and is not an empty folder: name a new one, or go on with --resume" in message
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (trained / "run").rglob("*"))


def test_a_damaged_checkpoint_is_refused_and_the_previous_one_works(trained, tmp_path, capsys):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    (run / "checkpoint-00000192" / "model.safetensors").write_bytes(b"damaged")
    for words in (["eval", str(run)], ["train", "--resume", str(run)], ["generate", str(run), "--prompt", "a"]):
        message = refused(capsys, words)
        assert f"checkpoint {run / 'checkpoint-00000192'} is damaged" in message
        assert f"use {run / 'checkpoint-00000128'}" in message
    assert main(["train", "--resume", str(run / "checkpoint-00000128")]) == 0
    assert_same_end(trained / "run", run)


def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_stays(tmp_path, capsys, monkeypatch):
    import torch

    save = torch.save

    def full(*args):
        if (tmp_path / "run" / "checkpoint-00000064").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*args)

    monkeypatch.setattr(torch, "save", full)
    message = refused(capsys, train_words(tmp_path))
    assert "the disk is full" in message and "intact are checkpoint-00000064" in message
    monkeypatch.setattr(torch, "save", save)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["eval", "nothing"], "nothing is not a folder"),
        (["levels", "tiny-cup"], "unknown preset 'tiny-cup' (did you mean 'tiny-cpu'?)"),
        (["report", "nothing"], "nothing"),
        (["generate", "nothing", "--prompt", "a"], "nothing is not a folder"),
    ],
)
def test_bad_input_to_the_other_commands(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, words)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--top-k", "-1"], "top_k is -1"),
        (["--prompt", "a", "--tokens", "0"], "tokens is 0"),
    ],
)
def test_bad_generation_settings(trained, words, message, capsys):
    assert message in refused(capsys, ["generate", str(trained / "run"), *words])


def test_another_tokenizer_for_a_checkpoint(trained, tmp_path, capsys):
    other = str(tokenizer_file(tmp_path))
    for words in (["eval", str(trained / "run")], ["generate", str(trained / "run"), "--prompt", "a"]):
        assert "other.json is not the one that" in refused(capsys, [*words, "--tokenizer", other])


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--lerning-rate", "1"], "Unrecognized options: --lerning-rate"),
        (["train", "--tokns", "1k"], "(did you mean '--tokens'?): see nestlearn train --help"),
        (["trian"], "(did you mean 'train'?)"),
        (["train", "--seed", "x"], "Error parsing --seed"),
        (["generate", "run"], "Missing from nestlearn generate: --prompt"),
        (["eval"], "Missing from nestlearn eval"),
    ],
)
def test_an_unknown_or_missing_word_is_one_line_too(words, message, capsys):
    assert message in refused(capsys, words)


def test_doctor_checks_every_implementation(capsys, monkeypatch):
    monkeypatch.delenv("NESTLEARN_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "inner loop here: " in out and "limits of triton: " in out
    checks = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert set(checks) == {"reference", "torch", "native", "triton"}
    assert "ok: " in checks["native"] or "not available: no C++ compiler" in checks["native"]
    assert "ok: " in checks["reference"] and "ok: " in checks["torch"]
    assert "ok: " in checks["triton"] or "not available: " in checks["triton"]
    assert "NESTLEARN_KERNELS" not in os.environ
