"""The Hugging Face seam: configuration, causal language model, and the stream state as a cache. Nothing else."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nestlearn.errors import UserError, suggest
from nestlearn.levels import Level, parse_levels
from nestlearn.memory.deep import InitialWeights
from nestlearn.memory.self_modifying import ReadOut, SelfModifyingConfig, SelfModifyingMemory
from nestlearn.models.continuum import CONNECTIONS, Continuum
from nestlearn.models.hope import (
    MIXERS,
    HopeBackbone,
    HopeState,
    LevelRow,
    Shape,
    Trace,
    level_table,
    parameter_levels,
    trace,
)
from nestlearn.models.memory_layer import CausalConv
from nestlearn.models.mlp import RMSNorm

# What HOPE's memories start from where the paper is silent; LOG.md has the comparisons behind these values.
HOPE_MEMORY: dict[str, Any] = {
    "chunk": 64,
    "momentum": 0.0,
    "rate_max": 8.0,
    "rate_start": 0.5,
    "retain_start": 0.9999,
    "slow_rate_scale": 0.02,
}


@strict
class HopeConfig(PreTrainedConfig):
    """Shape of a HOPE model; the names are Hugging Face's.

    intermediate_size  summed hidden width of the CMS levels
    levels             Level objects, dicts, (name, period) pairs or periods in tokens, fastest first
    connection         "sequential", "nested" or "independent"
    mixer              "self_modifying" (HOPE), "attention" (Hope-Attention) or "gated_delta"
    memory             settings of SelfModifyingConfig that differ from the defaults; hidden_width defaults to the head width
    """

    model_type = "hope"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 384
    levels: Any = (4096, 16384, 65536)
    connection: str = "sequential"
    mixer: str = "self_modifying"
    memory: Any = None
    conv_width: int = 4
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.levels = [level.to_dict() for level in parse_levels(self.levels)]
        self.memory = dict(self.memory or {})
        self.architectures = ["HopeForCausalLM"]
        super().__post_init__(**kwargs)
        self.shape()

    def shape(self) -> Shape:
        """The network this describes. Raises UserError naming the value, the rule and the fix."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size is {self.hidden_size} and num_attention_heads {self.num_attention_heads}: "
                "hidden_size must be divisible by num_attention_heads"
            )
        for name, known in (("mixer", MIXERS), ("connection", CONNECTIONS)):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise UserError(f"{name} is {value!r}, must be one of {list(known)}{suggest(value, known)}")
        return Shape(
            self.hidden_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.intermediate_size,
            parse_levels(self.levels),
            self.connection,
            self.mixer,
            self.memory_config(),
            self.conv_width,
            self.rope_theta,
            self.rms_norm_eps,
        )

    def memory_config(self) -> SelfModifyingConfig:
        """Settings of every layer's self-modifying memory."""
        known = SelfModifyingConfig.__dataclass_fields__
        for key in self.memory:
            if key not in known or key in ("heads", "head_width"):
                raise UserError(f"memory has the unknown key {key!r}{suggest(key, known)}: known are {sorted(known)}")
        width = self.hidden_size // self.num_attention_heads
        return SelfModifyingConfig(
            **{
                "head_width": width,
                "hidden_width": width,
                "heads": self.num_attention_heads,
                **HOPE_MEMORY,
                **self.memory,
            }
        )


class HopeCache:
    """The state of a batch of streams, as the object that Hugging Face passes around as ``past_key_values``.

    The state itself is immutable: copy the cache object (or keep ``cache.state``) to fork.
    """

    is_compileable = False

    def __init__(self, state: HopeState, seen: int) -> None:
        self.state, self.seen = state, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input_ids read so far, padding included."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue from the rows of the chosen beams."""
        self.state = self.state[beam_idx]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.state = self.state[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        self.state = self.state.map(lambda t: t.repeat_interleave(repeats, dim=0))


class HopePreTrainedModel(PreTrainedModel):
    """Initialisation and loading shared by HOPE models."""

    config_class = HopeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HopeBlock"]
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, CausalConv | InitialWeights | ReadOut):
            module.reset_parameters()
        elif isinstance(module, SelfModifyingMemory):
            module.reset_scales()
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Continuum) and module.weights is not None:
            nn.init.ones_(module.weights)


class HopeForCausalLM(HopePreTrainedModel, GenerationMixin):
    """HOPE with an embedding and a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "embedding.weight"}

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model = HopeBackbone(config.shape())
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HopeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Like any causal LM: input_ids (B, T), labels as input_ids (shifted inside, −100 ignored)."""
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        checkpointing = self.gradient_checkpointing and self.training
        state = None if past_key_values is None else past_key_values.state
        hidden, state = self.model(x, state, checkpointing=checkpointing)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        seen = x.shape[1] + (0 if past_key_values is None else past_key_values.seen)
        cache = HopeCache(state, seen) if use_cache else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # pyright: ignore

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def parameter_levels(self) -> dict[str, Level]:
        """The level of every parameter that belongs to one, by full name; all others change at every step."""
        levels = parameter_levels(self.model)
        return {name: levels[p] for name, p in self.named_parameters() if p in levels}

    def parameter_periods(self) -> dict[str, float]:
        """Every parameter's period in tokens; 1 means every optimizer step."""
        levels = self.parameter_levels()
        return {name: levels[name].period if name in levels else 1 for name, _ in self.named_parameters()}

    def parameter_lr_scales(self) -> dict[str, float]:
        """Every parameter's multiplier of the learning rate."""
        levels = self.parameter_levels()
        return {name: levels[name].lr_scale if name in levels else 1.0 for name, _ in self.named_parameters()}

    def after_step(self, fired: set[float]) -> None:
        """To be called after an optimizer step with the periods of the levels that changed (nested levels restart)."""
        self.model.restart(fired)

    def level_table(self) -> list[LevelRow]:
        """The table of levels."""
        return level_table(self, self.model)

    def trace(self, input_ids: Tensor) -> Trace:
        """Read one passage (1, T) and record every level's surprise, rates and norms."""

        def score(hidden: Tensor) -> Tensor:
            return F.cross_entropy(self.lm_head(hidden[0, :-1]).float(), input_ids[0, 1:], reduction="none")

        with torch.enable_grad():
            return trace(self.model, self.embedding(input_ids), score)


AutoConfig.register("hope", HopeConfig)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM)
