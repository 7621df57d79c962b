"""Products of a symmetric matrix with a block of vectors, and whether a matrix is symmetric at all.

On the CPU the native kernel reads one triangle once for all columns, and sums in the dtype of the columns: float64
columns against a float32 matrix are summed in float64 without a float64 copy of the matrix. Elsewhere torch multiplies.
"""

import torch
from torch import Tensor

from sdfast import _native
from sdfast.ntk.unchanged import full_precision

_ROWS = 1024  # looked at together where no native kernel does it, so that no second matrix is made

library = torch.library.Library("sdfast", "FRAGMENT")  # outlives the operations: they end with it
library.define("_symmetric_product(Tensor matrix, Tensor columns) -> Tensor")
library.define("_symmetry(Tensor matrix) -> Tensor")
torch.library.register_fake("sdfast::_symmetric_product", lambda matrix, columns: torch.empty_like(columns))
torch.library.register_fake("sdfast::_symmetry", lambda matrix: matrix.new_empty((2,), dtype=torch.float64))


def is_native(matrix: Tensor) -> bool:
    """Whether the native kernel multiplies by this matrix."""
    return matrix.device.type == "cpu" and _native.CPU.loaded


def multiply(matrix: Tensor, columns: Tensor) -> Tensor:
    """H X, summed in the dtype of X.

    Args:
        matrix: H, symmetric (n, n), float32 or float64, its entries one after another within a row.
        columns: X (n, b), of H's dtype or float64.

    Returns:
        (n, b) of X's dtype.
    """
    if is_native(matrix):
        return torch.ops.sdfast._symmetric_product(matrix, columns)
    if matrix.dtype == columns.dtype:
        return _multiply_exactly(matrix, columns)
    blocks = (matrix[start : start + _ROWS] for start in range(0, len(matrix), _ROWS))
    return torch.cat([_multiply_exactly(rows.to(columns.dtype), columns) for rows in blocks])


def _multiply_exactly(matrix: Tensor, columns: Tensor) -> Tensor:
    """Float32 in full, whatever the user allows to the rest of the program."""
    with full_precision():
        return matrix @ columns


def symmetry(matrix: Tensor) -> tuple[float, float]:
    """The largest |h_ij|, infinity where an entry is infinite or NaN, and the largest |h_ij − h_ji|.

    Args:
        matrix: Square, float32 or float64.

    Returns:
        Both.
    """
    if is_native(matrix):
        largest, asymmetry = torch.ops.sdfast._symmetry(matrix).tolist()
        return largest, asymmetry
    largest, asymmetry = 0.0, 0.0
    for start in range(0, len(matrix), _ROWS):
        rows = matrix[start : start + _ROWS]
        largest = max(largest, rows.abs().max().nan_to_num(torch.inf).item())
        asymmetry = max(asymmetry, (rows - matrix[:, start : start + _ROWS].mT).abs().max().item())
    return largest, asymmetry
