"""Products of gradients, tile by tile, in the precision asked for.

Operands are rounded to it, products accumulate in float32 for at most `TERMS` terms (in float64 throughout where
that is asked), and those sums are added up in float64. So the error does not grow with the number of parameters.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sdfast.ntk.layers.kernels import own
from sdfast.ntk.unchanged import full_precision
from sdfast.ops.gram import PRECISIONS, TERMS, add_gram, add_hadamard_gram
from sdfast.ops.gram.precision import PAIRS as TERM_PAIRS
from sdfast.ops.gram.precision import rounded, terms

__all__ = [
    "PRECISIONS",
    "TERMS",
    "add_single_positions",
    "product",
    "products_in",
    "rounded",
    "single_positions",
    "tile_of_factors",
    "tile_of_rows",
]

PAIRS_AT_ONCE = 2**22  # position pairs of a contraction alive at once


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Sets torch's float32 products for `precision`. Rounded operands are exact in TF32, so its units may serve."""
    with full_precision("tf32" if precision in ("bf16x3", "tf32", "bf16") else "ieee"):
        yield


def product(left: Tensor, right: Tensor, precision: str, triangle: bool = False) -> Tensor:
    """The product left @ right.mT in float64.

    Args:
        left: (..., I, K).
        right: (..., J, K).
        precision: Of `PRECISIONS`.
        triangle: `right` is `left`, and what stands above the diagonal is not needed: it may stay zero.

    Returns:
        (..., I, J).
    """
    leading = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    total = left.new_zeros(*leading, left.shape[-2], right.shape[-2], dtype=torch.float64)
    if own(left, right) == "cpu":
        left, right = (side.expand(*leading, *side.shape[-2:]) for side in (left, right))
        for place in itertools.product(*map(range, leading)):
            other = None if triangle else right[place]
            add_gram(total[place], left[place], other, precision=precision, backend="cpu")
        return total
    for start in range(0, left.shape[-1], TERMS):
        parts = [terms(side[..., start : start + TERMS], precision) for side in (left, right)]
        for i, j in TERM_PAIRS[precision]:
            total += parts[0][i] @ parts[1][j].mT
    return total


def tile_of_rows(left: Tensor, right: Tensor, form: str, precision: str, triangle: bool = False) -> Tensor:
    """Inner products of gradients.

    Args:
        left: (outputs, I, K) gradients.
        right: (outputs, J, K).
        form: ``"one"``, ``"trace"``, ``"mean"`` (as trace), ``"per_class"`` or ``"full"``.
        precision: Of `PRECISIONS`.
        triangle: See `product`; of ``"full"`` everything is needed.

    Returns:
        (I, J), per class (outputs, I, J), full (outputs, outputs, I, J), in float64.
    """
    if form == "full":
        return product(left[:, None], right[None], precision)
    if form == "per_class" or own(left, right) != "cpu":
        per_class = product(left, right, precision, triangle)
        return per_class if form == "per_class" else per_class.sum(0)
    if len(left) * left.shape[2] <= TERMS:  # the outputs side by side are few columns
        left, right = (side.transpose(0, 1).flatten(1)[None] for side in (left, right))
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for one, other in zip(left, right, strict=True):
        add_gram(total, one, None if triangle else other, precision=precision, backend="cpu")
    return total


def tile_of_factors(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], form: str, precision: str, bias: bool = False
) -> Tensor:
    """Inner products of gradients Σ_t b_t ⊗ a_t, from (AAᵀ)∘(BBᵀ) summed over pairs of positions.

    Args:
        left: A (I, T, d) or tokens (I, T), and B (outputs, I, T, p).
        right: The same for J.
        form: See `tile_of_rows`.
        precision: Of `PRECISIONS`.
        bias: With those of the bias, Σ_t b_t: (AAᵀ + 1)∘(BBᵀ).

    Returns:
        As `tile_of_rows`.
    """
    (a, b), (other_a, other_b) = left, right
    positions, other_positions = a.shape[1], other_a.shape[1]
    rows = max(1, PAIRS_AT_ONCE // (positions * other_positions * len(other_a)))
    tiles = []
    for start in range(0, len(a), rows):
        part = slice(start, start + rows)
        flat = [(x.flatten(0, 1), y.flatten(1, 2)) for x, y in ((a[part], b[:, part]), (other_a, other_b))]
        pairs = _pairs_of_positions(flat[0], flat[1], form, precision, bias)  # (..., I·T, J·T)
        shape = (*pairs.shape[:-2], -1, positions, pairs.shape[-1])
        tiles.append(pairs.reshape(shape).sum(-2).unflatten(-1, (len(other_a), other_positions)).sum(-1))
    return torch.cat(tiles, -2)


def _pairs_of_positions(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], form: str, precision: str, bias: bool
) -> Tensor:
    """(AAᵀ)∘(BBᵀ) with every position as a row: A (I·T, d) or tokens (I·T,), B (outputs, I·T, p)."""
    (a, b), (other_a, other_b) = left, right
    if a.dim() == 2 and single_positions((a[:, None], b), (other_a[:, None], other_b), form):
        shape = (len(b),) if form == "per_class" else ()
        pairs = a.new_zeros(*shape, len(a), len(other_a), dtype=torch.float64)
        singles = [(x[:, None], y[:, :, None]) for x, y in (left, right)]
        add_single_positions(pairs, singles[0], singles[1], precision, False, bias)
        return pairs
    return tile_of_rows(b, other_b, form, precision) * (_similarity(a, other_a, precision) + float(bias))


def add_single_positions(
    total: Tensor,
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    precision: str,
    triangle: bool,
    bias: bool = False,
) -> None:
    """Adds what `tile_of_factors` gives for layers with one position, (AAᵀ)∘(BBᵀ), without holding either product.

    Args:
        total: (I, J), or per class (outputs, I, J), float64.
        left: A (I, 1, d) and B (outputs, I, 1, p).
        right: The same for J; of a triangle it is `left`.
        precision: Of `PRECISIONS`.
        triangle: See `product`.
        bias: See `tile_of_factors`.
    """
    (a, b), (other_a, other_b) = left, right
    if total.dim() == 2:  # Σ_c (AAᵀ)∘(B_c B_cᵀ): the outputs side by side are one wide B
        b, other_b = (side.transpose(0, 1).reshape(1, side.shape[1], -1) for side in (b, other_b))
        total = total[None]
    for output in range(len(total)):
        one, other = ((x[:, 0], y[output].flatten(1)) for x, y in ((a, b), (other_a, other_b)))
        splits = ((a.shape[-1], one[1].shape[-1]),)
        right_side = None if triangle else other
        add_hadamard_gram(
            total[output], one, right_side, splits=splits, biases=(bias,), precision=precision, backend="cpu"
        )


def single_positions(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], form: str) -> bool:
    """Whether `add_single_positions` serves these factors here."""
    single = left[0].dim() == 3 and left[0].shape[1] == right[0].shape[1] == 1
    return single and form != "full" and own(*left, *right) == "cpu"


def _similarity(left: Tensor, right: Tensor, precision: str) -> Tensor:
    if left.dim() == 1:  # tokens: one-hot rows, none for negative ones
        return ((left[:, None] == right) & (left[:, None] >= 0)).double()
    return product(left, right, precision)
