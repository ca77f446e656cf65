"""The Hugging Face seam: causal language model, and the stream state as a cache. `config.py` is its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from nestlearn.errors import UserError
from nestlearn.levels import Level
from nestlearn.memory.deep import InitialWeights
from nestlearn.memory.read_out import Mix, ReadOut
from nestlearn.memory.self_modifying import SelfModifyingMemory
from nestlearn.memory.state import State
from nestlearn.memory.titans import InnerNorm
from nestlearn.models.attention import CausalAttention
from nestlearn.models.baselines import DecayGate
from nestlearn.models.config import HopeConfig
from nestlearn.models.continuum import Continuum
from nestlearn.models.describe import LevelRow, level_table
from nestlearn.models.hope import HopeBackbone, HopeState
from nestlearn.models.in_context import InnerRates
from nestlearn.models.mamba2 import Mamba2Layer
from nestlearn.models.memory_layer import CausalConv
from nestlearn.models.mlp import RMSNorm
from nestlearn.models.packing import Document, documents, run_packed
from nestlearn.models.padding import real_spans, run_unpadded
from nestlearn.models.trace import Trace, trace
from nestlearn.models.window_attention import WindowAttention

_OTHER_BOUNDS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")  # other ways to say what position_ids say
_ALIGNED = 64  # bytes, of memory that torch allocates


@dataclass(frozen=True)
class CachedStream(State):
    """A cache on disk: the state, and the columns of input_ids that went into it."""

    state: HopeState
    columns: int


class HopeCache:
    """The state of a batch of streams, as the object that Hugging Face passes around as ``past_key_values``.

    The model never changes the cache it is given: its output holds a new one. So one cache may be continued many times.
    Its size does not depend on the number of tokens read (Hope-Attention excepted).
    """

    is_compileable = False

    def __init__(self, state: HopeState, seen: int) -> None:
        self.state, self.seen = state, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input_ids read so far, padding included."""
        return self.seen

    def fork(self) -> HopeCache:
        """Another cache with the same state: reordering one leaves the other alone."""
        return HopeCache(self.state, self.seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue from the rows of the chosen beams."""
        self.state = self.state[beam_idx]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.state = self.state[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        self.state = self.state.map(lambda t: t.repeat_interleave(repeats, dim=0))

    def crop(self, max_length: int) -> None:
        """Refused: a state cannot be rolled back."""
        raise UserError(f"cannot crop the cache to {max_length} tokens: a state does not roll back, keep a fork")

    def save(self, path: str | Path) -> None:
        """One safetensors file; `load` gives back equal bits."""
        CachedStream(self.state, self.seen).save(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. UserError for a missing, truncated or foreign file."""
        stream = CachedStream.load(path)
        return cls(stream.state, stream.columns)


class HopePreTrainedModel(PreTrainedModel):
    """Initialisation and loading shared by HOPE models."""

    config_class = HopeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HopeBlock"]
    _is_stateful = True  # generate() then refuses assisted decoding, which would have to take tokens back

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face does, then bit-equal to what was saved.

        Weights mapped from a file lie at any multiple of 8 bytes, where a matrix product may round otherwise than on
        memory of torch's own; so they move there.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNED:
                parameter.data = parameter.data.clone()
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, InitialWeights | InnerNorm):
            module.reset_parameters()
        elif isinstance(module, WindowAttention):
            module.reset_persistent()
        elif isinstance(module, Mamba2Layer):
            module.reset_own_parameters()
        elif isinstance(module, CausalConv | DecayGate | InnerRates | Mix | ReadOut):
            _reset_what_is_not_loaded(module)
        elif isinstance(module, nn.ParameterDict):
            # Hugging Face visits the modules that hold a parameter themselves, not their owners.
            for owner in self.modules():
                if isinstance(owner, SelfModifyingMemory) and owner.rate_scale is module:
                    owner.reset_scales()
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Continuum) and module.weights is not None:
            nn.init.ones_(module.weights)


