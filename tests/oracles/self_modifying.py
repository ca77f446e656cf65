"""Truth for the self-modifying memory: one token, one batch row, one head at a time, written from the objectives.

Five memories M(z) = z + w1 silu(w2 z), named k, v, eta, alpha, memory; a sixth, q, where "q" is adaptive. For every
token each memory's gradient is *differentiated* from its inner objective (torch.func.grad), and every write solves its
proximal problem (oracles.dgd).

    objective "l2":  1/2 |M(k) - target|^2        objective "dot":  -<M(k), target>        target held constant
    objective "mix":  lambda "l2" + (1 - lambda) "dot", lambda = sigmoid(mix), of each memory and head

Outer gradients flow through all of it: call .backward() on the results to get the truth for training as well.
A network is a dict {"w1": (d,h), "w2": (h,d)}; networks are a dict of name -> network.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.oracles import dgd

SLOW = ("k", "v", "eta", "alpha")
Network = dict[str, Tensor]


@dataclass
class Setting:
    chunk: int
    memory_chunk: int
    rate_max: float
    momentum: float = 0.0
    objective: str = "l2"
    target_norm: str = "none"
    adaptive: tuple[str, ...] = SLOW
    retain_to: str = "zero"
    retention: bool = True
    dgd: bool = True
    read: str = "before"


@dataclass
class Constants:
    """What the stream does not change, for one head: initial networks, read-outs, rate scales."""

    initial: dict[str, Network]
    rate_weight: Tensor  # (d,)
    rate_bias: Tensor  # ()
    retain_weight: Tensor  # (d,)
    retain_bias: Tensor  # ()
    rate_scale: dict[str, Tensor]  # name -> ()
    mix: dict[str, Tensor] = field(default_factory=dict)  # name -> (), of the objective "mix"


def silu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(z)


def normalised(z: Tensor) -> Tensor:
    return z / torch.sqrt((z * z).sum() + 1e-6)


def apply(network: Network, z: Tensor, offsets: Network | None = None) -> Tensor:
    """M(z). ``offsets`` are added to the two layers' outputs, so that the objective can be differentiated there."""
    offsets = offsets or {"w1": torch.zeros(()), "w2": torch.zeros(())}
    return z + network["w1"] @ silu(network["w2"] @ z + offsets["w2"]) + offsets["w1"]


def objective(prediction: Tensor, target: Tensor, kind: str, mix: Tensor | None = None) -> Tensor:
    l2, dot = 0.5 * (prediction - target).square().sum(), -(prediction * target).sum()
    if kind == "mix":
        share = torch.sigmoid(mix)
        return share * l2 + (1 - share) * dot
    return l2 if kind == "l2" else dot


def layer_inputs(network: Network, key: Tensor) -> Network:
    return {"w1": silu(network["w2"] @ key), "w2": key}


def layer_errors(network: Network, key: Tensor, target: Tensor, kind: str, mix: Tensor | None = None) -> Network:
    """The gradient of the objective with respect to each layer's output (the local surprise, NL Eq. 8)."""
    zeros = {"w1": torch.zeros_like(key), "w2": torch.zeros_like(network["w2"] @ key)}
    return torch.func.grad(lambda offsets: objective(apply(network, key, offsets), target, kind, mix))(zeros)


def step(x: Tensor, value_input: Tensor, start: dict[str, Network], constants: Constants, setting: Setting):
    """Key, value, rate and retention of one token, from the networks at the start of its chunk."""
    key = normalised(apply(start["k"], x))
    value = apply(start["v"], value_input)
    rate_logit = constants.rate_weight @ apply(start["eta"], x) + constants.rate_bias
    retain_logit = constants.retain_weight @ apply(start["alpha"], x) + constants.retain_bias
    rate = setting.rate_max / (1 + torch.exp(-rate_logit))
    retain = 1 / (1 + torch.exp(-retain_logit)) if setting.retention else torch.ones_like(retain_logit)
    return key, value, rate, retain


def write(name, network, momenta, start, key, value, rate, retain, constants: Constants, setting: Setting):
    """One memory's write of one token: both layers, each by its own proximal step."""
    target = apply(start, value)
    if setting.target_norm == "l2":
        target = normalised(target)
    inputs = layer_inputs(start, key)
    errors = layer_errors(start, key, target, setting.objective, constants.mix.get(name))
    own_rate = rate * constants.rate_scale[name].abs()
    new_network, new_momenta = {}, {}
    for layer in ("w1", "w2"):
        home = constants.initial[name][layer] if setting.retain_to == "initial" else None
        new_network[layer], new_momenta[layer] = dgd.write(
            network[layer],
            momenta[layer],
            inputs[layer],
            errors[layer],
            own_rate,
            retain,
            setting.momentum,
            initial=home,
            forgets=setting.dgd,
        )
    return new_network, new_momenta


def run_row(x, query, value_input, constants: Constants, setting: Setting, networks=None, momenta=None):
    """x, query, value_input (T, d) -> y (T, d), networks and momenta after the last token's write."""
    networks = dict(networks or constants.initial)
    momenta = momenta or {n: {layer: torch.zeros_like(w) for layer, w in networks[n].items()} for n in networks}
    momenta, start, outputs = dict(momenta), {}, []
    for t in range(len(x)):
        if t % setting.chunk == 0:
            start.update({name: network for name, network in networks.items() if name != "memory"})
        if t % setting.memory_chunk == 0:
            start["memory"] = networks["memory"]
        asked = normalised(apply(start["q"], query[t])) if "q" in networks else query[t]
        if setting.read == "before":
            outputs.append(apply(networks["memory"], asked))
        key, value, rate, retain = step(x[t], value_input[t], start, constants, setting)
        for name in (*setting.adaptive, "memory"):
            networks[name], momenta[name] = write(
                name, networks[name], momenta[name], start[name], key, value, rate, retain, constants, setting
            )
        if setting.read == "after":
            outputs.append(apply(networks["memory"], asked))
    return torch.stack(outputs), networks, momenta


def run(x, query, parameters: dict, setting: Setting, value_input=None):
    """All rows and heads, independently. x, query, value_input (B,T,H,d).

    parameters: {"initial": {name: {"w1": (H,d,h), "w2": (H,h,d)}}, "rate_weight": (H,d), "rate_bias": (H,),
    "retain_weight": (H,d), "retain_bias": (H,), "rate_scale": {name: (H,)}, and for "mix" "mix": {name: (H,)}}.
    Returns y (B,T,H,d) and networks, momenta as {name: {layer: (B,H,.,.)}}.
    """
    value_input = x if value_input is None else value_input
    cells = [
        [
            run_row(x[b, :, h], query[b, :, h], value_input[b, :, h], one_head(parameters, h), setting)
            for h in range(x.shape[2])
        ]
        for b in range(len(x))
    ]
    y = torch.stack([torch.stack([cell[0] for cell in row], dim=1) for row in cells])
    return y, *(gather(cells, part) for part in (1, 2))


def one_head(parameters: dict, head: int) -> Constants:
    def pick(tree):
        return {key: pick(value) for key, value in tree.items()} if isinstance(tree, dict) else tree[head]

    return Constants(**pick(parameters))


def gather(cells, part: int) -> dict[str, Network]:
    return {
        name: {
            layer: torch.stack([torch.stack([cell[part][name][layer] for cell in row]) for row in cells])
            for layer in ("w1", "w2")
        }
        for name in cells[0][0][part]
    }
