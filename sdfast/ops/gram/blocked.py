"""The CPU backend: kernels of our own for operands that are multiplied as they are, torch's BLAS for all others.

A panel of the BLAS, of at most `TERMS` terms, is added to the total by one sweep.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdfast.ops.gram import op
from sdfast.ops.gram.precision import PAIRS, TERMS, terms

_PANELS = 8  # of the rows of a triangle: 9/16 of the square is computed
_TURNED = 2**25  # entries of both factors of a side that our kernel turns at once
_LEAST_ROWS = 64  # below which a product is slower than what it saves


def panels(rows: int, columns: int, triangle: bool) -> list[tuple[int, int, int]]:
    """(first row, last, columns) of each product: of a triangle no more columns than its rows reach."""
    if not triangle:
        return [(0, rows, columns)]
    step = max(_LEAST_ROWS, -(-rows // _PANELS))
    return [(start, min(rows, start + step), min(rows, start + step)) for start in range(0, rows, step)]


def _sum(total: Tensor, left: Sequence[Tensor], right: Sequence[Tensor], precision: str, one: bool = False) -> Tensor:
    """One float32 (float64) product of rounded operands, of at most `TERMS` terms, or that and 1."""
    (i, j), *others = PAIRS[precision]
    torch.addmm(total.new_ones(()) if one else total, left[i], right[j].T, beta=float(one), out=total)
    for i, j in others:
        total.addmm_(left[i], right[j].T)
    return total


def _own(left: Tensor, right: Tensor, precision: str, triangle: bool) -> bool:
    """Whether the kernels of our own serve: operands are multiplied as they are, and none has few rows."""
    sides = (left,) if triangle else (left, right)
    return all(
        str(side.dtype) == f"torch.{precision}" and (side.stride(1) == 1 or side.shape[1] <= 1) for side in sides
    ) and (triangle or min(map(len, sides)) >= _LEAST_ROWS)


def add_product(total: Tensor, left: Tensor, right: Tensor, precision: str, triangle: bool) -> None:
    """Adds left @ right.T, of a triangle what lies on and below the diagonal."""
    if _own(left, right, precision, triangle):
        op.rows(total, left, None if triangle else right)
        return
    scratch = None
    step = max(1, left.shape[1]) if precision == "float64" else TERMS  # in float64 there is nothing to promote to
    for start in range(0, left.shape[1], step):
        columns = slice(start, start + step)
        operands = terms(left[:, columns], precision)
        others = operands if triangle else terms(right[:, columns], precision)
        for first, last, width in panels(len(left), len(right), triangle):
            shape = (last - first, width)
            if scratch is None or scratch.shape != shape:
                scratch = operands[0].new_empty(shape)
            _sum(scratch, [side[first:last] for side in operands], [side[:width] for side in others], precision)
            op.add(total[first:last, :width], scratch, None, first if triangle else None)


def add_hadamard(
    total: Tensor,
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    splits: Sequence[tuple[int, int]],
    biased: Sequence[bool],
    precision: str,
    triangle: bool,
) -> None:
    """Adds Σ_l (A_l A'_lᵀ + bias_l) ∘ (B_l B'_lᵀ)."""
    a = b = 0
    for (width, outputs), bias in zip(splits, biased, strict=True):
        sides = [(one[0][:, a : a + width], one[1][:, b : b + outputs]) for one in (left, right)]
        _add_layer(total, sides[0], sides[1], bias, precision, triangle)
        a, b = a + width, b + outputs


def _add_layer(
    total: Tensor,
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    bias: bool,
    precision: str,
    triangle: bool,
) -> None:
    """One layer; by panels both factors of a panel, never more, are held."""
    widths = [side.shape[1] for side in left]
    few = max(widths) <= TERMS and sum(widths) * max(len(left[0]), len(right[0])) <= _TURNED
    if few and all(_own(side, other, precision, triangle) for side, other in zip(left, right, strict=True)):
        op.factors(total, *left, *((None, None) if triangle else right), bias)
        return
    for first, last, columns in panels(len(left[0]), len(right[0]), triangle):
        factors = [
            _promoted(side[first:last], other[:columns], precision, one)
            for side, other, one in zip(left, right, (bias, False), strict=True)
        ]
        if factors[0].dtype != factors[1].dtype:  # one of them was long enough to be promoted
            factors = [factor.double() for factor in factors]
        op.add(total[first:last, :columns], *factors, first if triangle else None)


def _promoted(left: Tensor, right: Tensor, precision: str, one: bool) -> Tensor:
    """Left @ right.T, or that and 1: in float32 where that has at most `TERMS` terms, else in float64 of such parts."""
    if left.shape[1] <= TERMS:
        sides = terms(left, precision), terms(right, precision)
        return _sum(sides[0][0].new_empty(len(left), len(right)), *sides, precision, one)
    total = left.new_full((len(left), len(right)), float(one), dtype=torch.float64)
    add_product(total, left, right, precision, triangle=False)
    return total
