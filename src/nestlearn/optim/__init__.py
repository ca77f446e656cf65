"""Learning between steps: slow weights, from ``.grad``."""

from nestlearn.optim.capture import capture_inputs
from nestlearn.optim.delta_momentum import DeltaMomentum
from nestlearn.optim.dgd import DGD
from nestlearn.optim.dmgd import DMGD
from nestlearn.optim.generalized import GeneralizedGD, GeneralizedMomentum
from nestlearn.optim.groups import parameter_groups, parameter_table
from nestlearn.optim.leveled import Leveled
from nestlearn.optim.m3 import M3
from nestlearn.optim.preconditioned import PreconditionedMomentum

__all__ = [
    "DGD",
    "DMGD",
    "M3",
    "DeltaMomentum",
    "GeneralizedGD",
    "GeneralizedMomentum",
    "Leveled",
    "PreconditionedMomentum",
    "capture_inputs",
    "parameter_groups",
    "parameter_table",
]
