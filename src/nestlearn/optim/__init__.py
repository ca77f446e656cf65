"""Learning between steps: slow weights, from ``.grad``."""

from nestlearn.optim.groups import parameter_groups, parameter_table
from nestlearn.optim.leveled import Leveled

__all__ = ["Leveled", "parameter_groups", "parameter_table"]