def _reset_what_is_not_loaded(module: CausalConv | DecayGate | InnerRates | Mix | ReadOut) -> None:
    """Hugging Face protects loaded weights from the functions of nn.init only; these modules also copy and add."""
    loaded = [(p, p.clone()) for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
    module.reset_parameters()
    for parameter, value in loaded:
        parameter.copy_(value)


class HopeForCausalLM(HopePreTrainedModel, GenerationMixin):
    """HOPE with an embedding and a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "embedding.weight"}

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model = HopeBackbone(config.shape())
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.inner_rates = InnerRates(config.in_context) if config.in_context else None
        self.gradient_checkpointing = False
        self.post_init()
        self.model.restart({level.period for level in self.model.shape.levels})  # nested levels start equal

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HopeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Like any causal LM: input_ids (B, T), labels as input_ids (shifted inside, −100 ignored).

        attention_mask  (B, T) or (B, past + T), zeros at padding, which never enters a state: rows run without it and
                        their logits are zero there. Right padding costs nothing where no cache is wanted, since no
                        real token sees it; the logits there are then arbitrary
        use_cache       None: the config's choice, but False for labels with a mask (a padded training batch) or packed
        position_ids    (B, T), 0 where a document begins: packed documents, each read as if alone (packing.py);
                        no label is predicted across them, and the cache is that of each row's last document
        """
        positions = kwargs.pop("position_ids", None)
        self._refuse_unsupported(kwargs, positions, attention_mask, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds, not both and not neither")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        _check_inputs(x, past_key_values, len(self.model.blocks))
        if use_cache is None:
            use_cache = self.config.use_cache and (labels is None or (attention_mask is None and positions is None))
        every = bool(output_hidden_states)
        packed = None if positions is None else documents(positions, x)
        hidden_states, state = self._run(x, past_key_values, attention_mask, packed, exact=bool(use_cache), every=every)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[-1][:, keep])
        loss = None
        if labels is not None:
            labels = _after_real(labels, attention_mask)
            if positions is not None:
                labels = labels.masked_fill(positions.view_as(labels) == 0, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        seen = x.shape[1] + (0 if past_key_values is None else past_key_values.seen)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=HopeCache(state, seen) if use_cache else None,  # pyright: ignore[reportArgumentType]
            hidden_states=hidden_states if every else None,
        )

    def _run(
        self,
        x: Tensor,
        past: HopeCache | None,
        mask: Tensor | None,
        packed: list[Document] | None,
        *,
        exact: bool,
        every: bool,
    ) -> tuple[tuple[Tensor, ...], HopeState]:
        """Hidden states (B, T, width), the last one or ``every`` one, and the state after x.

        exact  keep right padding out of the state, which is then wanted
        """
        recompute = self.gradient_checkpointing and self.training
        checkpoint = self._gradient_checkpointing_func if recompute else None

        def run(x: Tensor, state: HopeState | None) -> tuple[tuple[Tensor, ...], HopeState]:
            inputs: list[Tensor] | None = [] if every else None
            hidden, after = self.model(x, state, checkpoint=checkpoint, inputs=inputs)
            return (*(inputs or ()), hidden), after

        state = None if past is None else past.state
        if packed is not None and len(packed) > len(x):
            return run_packed(run, x, packed, exact=exact)
        if mask is None:
            return run(x, state)
        spans = real_spans(_new_columns(mask, x))
        if not exact:
            spans = [(begin, x.shape[1]) for begin, _ in spans]
        return run_unpadded(run, x, state, spans)

    @staticmethod
    def _refuse_unsupported(
        kwargs: dict[str, Any], positions: Tensor | None, mask: Tensor | None, past: HopeCache | None
    ) -> None:
        if positions is not None and (mask is not None or past is not None):
            other = "attention_mask" if past is None else "past_key_values"
            raise UserError(f"position_ids say where packed documents begin, which {other} cannot: give one of the two")
        bounds = [name for name in _OTHER_BOUNDS if kwargs.get(name) is not None]
        if bounds and positions is None:
            raise UserError(f"{bounds[0]} is given: packed documents need position_ids, 0 where each begins")
        if kwargs.get("output_attentions"):
            raise UserError("output_attentions is True: HOPE has no attention weights; see model.trace for what it has")

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As Hugging Face does, refusing what would be silently wrong."""
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not bool((mask[:, -1] != 0).all()):
            raise UserError("attention_mask ends in zeros, but generation goes on after the end: pad on the left")
        if kwargs.get("past_key_values") is not None and kwargs.get("use_cache") is False:
            raise UserError("past_key_values is given with use_cache=False: generating from it needs use_cache=True")
        return super().prepare_inputs_for_generation(  # pyright: ignore
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:  # pyright: ignore
        """As Hugging Face does, and the user's state too: one copy of each row per beam or returned sequence."""
        cache = kwargs.get("past_key_values")
        if expand_size > 1 and isinstance(cache, HopeCache):
            kwargs["past_key_values"] = cache.fork()
            kwargs["past_key_values"].batch_repeat_interleave(expand_size)
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)  # pyright: ignore

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def parameter_levels(self) -> dict[str, Level]:
        """The level of every parameter that belongs to one, by full name; all others change at every step."""
        levels = self.model.parameter_levels()
        return {name: levels[p] for name, p in self.named_parameters() if p in levels}

    def parameter_periods(self) -> dict[str, float]:
        """Every parameter's period in tokens; 1 means every optimizer step."""
        levels = self.parameter_levels()
        return {name: levels[name].period if name in levels else 1 for name, _ in self.named_parameters()}

    def parameter_lr_scales(self) -> dict[str, float]:
        """Every parameter's multiplier of the learning rate."""
        levels = self.parameter_levels()
        return {name: levels[name].lr_scale if name in levels else 1.0 for name, _ in self.named_parameters()}

    def continued(self, state: HopeState) -> HopeCache:
        """The cache to read on from ``state``, which the weights have learned since."""
        device = next(self.parameters()).device
        return HopeCache(self.model.renewed(state.to(device)), 0)

    @property
    def state_grows(self) -> bool:
        """Whether a stream's state grows with its length, as attention's does."""
        return any(isinstance(block.mixer, CausalAttention) for block in self.model.layers)

    def check_carried(self) -> None:
        """UserError where a state cannot be carried through a long stream, because it grows with it."""
        if self.state_grows:
            raise UserError(
                f"the mixer {self.config.mixer!r} keeps every token, so its state cannot be carried from batch to "
                "batch: set carry_state=false or take a mixer whose state has one size"
            )

    def after_step(self, fired: set[float]) -> None:
        """To be called after an optimizer step with the periods of the levels that changed (nested levels restart)."""
        self.model.restart(fired)

    def level_table(self) -> list[LevelRow]:
        """The table of levels."""
        return level_table(self, self.model)

    def trace(self, input_ids: Tensor) -> Trace:
        """Read one passage (1, T), T >= 2, and record every level's surprise, rates and norms."""
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
            raise UserError(f"input_ids has the shape {tuple(input_ids.shape)}, must be (1, T) with T >= 2")

        def score(hidden: Tensor) -> Tensor:
            return F.cross_entropy(self.lm_head(hidden[0, :-1]).float(), input_ids[0, 1:], reduction="none")

        with torch.enable_grad():
            return trace(self.model, self.embedding(input_ids), score)


