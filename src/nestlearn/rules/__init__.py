"""How to learn: one rule per file, pure functions of tensors.

Every rule that writes one token into a matrix memory M (out, in) has the same signature, so that they are
interchangeable: ``rule(state, key, value, rate, retain) -> state`` with

    state  (…, out, in)     key (…, in)     value (…, out)     rate η, retain α (…)

``omega`` sees a window of c tokens instead: key (…, c, in), value (…, c, out), rate (…, c).
In all of them the retention α in (0, 1] scales the old state alone and the gradient is taken at the old state, as in
NL Eq. 88 (``gated_delta``: at the retained state, as in the literature); a rate of 0 leaves α M.

Rules of optimizers write a whole gradient into a memory of its shape; import them from their modules (``optim/`` does).
"""

from nestlearn.rules.delta import delta
from nestlearn.rules.dgd import dgd, dgd_momentum
from nestlearn.rules.gated_delta import gated_delta
from nestlearn.rules.hebbian import hebbian
from nestlearn.rules.oja import oja
from nestlearn.rules.omega import omega

__all__ = ["delta", "dgd", "dgd_momentum", "gated_delta", "hebbian", "oja", "omega"]
