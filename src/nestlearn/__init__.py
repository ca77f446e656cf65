"""Nested learning in PyTorch. Only what is named here, or in a subpackage's own ``__all__``, is public.

``import nestlearn`` is cheap: a name loads its module when it is first touched, so that code which needs a learning
rule or a level does not pay for `transformers`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestlearn.continual.consolidate import consolidate
    from nestlearn.continual.meta import MetaLearner
    from nestlearn.continual.online import OnlineLearner, RolledBack
    from nestlearn.continual.online_level import OnlineLevel, online_levels
    from nestlearn.continual.stream_state import OnlineState
    from nestlearn.levels import Level
    from nestlearn.models.hf import HopeConfig, HopeForCausalLM
    from nestlearn.models.stacking import load_stacked, stack_levels, stacked_levels, unstack

__version__ = "0.1.0"

__all__ = [
    "HopeConfig",
    "HopeForCausalLM",
    "Level",
    "MetaLearner",
    "OnlineLearner",
    "OnlineLevel",
    "OnlineState",
    "RolledBack",
    "__version__",
    "consolidate",
    "load_stacked",
    "online_levels",
    "stack_levels",
    "stacked_levels",
    "unstack",
]

_HOMES = {
    "HopeConfig": "nestlearn.models.hf",
    "HopeForCausalLM": "nestlearn.models.hf",
    "Level": "nestlearn.levels",
    "MetaLearner": "nestlearn.continual.meta",
    "OnlineLearner": "nestlearn.continual.online",
    "OnlineLevel": "nestlearn.continual.online_level",
    "OnlineState": "nestlearn.continual.stream_state",
    "RolledBack": "nestlearn.continual.online",
    "consolidate": "nestlearn.continual.consolidate",
    "online_levels": "nestlearn.continual.online_level",
    "load_stacked": "nestlearn.models.stacking",
    "stack_levels": "nestlearn.models.stacking",
    "stacked_levels": "nestlearn.models.stacking",
    "unstack": "nestlearn.models.stacking",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nestlearn' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
