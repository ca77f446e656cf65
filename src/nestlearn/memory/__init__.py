"""Fast weights: what learns inside a forward pass, held in a state."""

from nestlearn.memory.self_modifying import SelfModifyingConfig, SelfModifyingMemory
from nestlearn.memory.state import State

__all__ = ["SelfModifyingConfig", "SelfModifyingMemory", "State"]
