"""The seam to lm-evaluation-harness: its class of a language model, over `reading.Reader`.

Conventions are those of the harness's own adapter, HFLM: context and continuation are tokenized together and split
after the context's tokens; an empty context is the beginning-of-text token, else the end-of-text token, else what our
tokenizers put between documents. Two things differ for models that stream, because they have no longest input: nothing
is cut off on the left, and `loglikelihood_rolling` reads a document as one stream instead of in windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteria

from nestlearn.data.tokens import Tokenizer
from nestlearn.errors import UserError
from nestlearn.eval.families import Row
from nestlearn.eval.reading import Reader
from nestlearn.models.hf import HopeCache

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from tqdm import tqdm
except ImportError as error:
    raise UserError(f"tasks need lm-evaluation-harness ({error}): pip install 'nestlearn[eval]'") from error

MAX_NEW = 256  # tokens, where a task does not say
DEFAULT_MAX_LENGTH = 2048  # HFLM's, for a model that does not say


class Codec(Protocol):
    """Text to ids and back. `prefix` is what an empty context becomes, `end` the id that ends a text."""

    prefix: int
    end: int

    def encode(self, text: str, special: bool | None = None) -> list[int]: ...

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str: ...


class OwnCodec:
    """A tokenizer of a nestlearn checkpoint: no special tokens, one id between documents."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.prefix = self.end = tokenizer.separator_id

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        return self.tokenizer.encode(text.encode()).tolist()

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        kept = [index for index in ids if special or index != self.end]
        return self.tokenizer.decode(kept).decode(errors="replace")


