"""Where the MLP blocks of a Hugging Face model are. They are found by what their attribute in a layer is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from nestlearn.errors import UserError

# One module: Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX, Phi, …; DistilBERT; T5
SINGLE = ("mlp", "feed_forward", "ffn", "ff", "DenseReluDense", "block_sparse_moe")
# Two modules between which the layer does something: BERT and its kin; OPT, BART
PAIRS = (("intermediate", "output"), ("fc1", "fc2"))


@dataclass(frozen=True)
class MLPBlock:
    """One MLP: the layer that holds it, the names of its modules in that layer, and the layer's name in the model."""

    where: str
    layer: nn.Module
    names: tuple[str, ...]

    @property
    def modules(self) -> list[nn.Module]:
        return [getattr(self.layer, name) for name in self.names]

    def parameter_names(self) -> list[str]:
        """Names in the model, each parameter once."""
        prefix = f"{self.where}." if self.where else ""
        return [
            f"{prefix}{own}.{name}" for own in self.names for name, _ in getattr(self.layer, own).named_parameters()
        ]


class BertMLP(nn.Module):
    """BERT's two modules as one function: dense(intermediate(x)). What follows in the layer stays there."""

    def __init__(self, intermediate: nn.Module, dense: nn.Module) -> None:
        super().__init__()
        self.intermediate, self.dense = intermediate, dense

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.intermediate(x))


def find_mlps(model: nn.Module) -> list[MLPBlock]:
    """The MLP blocks in the order of depth. Raises UserError, with all that was looked for, where there is none."""
    found = []
    for name, module in model.named_modules():
        names = _mlp_names(module)
        if names and not any(_within(name, block) for block in found):
            found.append(MLPBlock(name, module, names))
    if not found:
        pairs = ", ".join(" + ".join(pair) for pair in PAIRS)
        layers = sorted({type(child).__name__ for m in model.modules() if isinstance(m, nn.ModuleList) for child in m})
        raise UserError(
            f"{type(model).__name__} has no MLP blocks that are known: looked in every module for {', '.join(SINGLE)} "
            f"with parameters, and for the pairs {pairs}; its layers are of the classes {layers or 'none'}: "
            "rename the MLP's attribute to mlp"
        )
    return found


def chain_in(block: MLPBlock, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Puts ``wrap(the block's MLP)`` in its place and returns it."""
    if len(block.names) == 1:
        chain = wrap(block.modules[0])
        setattr(block.layer, block.names[0], chain)
        return chain
    if not hasattr(block.modules[1], "dense"):
        raise UserError(
            f"{block.where}: its MLP is the two modules {' and '.join(block.names)} with a function of the layer in "
            'between, which by="chain" cannot take: use by="depth"'
        )
    output = cast(Any, block.modules[1])
    chain = wrap(BertMLP(block.modules[0], output.dense))
    setattr(block.layer, block.names[0], chain)
    output.dense = nn.Identity()
    return chain


def chain_out(block: MLPBlock, original: nn.Module) -> None:
    """The MLP back to where `chain_in` took it from."""
    if len(block.names) == 1:
        setattr(block.layer, block.names[0], original)
        return
    pair = cast(BertMLP, original)
    setattr(block.layer, block.names[0], pair.intermediate)
    cast(Any, block.modules[1]).dense = pair.dense


def _mlp_names(module: nn.Module) -> tuple[str, ...]:
    children = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    for name in SINGLE:
        if name in children:
            return (name,)
    return next((pair for pair in PAIRS if all(name in children for name in pair)), ())


def _within(name: str, block: MLPBlock) -> bool:
    inside = [f"{block.where}.{own}".lstrip(".") for own in block.names]
    return any(name == own or name.startswith(own + ".") for own in inside)
