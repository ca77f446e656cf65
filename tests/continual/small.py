"""A tiny encoder of BERT's kind with its tokenizer, and labelled texts that its untrained features separate."""

import json
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from nestlearn.continual.encoder import Encoder

WORDS = [f"w{i}" for i in range(60)]


def encoder(trained: int = 2, layers: int = 3) -> Encoder:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
                        intermediate_size=24, max_position_embeddings=32, initializer_range=0.3)  # fmt: skip
    return Encoder(BertModel(config), tokenizer(), trained)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def rows(classes: int = 6, each: int = 8) -> list[dict[str, str]]:
    """Texts of four to seven words, most of them of the three of their class."""
    draw = random.Random(0)
    found = []
    for label in range(classes):
        own = WORDS[10 * label : 10 * label + 3]
        for _ in range(each):
            text = [draw.choice(own) for _ in range(draw.randint(3, 6))] + [draw.choice(WORDS)]
            found.append({"text": " ".join(text), "label": f"class {label}"})
    return found


def write(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def save(folder):
    """The encoder as a folder that `load_encoder` takes."""
    whole = encoder()
    whole.model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
