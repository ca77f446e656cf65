"""The configuration of a HOPE model, as Hugging Face keeps it: flat, saved as JSON, checked when made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedConfig

from nestlearn.errors import UserError, suggest
from nestlearn.levels import parse_levels
from nestlearn.memory.self_modifying import SelfModifyingConfig
from nestlearn.models.continuum import CONNECTIONS, split_hidden
from nestlearn.models.hope import CONTINUUM_MIXERS, MIXER_NAMES, ROTARY, Shape, mixer_name, mixers_in_turn
from nestlearn.models.in_context import in_context_levels

# What HOPE's memories start from where the paper is silent; LOG.md has the comparisons behind these values.
# A write takes from the trained initial weights what they hold along its key. Retention towards them (``retain_to``)
# gives it back, at 1 − α per token. Heads that write as much as these (η = 0.5: gain times squared input is near 0.6 in
# w1, 0.3 in w2) must forget fast to keep what was trained; the first head is for what is longer ago. Writing to w2
# changes the features that earlier writes to w1 were stored under: so features start large. w1 starts small, which
# keeps every M near the identity.
HOPE_MEMORY: dict[str, Any] = {
    "chunk": 64,
    "momentum": 0.0,
    "rate_max": 4.0,
    "rate_start": 0.125,
    "retain_start": (0.985, 0.9, 0.9, 0.9),
    "retain_to": "initial",
    "slow_rate_scale": 0.02,
    "w1_scale": 0.05,
    "w2_scale": 3.0,
}
CONTINUUM = (4096, 16384, 65536)  # HOPE's levels where none are given; the baselines have one MLP
_DERIVED = ("heads", "head_width", "names", "written")  # settings of a memory that follow from the model's shape
_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_width",
    "window", "persistent_tokens",
)  # fmt: skip


class HopeConfig(PreTrainedConfig):
    """Shape of a HOPE model; the names are Hugging Face's. Raises UserError naming the value, the rule and the fix.

    intermediate_size  summed hidden width of the CMS levels
    levels             Level objects, dicts, (name, period) pairs or periods in tokens, fastest first; None is HOPE's
                       continuum for HOPE and Hope-Attention, one plain MLP (period 1) for every other mixer
    connection         "sequential", "nested" or "independent"
    mixer              "self_modifying" (also "hope"), "attention" (also "hope_attention"), "transformer", or one of
                       the others in MIXER_NAMES: see docs/baselines.md
    window             of the sliding-window attention in "samba" and the "titans_" mixers: tokens seen, the current one
                       included
    persistent_tokens  trained tokens that every token of "titans_mac", "titans_mag" and "titans_mal" sees
    initializer_range  standard deviation of the outer weights at the start; a narrow model learns faster from
                       hidden_size^(−1/2), as the preset tiny-cpu has it (LOG.md)
    in_context         the levels that the model is trained to change in context: {name of a level: settings}, those of
                       OnlineLevel but name and weights; lr is where the learned rate starts
    memory             settings of SelfModifyingConfig that differ from the defaults; hidden_width defaults to the head
                       width. Kept and saved in full, so that a checkpoint does not depend on the defaults of its reader
    """

    model_type = "hope"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 384
    levels: Any = None
    connection: str = "sequential"
    mixer: str = "self_modifying"
    memory: Any = None
    conv_width: int = 4
    window: int = 64
    persistent_tokens: int = 4
    in_context: Any = None
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_misspelt(kwargs)
        self.mixer = mixer_name(self.mixer)
        if self.levels is None:
            self.levels = CONTINUUM if self.mixer in CONTINUUM_MIXERS else (1,)
        if isinstance(self.levels, str) or not isinstance(self.levels, Iterable):
            raise UserError(f"levels is {self.levels!r}, must be a list of levels, for example [4096, 65536]")
        self.levels = [level.to_dict() for level in parse_levels(self.levels)]
        self._check_numbers()
        settings = {k: v for k, v in asdict(self.memory_config()).items() if k not in _DERIVED}
        self.memory = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
        self.in_context = in_context_levels(self.in_context, [level["name"] for level in self.levels])
        super().__post_init__(**kwargs)
        self.shape()

    def _check_numbers(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise UserError(f"{name} is {value!r}, must be a whole number, at least 1")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(f"{name} is {value!r}, must be a finite number above 0")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size is {self.hidden_size} and num_attention_heads {self.num_attention_heads}: "
                "hidden_size must be divisible by num_attention_heads"
            )

    def shape(self) -> Shape:
        """The network this describes."""
        for name, known in (("mixer", MIXER_NAMES), ("connection", CONNECTIONS)):
            value = getattr(self, name)
            if value not in list(known):
                raise UserError(f"{name} is {value!r}, must be one of {list(known)}{suggest(str(value), known)}")
        width = self.hidden_size // self.num_attention_heads
        if self.mixer in ROTARY and width % 2:
            raise UserError(f"hidden_size / num_attention_heads is {width}, must be even for the rotary positions")
        if self.num_hidden_layers < len(turns := mixers_in_turn(self.mixer)):
            raise UserError(
                f"num_hidden_layers is {self.num_hidden_layers}, must be at least {len(turns)} with mixer "
                f"{self.mixer!r}, whose layers are {' and '.join(turns)} in turn"
            )
        levels = parse_levels(self.levels)
        split_hidden(self.intermediate_size, levels, self.connection)
        shares = [level.layers for level in levels]
        if max(shares) < 1 or (self.connection == "nested" and min(shares) < 1):
            raise UserError(f"levels have the shares of layers {shares}: at least one is 1, and all nested ones")
        return Shape(
            self.hidden_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.intermediate_size,
            levels,
            self.connection,
            self.mixer,
            self.memory_config(),
            self.conv_width,
            self.rope_theta,
            self.rms_norm_eps,
            self.window,
            self.persistent_tokens,
        )

    def memory_config(self) -> SelfModifyingConfig:
        """Settings of every layer's self-modifying memory."""
        given = {} if self.memory is None else self.memory
        if not isinstance(given, Mapping):
            raise UserError(f"memory is {given!r}, must be a dict of settings, for example {{'chunk': 64}}")
        known = [key for key in SelfModifyingConfig.__dataclass_fields__ if key not in _DERIVED]
        for key, value in given.items():
            if key not in known:
                raise UserError(
                    f"memory has the unknown key {key!r}{suggest(str(key), known)}: known are {sorted(known)}"
                )
            if key in ("chunk", "memory_chunk", "hidden_width") and not (value is None or _is_whole(value)):
                raise UserError(f"memory[{key!r}] is {value!r}, must be a whole number, at least 1")
        width = self.hidden_size // self.num_attention_heads
        settings = {"hidden_width": width, **HOPE_MEMORY, **given}
        try:
            return SelfModifyingConfig(head_width=width, heads=self.num_attention_heads, **settings)
        except TypeError as error:
            raise UserError(f"memory is {dict(given)}: a value has the wrong type ({error})") from error


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_misspelt(given: Iterable[str]) -> None:
    """Hugging Face keeps any unknown keyword; one that is nearly ours is a slip of the pen."""
    ours = [name for name in HopeConfig.__annotations__ if not name.endswith("_token_id")]
    for key in given:
        if near := get_close_matches(key, ours, n=1, cutoff=0.85):
            raise UserError(f"HopeConfig has no argument {key!r} (did you mean {near[0]!r}?)")
