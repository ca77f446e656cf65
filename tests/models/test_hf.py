"""The rest of what code written for Hugging Face models expects: losses, outputs, embeddings, the Trainer."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, set_seed

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.errors import UserError
from tests.contracts.model import gap, initialised, tokens
from tests.models.test_contract import SMALL

CONFIG = {**SMALL, "memory": {"chunk": 8, "memory_chunk": 4}}


@pytest.fixture
def model():
    return initialised(HopeConfig(**CONFIG))


def test_the_loss_is_that_of_the_next_token(model):
    ids = tokens(model.config, 3, 30)
    labels = ids.clone()
    labels[0, 10:], labels[1, :4] = -100, -100
    out = model(ids, labels=labels)
    manual = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert gap(out.loss, manual) <= 1e-6
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    assert gap(summed, manual * (labels[:, 1:] != -100).sum() / 7) <= 1e-5


def test_the_loss_of_padded_rows_is_that_of_the_rows_alone(model):
    ids, lengths = tokens(model.config, 3, 30), (30, 11, 22)
    alone = [model(ids[i : i + 1, :n], labels=ids[i : i + 1, :n]).loss * (n - 1) for i, n in enumerate(lengths)]
    expected = sum(alone) / sum(n - 1 for n in lengths)
    for side in ("left", "right"):
        padded, mask, labels = torch.zeros_like(ids), torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, n in enumerate(lengths):
            place = slice(30 - n, 30) if side == "left" else slice(0, n)
            padded[i, place], mask[i, place], labels[i, place] = ids[i, :n], 1, ids[i, :n]
        assert gap(model(padded, attention_mask=mask, labels=labels).loss, expected) <= 1e-6
        assert gap(model(padded, attention_mask=mask, labels=labels, use_cache=True).loss, expected) <= 1e-6


def test_a_padded_training_batch_runs_in_one_piece(model, monkeypatch):
    """Right padding costs nothing where no cache is wanted."""
    calls = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda x, *a, **k: calls.append(x.shape) or forward(x, *a, **k))
    ids = tokens(model.config, 3, 20)
    mask = torch.arange(20)[None] < torch.tensor([[20], [9], [3]])
    out = model(ids, attention_mask=mask, labels=ids)
    assert calls == [(3, 20, 32)] and out.past_key_values is None


def test_masks_that_no_stream_can_follow_are_refused(model):
    ids = tokens(model.config, 2, 10)
    hole, empty = torch.ones_like(ids), torch.ones_like(ids)
    hole[1, 4], empty[0] = 0, 0
    for mask, message in ((hole, "1 zeros among its columns"), (empty, "only zeros"), (hole[:, :5], "columns")):
        with pytest.raises(UserError, match=message):
            model(ids, attention_mask=mask, use_cache=True)


def test_a_row_without_new_tokens_keeps_its_state(model):
    ids = tokens(model.config, 2, 20)
    with torch.no_grad():
        start = model(ids[:, :10]).past_key_values
        mask = torch.ones_like(ids)
        mask[0, 10:] = 0
        cache = model(ids[:, 10:], past_key_values=start, attention_mask=mask).past_key_values
    assert all(torch.equal(a[0], b[0]) for a, b in zip(start.state.tensors(), cache.state.tensors(), strict=True))
    assert cache.get_seq_length() == 20


def test_outputs(model):
    ids = tokens(model.config, 2, 12)
    out = model(ids, labels=ids, output_hidden_states=True)
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert torch.equal(as_tuple[0], out.loss) and torch.equal(as_tuple[1], out.logits)
    hidden = out.hidden_states
    assert len(hidden) == 3 and torch.equal(hidden[0], model.embedding(ids))
    assert torch.equal(model.lm_head(hidden[-1]), out.logits)
    assert torch.equal(model(inputs_embeds=model.embedding(ids)).logits, out.logits)
    for keep in (1, 5, torch.tensor([3, 7])):
        expected = out.logits[:, -keep:] if isinstance(keep, int) else out.logits[:, keep]
        assert gap(model(ids, logits_to_keep=keep).logits, expected) <= 1e-6
    assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "output_attentions": True}, "output_attentions"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "position_ids": torch.ones(1, 3)}, "position_ids"),
    ],
)
def test_what_it_cannot_do_is_refused(model, given, message):
    with pytest.raises(UserError, match=message):
        model(**given)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_may_be_resized(tied, tmp_path):
    model = initialised(HopeConfig(**{**CONFIG, "tie_word_embeddings": tied}))
    ids = tokens(model.config, 2, 12)
    before = model(ids).logits
    model.resize_token_embeddings(70)
    out = model(torch.full_like(ids, 69), labels=ids)
    assert out.logits.shape[-1] == 70 and model.config.vocab_size == 70 and out.loss.isfinite()
    assert torch.equal(model(ids).logits[..., :61], before)
    assert (model.lm_head.weight is model.embedding.weight) == tied
    model.save_pretrained(tmp_path)
    assert torch.equal(HopeForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


class Sentences(torch.utils.data.Dataset):
    """Sixteen rows of counting, each from another start."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = (torch.arange(24) + i) % 61
        return {"input_ids": ids, "labels": ids}


def train(folder, steps, resume=None, **settings):
    set_seed(0)
    model = HopeForCausalLM(HopeConfig(**CONFIG))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    arguments.max_steps = steps
    trainer = Trainer(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trains_saves_and_resumes_in_the_trainer(tmp_path):
    whole = train(tmp_path / "whole", 8)
    assert losses(whole)[-1] < 0.9 * losses(whole)[0]
    assert whole.evaluate()["eval_loss"] < losses(whole)[0]
    train(tmp_path / "half", 4)
    resumed = train(tmp_path / "half", 8, resume=str(tmp_path / "half" / "checkpoint-4"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


@pytest.mark.parametrize("how", [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2, "bf16": True}])
def test_trains_in_the_trainers_other_ways(tmp_path, how):
    trainer = train(tmp_path, 3, **how)
    assert losses(trainer)[-1] < losses(trainer)[0]
