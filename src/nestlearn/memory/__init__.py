"""Fast weights: what learns inside a forward pass, held in a state."""

from nestlearn.memory.deep_memory import DeepConfig, DeepMemory
from nestlearn.memory.linear import LinearConfig, LinearMemory
from nestlearn.memory.self_modifying import SelfModifyingConfig, SelfModifyingMemory
from nestlearn.memory.state import State
from nestlearn.memory.titans import TitansConfig, TitansMemory

__all__ = [
    "DeepConfig",
    "DeepMemory",
    "LinearConfig",
    "LinearMemory",
    "SelfModifyingConfig",
    "SelfModifyingMemory",
    "State",
    "TitansConfig",
    "TitansMemory",
]
