"""Checkpoints: whole or not at all, the last two, refused when damaged."""

import errno
import io
import shutil

import pytest
import torch
from safetensors import SafetensorError

from nestlearn.errors import UserError
from nestlearn.train import checkpoint as module
from nestlearn.train.checkpoint import checkpoints, find_checkpoint, is_disk_full, load_checkpoint, set_aside_later
from tests.train.tiny import STEP, assert_same_end, config, run

NAMES = [f"checkpoint-{n * STEP:08d}" for n in (4, 8, 12)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(config(folder), folder / "run")
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained / "run", tmp_path / "run")


def test_the_last_two_are_kept(trained):
    assert [path.name for path in checkpoints(trained / "run")] == NAMES[1:]
    assert find_checkpoint(trained / "run").name == NAMES[2]
    assert find_checkpoint(trained / "run" / NAMES[1]).name == NAMES[1]


def test_hugging_face_loads_one(trained):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(find_checkpoint(trained / "run"))
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 256)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "training.json", "MANIFEST.json", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_one_is_refused_by_name_and_the_previous_one_offered(copy, name, damage):
    path = copy / NAMES[2] / name
    whole = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(whole[:-7] if damage == "cut" else bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(UserError) as refusal:
        load_checkpoint(find_checkpoint(copy))
    message = str(refusal.value)
    assert message.startswith(f"checkpoint {copy / NAMES[2]} is damaged ({name} ") and "\n" not in message
    assert message.endswith(f"the one before it is whole, use {copy / NAMES[1]}")
    assert load_checkpoint(copy / NAMES[1]).progress.tokens == 8 * STEP


def test_without_a_whole_one_none_is_offered(copy):
    for name in NAMES[1:]:
        (copy / name / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match="there is no earlier one, train again"):
        load_checkpoint(find_checkpoint(copy))


def test_the_previous_one_leads_to_the_same_end(trained, copy):
    (copy / NAMES[2] / "optimizer.pt").write_bytes(b"")
    moved = set_aside_later(copy / NAMES[1])
    assert [path.name for path in moved] == [f"{NAMES[2]}.set-aside-1"]
    run(config(trained), copy, start=copy / NAMES[1])
    assert_same_end(trained / "run", copy)
    assert [path.name for path in checkpoints(copy)] == NAMES[1:] and moved[0].exists()


def test_a_folder_without_checkpoints_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        find_checkpoint(tmp_path / "nothing")


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_rust(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "owner, name, write",
    [
        (torch, "save", full_disk),
        (module, "_write_json", full_disk),
        (module, "_flush", full_disk),
        (module.Path, "mkdir", full_disk),
        (module, "_sha256", full_disk_in_rust),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_the_others_intact(trained, copy, monkeypatch, owner, name, write):
    longer = config(trained, tokens=16 * STEP)
    before = load_checkpoint(find_checkpoint(copy))
    from nestlearn.train.build import build_optimizer, load_model

    model = load_model(before.folder)
    optimizer = build_optimizer(longer, model)
    before.progress.tokens += STEP
    with monkeypatch.context() as patch, pytest.raises(UserError) as refusal:
        patch.setattr(owner, name, write)
        module.save_checkpoint(copy, model, optimizer, before.tokenizer(), longer, before.progress, "")
    message = str(refusal.value)
    assert message.startswith("the disk is full: ") and "\n" not in message
    assert NAMES[1] in message and NAMES[2] in message and f"nestlearn train --resume {copy}" in message
    assert sorted(path.name for path in copy.glob("checkpoint-*")) == NAMES[1:]
    assert load_checkpoint(copy / NAMES[1]) and load_checkpoint(copy / NAMES[2])


def test_a_full_disk_is_seen_through_wrappers():
    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            full_disk()

    try:
        torch.save({"a": torch.zeros(1000)}, Full())
    except Exception as error:
        assert is_disk_full(error)
    else:
        pytest.fail("nothing was raised")
    assert not is_disk_full(ValueError("something else"))


def test_another_error_is_passed_on_and_nothing_stays(trained, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("broken")

    monkeypatch.setattr(module, "_flush", broken)
    with pytest.raises(RuntimeError, match="broken"):
        run(config(trained), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_another_tokenizer_is_refused(trained, tmp_path):
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    inner.save(str(tmp_path / "other.json"))
    found = load_checkpoint(find_checkpoint(trained / "run"))
    assert found.tokenizer().fingerprint() == found.tokenizer("bytes").fingerprint()
    with pytest.raises(UserError, match="other.json is not the one that .* was trained with"):
        found.tokenizer(str(tmp_path / "other.json"))
