"""Products of gradients, tile by tile, in the precision asked for.

Operands are rounded to it, products accumulate in float32 for at most `TERMS` terms (in float64 throughout where
that is asked), and those sums are added up in float64. So the error does not grow with the number of parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sdfast.ntk.unchanged import full_precision

TERMS = 4096  # of a sum in float32, before it is promoted
_PAIRS = 2**22  # position pairs of a contraction alive at once

# name -> mantissa bits that operands are rounded to (None: their own)
PRECISIONS: dict[str, int | None] = {"float32": None, "float64": None, "bf16x3": None, "tf32": 10, "bf16": 7}


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Sets torch's float32 products for `precision`. Rounded operands are exact in TF32, so its units may serve."""
    with full_precision("tf32" if precision in ("bf16x3", "tf32", "bf16") else "ieee"):
        yield


def rounded(tensor: Tensor, bits: int) -> Tensor:
    """Float32 numbers rounded to a mantissa of `bits` bits, to nearest even."""
    drop = 23 - bits
    whole = tensor.contiguous().view(torch.int32)
    kept = (whole + ((whole >> drop) & 1) + (2 ** (drop - 1) - 1)) & ~(2**drop - 1)
    return torch.where(tensor.isfinite(), kept.view(torch.float32), tensor)


def product(left: Tensor, right: Tensor, precision: str) -> Tensor:
    """The product left @ right.mT in float64.

    Args:
        left: (..., I, K).
        right: (..., J, K).
        precision: Of `PRECISIONS`.

    Returns:
        (..., I, J).
    """
    if precision == "float64":
        return left.double() @ right.double().mT
    total = left.new_zeros(*left.shape[:-1], right.shape[-2], dtype=torch.float64)
    for start in range(0, left.shape[-1], TERMS):
        parts = [side[..., start : start + TERMS].float() for side in (left, right)]
        for one, other in _terms(parts[0], parts[1], precision):
            total += one @ other.mT
    return total


def _terms(left: Tensor, right: Tensor, precision: str) -> list[tuple[Tensor, Tensor]]:
    """The operand pairs whose products make up one product."""
    if precision == "bf16x3":
        high = [rounded(side, 7) for side in (left, right)]
        low = [rounded(side - part, 7) for side, part in zip((left, right), high, strict=True)]
        return [(high[0], high[1]), (high[0], low[1]), (low[0], high[1])]
    bits = PRECISIONS[precision]
    return [(left, right) if bits is None else (rounded(left, bits), rounded(right, bits))]


def tile_of_rows(left: Tensor, right: Tensor, form: str, precision: str) -> Tensor:
    """Inner products of gradients.

    Args:
        left: (outputs, I, K) gradients.
        right: (outputs, J, K).
        form: ``"one"``, ``"trace"``, ``"mean"`` (as trace), ``"per_class"`` or ``"full"``.
        precision: Of `PRECISIONS`.

    Returns:
        (I, J), per class (outputs, I, J), full (outputs, outputs, I, J), in float64.
    """
    if form == "full":
        return product(left[:, None], right[None], precision)
    per_class = product(left, right, precision)
    return per_class if form == "per_class" else per_class.sum(0)


def tile_of_factors(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], form: str, precision: str) -> Tensor:
    """Inner products of gradients Σ_t b_t ⊗ a_t, from (AAᵀ)∘(BBᵀ) summed over pairs of positions.

    Args:
        left: A (I, T, d) or tokens (I, T), and B (outputs, I, T, p).
        right: The same for J.
        form: See `tile_of_rows`.
        precision: Of `PRECISIONS`.

    Returns:
        As `tile_of_rows`.
    """
    (a, b), (other_a, other_b) = left, right
    positions, other_positions = a.shape[1], other_a.shape[1]
    rows = max(1, _PAIRS // (positions * other_positions * len(other_a)))
    tiles = []
    for start in range(0, len(a), rows):
        part = slice(start, start + rows)
        similar = _similarity(a[part].flatten(0, 1), other_a.flatten(0, 1), precision)  # (I·T, J·T)
        gradients = [side.flatten(1, 2) for side in (b[:, part], other_b)]  # (outputs, I·T, p)
        pairs = tile_of_rows(gradients[0], gradients[1], form, precision) * similar
        shape = (*pairs.shape[:-2], -1, positions, len(other_a), other_positions)
        tiles.append(pairs.reshape(shape).sum((-1, -3)))
    return torch.cat(tiles, -2)


def _similarity(left: Tensor, right: Tensor, precision: str) -> Tensor:
    if left.dim() == 1:  # tokens: one-hot rows, none for negative ones
        return ((left[:, None] == right) & (left[:, None] >= 0)).double()
    return product(left, right, precision)
