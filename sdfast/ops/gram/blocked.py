"""The CPU backend: a kernel of its own for triangles of few rows, and torch's BLAS panel by panel for all others.

Each panel, of at most `TERMS` terms, is added to the total by one sweep.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdfast.ops.gram import op
from sdfast.ops.gram.precision import PAIRS, TERMS, terms

_PANELS = 8  # of the rows of a triangle: 9/16 of the square is computed
_LEAST_ROWS = 64  # below which a product is slower than what it saves
_OWN_ROWS = 512  # of a triangle: beyond, a BLAS that computes more of the square is as fast


def panels(rows: int, columns: int, triangle: bool) -> list[tuple[int, int, int]]:
    """(first row, last, columns) of each product: of a triangle no more columns than its rows reach."""
    if not triangle:
        return [(0, rows, columns)]
    step = max(_LEAST_ROWS, -(-rows // _PANELS))
    return [(start, min(rows, start + step), min(rows, start + step)) for start in range(0, rows, step)]


def _sum(total: Tensor, left: Sequence[Tensor], right: Sequence[Tensor], precision: str) -> Tensor:
    """One float32 (float64) product of rounded operands, of at most `TERMS` terms."""
    (i, j), *others = PAIRS[precision]
    torch.mm(left[i], right[j].T, out=total)
    for i, j in others:
        total.addmm_(left[i], right[j].T)
    return total


def add_product(total: Tensor, left: Tensor, right: Tensor, precision: str, triangle: bool) -> None:
    """Adds left @ right.T, of a triangle what lies on and below the diagonal."""
    whole = str(left.dtype) == f"torch.{precision}" and (left.stride(1) == 1 or left.shape[1] <= 1)
    if triangle and whole and len(left) <= _OWN_ROWS:  # of operands that are multiplied as they are
        op.triangle(total, left)
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
    precision: str,
    triangle: bool,
) -> None:
    """Adds Σ_l (A_l A'_lᵀ) ∘ (B_l B'_lᵀ) by panels; both factors of a panel, never more, are held."""
    for first, last, columns in panels(len(left[0]), len(right[0]), triangle):
        a = b = 0
        for width, outputs in splits:
            factors = []
            for side, at, size in ((0, a, width), (1, b, outputs)):
                rows, others = left[side][first:last, at : at + size], right[side][:columns, at : at + size]
                factors.append(_promoted(rows, others, precision))
            if factors[0].dtype != factors[1].dtype:  # one of them was long enough to be promoted
                factors = [factor.double() for factor in factors]
            op.add(total[first:last, :columns], *factors, first if triangle else None)
            a, b = a + width, b + outputs


def _promoted(left: Tensor, right: Tensor, precision: str) -> Tensor:
    """Left @ right.T: in float32 where that has at most `TERMS` terms, else in float64 of such parts."""
    if left.shape[1] <= TERMS:
        sides = terms(left, precision), terms(right, precision)
        return _sum(sides[0][0].new_empty(len(left), len(right)), *sides, precision)
    total = left.new_zeros(len(left), len(right), dtype=torch.float64)
    add_product(total, left, right, precision, triangle=False)
    return total
