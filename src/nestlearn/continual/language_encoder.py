"""Our own language model, trained from scratch by ``nestlearn train``, as a sentence encoder in two parts.

    text → tokens → embedding and blocks 1 … k (kept as `Encoded`) → blocks k+1 … n → norm → mean over the tokens

Each text is read from an empty state. The model is causal, so what pads a shorter row comes after all that it has, and
no token of the text sees it. A block's levels are one MLP here: the benchmark's methods deal MLPs out to paces anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from nestlearn.continual.encoder import MAX_TOKENS, Encoder, mean_of
from nestlearn.data.tokens import Tokenizer
from nestlearn.errors import UserError
from nestlearn.models.hf import HopeForCausalLM
from nestlearn.models.hope import HopeBlock
from nestlearn.train.checkpoint import find_checkpoint, load_checkpoint


class Layer(nn.Module):
    """A block of the model under the names that `find_mlps` knows."""

    def __init__(self, block: HopeBlock) -> None:
        super().__init__()
        self.norm, self.mixer, self.mlp = block.norm, block.mixer, block.cms

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.mixer(self.norm(x), None)
        return self.mlp(x + mixed)


class LanguageEncoder(Encoder):
    """The ``trained`` upper blocks of a HopeForCausalLM may change; its head is not used."""

    def __init__(self, model: HopeForCausalLM, tokenizer: Tokenizer, trained: int) -> None:
        nn.Module.__init__(self)
        layers = [Layer(block) for block in model.model.layers]
        if not 1 <= trained <= len(layers):
            raise UserError(f"trained layers are {trained}: must lie within 1 and the model's {len(layers)}")
        parts = nn.ModuleDict({"embedding": model.embedding, "layers": nn.ModuleList(layers), "norm": model.model.norm})
        self.hold(parts, tokenizer, len(layers) - trained, model.config)

    @property
    def layers(self) -> list[nn.Module]:
        """From the input to the output."""
        return list(cast(nn.ModuleList, self.model["layers"]))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Features (n, width) of length one, from hidden states (n, tokens, width) at the cut and their mask."""
        return mean_of(self._upper(hidden), mask)

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states at the cut and at the end, both (n, tokens, width), and the mask (n, tokens)."""
        rows = [torch.as_tensor(self._tokenizer.encode(text.encode())[:MAX_TOKENS].astype("int64")) for text in texts]
        if not all(len(row) for row in rows):
            raise UserError("a text has no token: leave empty texts out")
        mask = torch.arange(max(len(row) for row in rows))[None] < torch.tensor([len(row) for row in rows])[:, None]
        hidden = self.model["embedding"](nn.utils.rnn.pad_sequence(rows, batch_first=True))
        for layer in self.layers[: self.cut]:
            hidden = layer(hidden)
        return hidden, self._upper(hidden), mask

    def _upper(self, hidden: Tensor) -> Tensor:
        for layer in self.layers[self.cut :]:
            hidden = layer(hidden)
        return self.model["norm"](hidden)


def load_language_encoder(folder: Path, trained: int) -> LanguageEncoder:
    """folder: a run, or a checkpoint of one."""
    found = load_checkpoint(find_checkpoint(folder))
    return LanguageEncoder(HopeForCausalLM.from_pretrained(found.folder), found.tokenizer(), trained)
