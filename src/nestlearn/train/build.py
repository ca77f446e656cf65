"""From a config to what a run is made of: text, tokens, batches, model, leveled optimizer."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestlearn.data.batches import Batches, Streams
from nestlearn.data.text import Corpus, first_bytes, read_texts, separate_texts, standard_library
from nestlearn.data.tokens import Tokenizer, load_tokenizer, tokenize
from nestlearn.errors import UserError, suggest
from nestlearn.models.quiet import no_progress_bars
from nestlearn.optim import Leveled, parameter_groups
from nestlearn.train.config import TrainConfig
from nestlearn.train.optimizers import OPTIMIZERS, make_optimizer


@dataclass(frozen=True, eq=False)
class Data:
    """The text of a run. ``held_out`` are ids (N,)."""

    corpus: Corpus
    tokenizer: Tokenizer
    batches: Batches | Streams
    held_out: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        """A loss of 1 nat per token, in bits per byte of the training text."""
        return len(self.batches.tokens) / self.corpus.train.bytes / math.log(2)


def load_data(config: TrainConfig, tokenizer: Tokenizer) -> Data:
    """Reads and tokenizes the text. UserError where it is empty, unreadable or shorter than one sequence."""
    corpus = read_corpus(config.text, config.held_out, config.held_out_per_document)
    tokens = tokenize(corpus.train, tokenizer)
    if config.carry_state:
        batches = Streams(tokens, config.batch_size, config.sequence_length)
    else:
        separator = tokenizer.separator_id if config.pack_documents else None
        batches = Batches(tokens, config.batch_size, config.sequence_length, config.seed, separator)
    return Data(corpus, tokenizer, batches, tokenize(corpus.held_out, tokenizer))


def read_corpus(text: tuple[str, ...], held_out: tuple[str, ...] = (), per_document: int | None = None) -> Corpus:
    """``text`` split in two, or all of it and ``held_out``; of each held-out document the first bytes."""
    paths = [Path(path) for path in text]
    if held_out:
        corpus = separate_texts(paths, [Path(path) for path in held_out])
    else:
        corpus = read_texts(paths) if text else standard_library()
    return corpus if per_document is None else first_bytes(corpus, per_document)


def vocabulary(config: TrainConfig) -> int:
    """The number of tokens of a config's model, where possible without its tokenizer's files."""
    return config.model.get("vocab_size") or load_tokenizer(config.tokenizer).vocab_size


def build_model(config: TrainConfig, vocab_size: int) -> Any:
    """A HopeForCausalLM with the config's seed. UserError for arguments that HopeConfig does not have."""
    from nestlearn.models.hf import HopeForCausalLM

    hope = hope_config(config, vocab_size)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return HopeForCausalLM(hope)


def hope_config(config: TrainConfig, vocab_size: int) -> Any:
    from huggingface_hub.errors import StrictDataclassError

    from nestlearn.models.hf import HopeConfig

    known = inspect.signature(HopeConfig).parameters
    for key, value in config.model.items():
        if key not in known:
            raise UserError(f"unknown key 'model.{key}'{suggest(key, known)}: HopeConfig has no such argument")
        if type(known[key].default) is int and type(value) is not int:
            raise UserError(f"model.{key} is {value!r}: must be a whole number, for example {known[key].default}")
    if config.meta and "in_context" in config.model:
        raise UserError("model.in_context is given together with meta: leave it out, it is made of meta.levels")
    given = config.model.get("vocab_size", vocab_size)
    if given < vocab_size:
        raise UserError(f"model.vocab_size is {given}: the tokenizer has {vocab_size} tokens, give at least that many")
    try:
        in_context = {"in_context": config.meta["levels"]} if config.meta else {}
        return HopeConfig(**{"vocab_size": vocab_size, **config.model, **in_context})
    except UserError:
        raise
    except (TypeError, ValueError, StrictDataclassError) as error:  # a value of another type than the key's
        raise UserError(f"model {config.model} has a value of the wrong type ({error}): correct it") from error


def load_model(folder: Path) -> Any:
    """The model of a checkpoint."""
    from nestlearn.models.hf import HopeForCausalLM

    with no_progress_bars():
        return HopeForCausalLM.from_pretrained(folder)


def build_optimizer(config: TrainConfig, model: Any) -> Leveled:
    """The optimizer of the config, each level on its own period."""
    return Leveled(partial(make_optimizer, config=config), optimizer_groups(config, model))


def optimizer_groups(config: TrainConfig, model: Any) -> list[dict[str, Any]]:
    """``lr_scale`` of a group is its level's, times ``adamw_scale`` where AdamW steps what the optimizer leaves out."""
    groups = parameter_groups(
        model,
        lr=config.learning_rate,
        adamw_lr=config.learning_rate * config.adamw_scale,
        weight_decay=config.weight_decay,
        states=OPTIMIZERS[config.optimizer].states,
    )
    for group in groups:
        group["lr_scale"] *= config.adamw_scale if group["rule"] == "adamw" else 1
    return groups
