"""Leveled in ``transformers.Trainer(optimizers=...)``: trains, saves in the middle of a chunk, resumes exactly."""

from functools import partial

import pytest
import torch
from transformers import Trainer, TrainingArguments, set_seed

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.optim import M3, DeltaMomentum, Leveled, parameter_groups

TOKENS = 4 * 24
OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-2),
    "M3": partial(M3, lr=1e-2, slow_period=3),
    "DeltaMomentum": partial(DeltaMomentum, lr=1e-2),
}


class Sentences(torch.utils.data.Dataset):
    """Sixteen rows of counting, each from another start."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = (torch.arange(24) + i) % 31
        return {"input_ids": ids, "labels": ids}


def make(name):
    set_seed(0)
    levels = [("fast", TOKENS), ("slow", 3 * TOKENS)]
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32}
    model = HopeForCausalLM(HopeConfig(vocab_size=31, mixer="attention", levels=levels, **shape))
    optimizer = Leveled(OPTIMIZERS[name], parameter_groups(model, lr=1e-2), tokens_per_step=TOKENS)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 4))


def train(name, folder, steps, resume=None):
    model, optimizer, scheduler = make(name)
    arguments = TrainingArguments(output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=4,
                                  logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Sentences(), optimizers=(optimizer, scheduler))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_saves_in_the_middle_of_a_chunk_and_resumes_bit_for_bit(name, tmp_path):
    whole, optimizer = train(name, tmp_path / "whole", 8)
    logged = [entry for entry in whole.state.log_history if "loss" in entry]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 3) and optimizer.tokens_seen == 8 * TOKENS

    train(name, tmp_path / "half", 4)
    half = tmp_path / "half" / "checkpoint-4"
    saved = torch.load(half / "optimizer.pt", weights_only=True)
    assert any("chunk_gradient" in state for state in saved["state"].values())
    resumed, again = train(name, tmp_path / "half", 8, resume=str(half))
    assert again.tokens_seen == 8 * TOKENS
    for key, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(key)), key
