"""Nested learning in PyTorch. Only what is named here, or in a subpackage's own ``__all__``, is public.

``import nestlearn`` is cheap: a name loads its module when it is first touched, so that code which needs a learning
rule or a level does not pay for `transformers`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestlearn.continual.online import OnlineLearner
    from nestlearn.continual.online_level import OnlineLevel, online_levels
    from nestlearn.levels import Level
    from nestlearn.models.hf import HopeConfig, HopeForCausalLM

__version__ = "0.1.0"

__all__ = ["HopeConfig", "HopeForCausalLM", "Level", "OnlineLearner", "OnlineLevel", "__version__", "online_levels"]

_HOMES = {
    "HopeConfig": "nestlearn.models.hf",
    "HopeForCausalLM": "nestlearn.models.hf",
    "Level": "nestlearn.levels",
    "OnlineLearner": "nestlearn.continual.online",
    "OnlineLevel": "nestlearn.continual.online_level",
    "online_levels": "nestlearn.continual.online_level",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nestlearn' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