def _check_inputs(x: Tensor, past: HopeCache | None, layers: int) -> None:
    """x (B, T, width) and the cache it is to continue."""
    if x.dim() != 3 or x.shape[1] < 1:
        raise UserError(
            f"the input has the shape {tuple(x.shape[:2])}, must be (batch, tokens) with at least one token; "
            "generate() with past_key_values wants all token ids so far, or the new ones and an attention_mask over all"
        )
    if past is None:
        return
    if not isinstance(past, HopeCache):
        raise UserError(f"past_key_values is a {type(past).__name__}, must be the HopeCache that this model returned")
    rows = next(past.state.tensors()).shape[0]
    if rows != x.shape[0] or len(past.state.layers) != layers:
        raise UserError(
            f"past_key_values holds {rows} streams in {len(past.state.layers)} layers, but the input has {x.shape[0]} "
            f"rows and the model {layers} layers: pass the cache of these very streams"
        )


def _new_columns(mask: Tensor, x: Tensor) -> Tensor:
    """The part (B, T) of an attention mask that speaks of x (B, T, width)."""
    if mask.dim() != 2 or mask.shape[0] != x.shape[0] or mask.shape[1] < x.shape[1]:
        raise UserError(
            f"attention_mask has the shape {tuple(mask.shape)}, must be (batch, past + new tokens): {x.shape[0]} rows "
            f"and at least {x.shape[1]} columns"
        )
    return mask[:, -x.shape[1] :]


def _after_real(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Labels without those that only padding could predict: the first token of a row padded on the left."""
    if mask is None:
        return labels
    before = mask[:, -labels.shape[1] :][:, :-1] == 0
    return labels.masked_fill(F.pad(before, (1, 0), value=False), -100)


AutoConfig.register("hope", HopeConfig)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM)
