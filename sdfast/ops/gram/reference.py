"""Gram matrices in plain PyTorch: the definition that every backend is compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdfast.ops.gram.precision import PAIRS, terms


def product_reference(left: Tensor, right: Tensor, precision: str) -> Tensor:
    """Left @ right.T in float64, of operands rounded to `precision`: exact products, no sum in anything less."""
    sides = [[term.double() for term in terms(side, precision)] for side in (left, right)]
    return sum((sides[0][i] @ sides[1][j].T for i, j in PAIRS[precision]), left.new_zeros((), dtype=torch.float64))


def hadamard_reference(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], splits: Sequence[tuple[int, int]], precision: str
) -> Tensor:
    """Σ_l (A_l A'_lᵀ) ∘ (B_l B'_lᵀ) in float64, layer l being the next d_l columns of A and p_l of B."""
    total = left[0].new_zeros(len(left[0]), len(right[0]), dtype=torch.float64)
    a = b = 0
    for width, outputs in splits:
        similar = product_reference(left[0][:, a : a + width], right[0][:, a : a + width], precision)
        total += similar * product_reference(left[1][:, b : b + outputs], right[1][:, b : b + outputs], precision)
        a, b = a + width, b + outputs
    return total