class HuggingFaceCodec:
    """A Hugging Face tokenizer as HFLM uses it; `special` None leaves its special tokens to the tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-text token: set its eos_token")
        self.end = tokenizer.eos_token_id
        self.prefix = self.end if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        if special is None and text.startswith(self.tokenizer.decode(self.prefix)):
            special = False
        return self.tokenizer.encode(text, **({} if special is None else {"add_special_tokens": special}))

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)


class HarnessModel(TemplateLM):
    """A model and its tokenizer, as lm-evaluation-harness wants them. `reuse` as in `Reader`."""

    def __init__(
        self, model: Any, codec: Codec, batch_size: int = 64, *, reuse: bool = True, progress: bool = True
    ) -> None:
        super().__init__()
        self.reader, self.codec, self.progress = Reader(model, batch_size, reuse=reuse), codec, progress
        self._device = self.reader.device

    @property
    def eot_token_id(self) -> int:
        return self.codec.end

    @property
    def prefix_token_id(self) -> int:
        return self.codec.prefix

    @property
    def max_length(self) -> int | None:
        """The most tokens the model reads at once; None for a model that streams."""
        if self.reader.streams:
            return None
        return getattr(self.reader.model.config, "max_position_embeddings", DEFAULT_MAX_LENGTH)

    @property
    def tokenizer_name(self) -> str:
        return type(self.codec).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.codec.encode(string, add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """As the harness tokenized them: (strings, context, continuation)."""
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        scores = self._scored(rows, "log-likelihoods", quiet=disable_tqdm)
        for (strings, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", strings, score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Σ log p of all tokens of each text, the first one after the prefix token."""
        owners: list[int] = []
        rows: list[Row] = []
        for number, request in enumerate(requests):
            windows = self._windows(self.tok_encode(request.args[0]))
            rows += [Row((*before, *predicted), len(predicted)) for before, predicted in windows]
            owners += [number] * (len(rows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._scored(rows, "documents", quiet=disable_tqdm), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of its stop strings."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        with self._bar(len(requests), "generations", disable_tqdm) as bar:
            for numbers in by_settings.values():
                settings = dict(requests[numbers[0]].args[1])
                for batch in self._batches(numbers, prompts):
                    texts_of = self._generate([prompts[number] for number in batch], settings)
                    for number, text in zip(batch, texts_of, strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return texts

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """Too long for the model, it loses its beginning, as in HFLM."""
        if not continuation:
            raise UserError(
                "a request has an empty continuation, so there is nothing to score: correct the task's data"
            )
        ids = (*context, *continuation)
        if self.max_length is not None:
            if len(continuation) > self.max_length:
                raise UserError(f"a continuation of {len(continuation)} tokens: the model reads {self.max_length}")
            ids = ids[-self.max_length - 1 :]
        return Row(ids, len(continuation))

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """(before, predicted): one for a streaming model, else the harness's disjoint windows."""
        if self.max_length is None:
            return [([self.prefix_token_id], ids)] if ids else []
        cut = utils.get_rolling_token_windows(
            ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        return [utils.make_disjoint_window(window) for window in cut]

    def _scored(self, rows: Sequence[Row], what: str, *, quiet: bool) -> list[tuple[float, bool]]:
        with self._bar(len(rows), what, quiet) as bar:
            return self.reader.score(rows, bar.update)

    def _bar(self, total: int, what: str, quiet: bool) -> Any:
        return tqdm(total=total, desc=what, disable=quiet or not self.progress, leave=False)

    def _batches(self, numbers: list[int], prompts: Sequence[list[int]]) -> Iterable[list[int]]:
        """The longest prompts first; prompts of one token are on their own, since nothing is read before them."""
        ordered = sorted(numbers, key=lambda number: -len(prompts[number]))
        single = [number for number in ordered if len(prompts[number]) == 1]
        size = self.reader.batch_size
        for part in (ordered[: len(ordered) - len(single)], single):
            yield from (part[begin : begin + size] for begin in range(0, len(part), size))

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]], settings: dict[str, Any]) -> list[str]:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings, MAX_NEW))
        until = handle_stop_sequences(kwargs.pop("until", None), eos=self.codec.decode([self.codec.end], special=True))
        new = kwargs.pop("max_gen_toks")
        if kwargs.get("do_sample") is False:
            kwargs.pop("temperature", None)
        inputs = self._prompted([prompt or [self.prefix_token_id] for prompt in prompts], new)
        width = inputs["input_ids"].shape[1]
        out = self.reader.model.generate(
            **inputs,
            **kwargs,
            max_new_tokens=new,
            eos_token_id=self.codec.end,
            pad_token_id=self.codec.end,
            stopping_criteria=[_Stop(self.codec, until, width)],
        )
        texts = [self.codec.decode(_before(ids, self.codec.end)) for ids in out[:, width:].tolist()]
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _prompted(self, prompts: Sequence[list[int]], new: int) -> dict[str, Any]:
        """What `generate` goes on from: the last tokens and the state before them, or prompts padded on the left."""
        device = self.reader.device
        if self.reader.streams:
            last = torch.tensor([prompt[-1:] for prompt in prompts], device=device)
            read = len(prompts[0]) - 1
            if not read:
                return {"input_ids": last, "attention_mask": torch.ones_like(last)}
            state = self.reader.state_after([prompt[:-1] for prompt in prompts])
            mask = torch.ones(len(prompts), read + 1, dtype=torch.long, device=device)
            return {"input_ids": last, "attention_mask": mask, "past_key_values": HopeCache(state, read)}
        room = (self.max_length or DEFAULT_MAX_LENGTH) - new
        if room < 1:
            raise UserError(
                f"{new} new tokens do not fit into the {self.max_length} that the model reads: ask for fewer"
            )
        kept = [prompt[-room:] for prompt in prompts]
        width = max(map(len, kept))
        ids = [[self.codec.end] * (width - len(prompt)) + prompt for prompt in kept]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in kept]
        return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


class _Stop(StoppingCriteria):
    """A row is done when its new text holds a stop string; only the end of it, where a new one would show, is read."""

    def __init__(self, codec: Codec, until: Sequence[str], width: int) -> None:
        self.codec, self.width = codec, width
        self.until = [stop for stop in until if stop]
        self.tail = max((len(stop.encode()) for stop in self.until), default=0) + 1
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # pyright: ignore
        recent = input_ids[:, self.width :][:, -self.tail :].tolist()
        texts = [self.codec.decode(ids, special=True) for ids in recent]
        now = torch.tensor([any(stop in text for stop in self.until) for text in texts], device=input_ids.device)
        self.done = now if self.done is None else self.done | now
        return self.done


def _before(ids: list[int], end: int) -> list[int]:
    """What comes before the end of the text; `generate` fills up with ends behind it."""
    return ids[: ids.index(end)] if end in ids else ids


def open_hugging_face(path: Path, batch_size: int = 64) -> HarnessModel:
    """Any folder with a causal language model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # anything can go wrong in foreign files
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: holds no causal language model with a tokenizer ({reason}): give another folder"
        ) from error
    return HarnessModel(model, HuggingFaceCodec(tokenizer), batch_size)
