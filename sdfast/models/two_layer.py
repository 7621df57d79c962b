"""The two-layer network of Theorem 1 of Dong et al. 2019."""

import math

import torch
from torch import Tensor, nn

__all__ = ["TwoLayerNet"]


class TwoLayerNet(nn.Module):
    """f(x) = vᵀ erf(W x) with fixed output weights v = ±1/√width; only W is trained.

    Args:
        inputs: Entries of x.
        width: Hidden units, an even number: half of them add, half subtract.
        symmetric: Start with f = 0 everywhere: each unit that adds has the weights of one that subtracts. Otherwise
            all of W is drawn alike.

    Raises:
        ValueError: A size is impossible.

    Reference:
        Dong, Hou, Lu, Zhang 2019, §2.3, after Li, Soltanolkotabi, Oymak 2019.
    """

    output: Tensor

    def __init__(self, inputs: int, width: int, symmetric: bool = False) -> None:
        super().__init__()
        if inputs < 1:
            raise ValueError(f"inputs: got {inputs}, wanted at least 1")
        if width < 2 or width % 2:
            raise ValueError(f"width: got {width}, wanted an even number >= 2")
        drawn = torch.randn(width // 2 if symmetric else width, inputs)
        self.weight = nn.Parameter(torch.cat([drawn, drawn]) if symmetric else drawn)
        signs = torch.ones(width)
        signs[width // 2 :] = -1
        self.register_buffer("output", signs / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        """The output (N, 1) of inputs (N, inputs)."""
        return (torch.erf(x @ self.weight.T) @ self.output)[:, None]

    def extra_repr(self) -> str:
        """Its sizes."""
        width, inputs = self.weight.shape
        return f"inputs={inputs}, width={width}"
