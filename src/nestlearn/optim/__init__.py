"""Learning between steps: slow weights, from ``.grad``."""

from nestlearn.optim.delta_momentum import DeltaMomentum
from nestlearn.optim.groups import parameter_groups, parameter_table
from nestlearn.optim.leveled import Leveled
from nestlearn.optim.m3 import M3
from nestlearn.optim.preconditioned import PreconditionedMomentum

__all__ = ["M3", "DeltaMomentum", "Leveled", "PreconditionedMomentum", "parameter_groups", "parameter_table"]
