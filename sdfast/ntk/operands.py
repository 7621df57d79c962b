"""What `eigenspace` multiplies by: a matrix of torch, NumPy or CuPy, or an operator, behind one small interface."""

import warnings
from typing import Any

import array_api_compat
import numpy as np
import torch
from torch import Tensor

from sdfast import _checks
from sdfast.ntk import symmetric_product

DTYPES = {"float32": torch.float32, "float64": torch.float64}
_ROUNDING = 100  # units in the last place of the largest entry, by which a matrix may differ from its transpose
_OVERHEAD = 1e8  # FLOPs that a handful of Krylov steps cost beside their arithmetic


class Matrix:
    """A symmetric matrix held as a torch tensor of float32 or float64."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) == 0:
            raise ValueError(
                f"gram: got shape {_checks.shape_text(matrix)}, wanted a square (n, n) matrix, n at least 1"
            )
        if matrix.dtype in (torch.float16, torch.bfloat16):
            matrix = matrix.float()
        if matrix.stride(1) != 1 and matrix.stride(0) == 1:
            matrix = matrix.mT  # symmetric, or refused below
        if matrix.stride(1) != 1 or (len(matrix) > 1 and matrix.stride(0) < len(matrix)):
            matrix = matrix.contiguous()
        self.matrix = _check_symmetric(matrix)
        self.points, self.dtype, self.device = len(matrix), matrix.dtype, matrix.device
        self._rounded: Tensor | None = None

    def product(self, columns: Tensor, dtype: torch.dtype) -> Tensor:
        """H X, X rounded to `dtype` and summed in it, as float64."""
        if dtype == torch.float64:
            return symmetric_product.multiply(self.matrix, columns)
        if self.dtype == dtype:
            matrix = self.matrix
        else:  # float64 entries, float32 products
            self._rounded = self.matrix.to(dtype) if self._rounded is None else self._rounded
            matrix = self._rounded
        return symmetric_product.multiply(matrix, columns.to(dtype)).double()

    def to_dense(self) -> Tensor:
        """H in float64."""
        return self.matrix.double()

    def dense_is_cheaper(self, k: int) -> bool:
        """Whether n³ of a dense decomposition are fewer FLOPs than the columns of a Krylov space of usual size."""
        points, columns = self.points, max(64, 4 * (k + 3))
        dense = 10.0 * points**3
        krylov = columns * (2.0 * points**2 + 8.0 * points * columns) + 10.0 * columns**3
        return dense <= krylov + _OVERHEAD


class Operator:
    """Products alone: SciPy's `LinearOperator`, or a torch operator that has a ``device``."""

    def __init__(self, operator: Any) -> None:
        shape, dtype = tuple(operator.shape), operator.dtype
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
            raise ValueError(f"gram: got an operator of shape {shape}, wanted a square (n, n) one, n at least 1")
        self.operator = operator
        self.points = shape[0]
        self.is_torch = isinstance(dtype, torch.dtype)
        self.device = operator.device if self.is_torch else torch.device("cpu")
        name = (
            str(dtype).removeprefix("torch.") if self.is_torch else np.dtype(dtype).name
        )  # NumPy reads None as float64
        if name not in DTYPES:
            raise TypeError(f"gram: got an operator of dtype {name}, wanted float32 or float64")
        self.dtype = DTYPES[name]

    def product(self, columns: Tensor, dtype: torch.dtype) -> Tensor:
        """H X as the operator computes it, given X in the finer of `dtype` and its own."""
        if self.is_torch:
            return self._checked(self.operator.matmat(columns.to(self.dtype)), columns)
        finer = torch.float64 if torch.float64 in (dtype, self.dtype) else self.dtype
        image = np.asarray(self.operator.matmat(np.ascontiguousarray(columns.to(finer).numpy())))
        return self._checked(torch.from_numpy(np.array(image, dtype=np.float64)), columns)

    def _checked(self, image: Tensor, columns: Tensor) -> Tensor:
        if image.shape != columns.shape:
            given, returned = _checks.shape_text(columns), _checks.shape_text(image)
            raise ValueError(f"gram: matmat of {given} returned {returned}, wanted the same shape")
        return image.double()

    def to_dense(self) -> Tensor:
        """H from the products with all unit vectors, symmetrised."""
        unit = torch.eye(self.points, dtype=torch.float64, device=self.device)
        blocks = [self.product(unit[:, i : i + 64], torch.float64) for i in range(0, self.points, 64)]
        return _check_symmetric(torch.cat(blocks, 1), self.dtype)

    def dense_is_cheaper(self, k: int) -> bool:
        """Whether n products of one column are no more than a Krylov space takes."""
        return self.points <= max(64, 4 * (k + 3))


Operand = Matrix | Operator


def as_operand(gram: Any) -> Operand:
    """The matrix or operator, checked.

    Args:
        gram: As the user gave it.

    Returns:
        What can be multiplied by.

    Raises:
        TypeError: It is neither, or does not hold real floating numbers.
    """
    if isinstance(gram, Tensor):
        _checks.check_floating("gram", gram)
        if gram.requires_grad:
            raise ValueError("gram: requires grad, but eigenspace is not differentiated; pass gram.detach()")
        return Matrix(gram)
    if array_api_compat.is_numpy_array(gram) or array_api_compat.is_cupy_array(gram):
        if gram.dtype.kind != "f" or gram.dtype.itemsize > 8:
            raise TypeError(f"gram: got {gram.dtype}, wanted float32, float64 or float16")
        return Matrix(_from_numpy(gram) if isinstance(gram, np.ndarray) else torch.from_dlpack(gram))
    if hasattr(gram, "tocsr"):
        from scipy.sparse.linalg import aslinearoperator

        gram = aslinearoperator(gram)
    if hasattr(gram, "matmat") and hasattr(gram, "shape") and hasattr(gram, "dtype"):
        return Operator(gram)
    raise TypeError(
        f"gram: got {type(gram).__name__}, wanted a torch tensor, a NumPy or CuPy array, or an operator with shape, "
        "dtype and matmat"
    )


def output_like(gram: Any, result: Tensor) -> Any:
    """A result as the kind of array that `gram` is: CuPy's for CuPy's, tensors for tensors, else NumPy's."""
    if isinstance(gram, Tensor) or isinstance(getattr(gram, "dtype", None), torch.dtype):
        return result
    if array_api_compat.is_cupy_array(gram):
        import cupy

        return cupy.from_dlpack(result.contiguous())
    return result.numpy()


def _from_numpy(array: np.ndarray) -> Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 or stride % native.itemsize for stride in native.strides):
        native = native.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written
        return torch.from_numpy(native)


def _check_symmetric(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix, or the mean of it and its transpose where they differ by no more than rounding explains."""
    largest, asymmetry = symmetric_product.symmetry(matrix)
    if largest == torch.inf:
        row, column = (~torch.isfinite(matrix)).nonzero()[0].tolist()
        raise ValueError(f"gram: entry ({row}, {column}) is {matrix[row, column].item()}, wanted finite numbers")
    allowed = _ROUNDING * torch.finfo(dtype or matrix.dtype).eps * largest
    if asymmetry > allowed:
        raise ValueError(
            f"gram: differs from its transpose by up to {asymmetry:.3g} (rounding would explain {allowed:.3g}), "
            "wanted a symmetric matrix"
        )
    return matrix if asymmetry == 0 else (matrix + matrix.mT) / 2
