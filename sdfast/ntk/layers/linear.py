"""Linear layers and matrix products: the gradient of sample i is Bᵢᵀ Aᵢ over its positions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdfast.ntk.layers.rule import Call, NamedRule, Rule, Slot, along_samples


def positions(tensor: Tensor) -> Tensor:
    """(samples, ..., features) as (samples, positions, features)."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


class _Product(NamedRule):
    """Rows times a matrix, plus a vector."""

    takes_out = True

    def serves(self, call: Call) -> bool:
        given = self.bound(call)
        if not along_samples(call, given, ("weight", "bias")):
            return False
        source, weight, bias = given["input"], given["weight"], given.get("bias")
        if not isinstance(weight, Slot) or call.flat[weight.place].dim() != 2:
            return False
        if bias is not None and (not isinstance(bias, Slot) or call.flat[bias.place].dim() != 1):
            return False
        if any(given.get(scale, 1) != 1 for scale in ("beta", "alpha")):
            return False
        features = call.flat[source.place].dim() - 1
        output = call.outputs[0]
        return call.inputs[source.place].axis < features and output is not None and output.axis < features

    def factors(self, call: Call, gradient: Tensor) -> tuple[Tensor, Tensor]:
        source = self.bound(call)["input"]
        return positions(call.split(source.place)), positions(call.split_gradient(gradient, 0))

    def bias(self, call: Call) -> int | None:
        slot = self.bound(call).get("bias")
        return slot.place if isinstance(slot, Slot) and slot.place in call.tracked else None

    def operations(self, call: Call, gradient: Tensor) -> int:
        return 2 * gradient.numel() * call.flat[self.bound(call)["input"].place].shape[-1]


class LinearRule(_Product):
    """``F.linear``: weight (p, d)."""

    name = "linear"

    @staticmethod
    def arguments(input: Any, weight: Any, bias: Any = None) -> dict[str, Any]:
        return {"input": input, "weight": weight, "bias": bias}

    def row(self, call: Call, given: dict[str, Any], name: str, gradient: Tensor, out: Tensor | None = None) -> Tensor:
        b = positions(gradient)
        if name == "bias":
            return torch.sum(b, 1, out=out)
        return torch.bmm(b.mT, positions(call.split(given["input"].place)), out=out)


class MatmulRule(_Product):
    """``input @ weight``: weight (d, p)."""

    name = "matmul"

    @staticmethod
    def arguments(input: Any, weight: Any = None, **other: Any) -> dict[str, Any]:
        return {"input": input, "weight": other.get("other", other.get("mat2", weight))}

    def row(self, call: Call, given: dict[str, Any], name: str, gradient: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.bmm(positions(call.split(given["input"].place)).mT, positions(gradient), out=out)


class AddmmRule(_Product):
    """``torch.addmm(bias, input, weight)``: weight (d, p)."""

    name = "addmm"

    @staticmethod
    def arguments(bias: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1, **other: Any) -> dict[str, Any]:
        return {"input": mat1, "weight": mat2, "bias": bias, "beta": beta, "alpha": alpha}

    def row(self, call: Call, given: dict[str, Any], name: str, gradient: Tensor, out: Tensor | None = None) -> Tensor:
        b = positions(gradient)
        if name == "bias":
            return torch.sum(b, 1, out=out)
        return torch.bmm(positions(call.split(given["input"].place)).mT, b, out=out)


RULES: list[tuple[Rule, tuple[Callable, ...]]] = [
    (LinearRule(), (functional.linear,)),
    (MatmulRule(), (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)),
    (AddmmRule(), (torch.addmm,)),
]
