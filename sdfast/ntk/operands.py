"""What `eigenspace` multiplies by: a matrix of torch, NumPy or CuPy, or an operator, behind one small interface."""

import math
import warnings
from typing import Any

import array_api_compat
import numpy as np
import torch
from torch import Tensor

from sdfast import _checks
from sdfast.ntk import symmetric_product
from sdfast.ntk.operator_costs import Costs

DTYPES = {"float32": torch.float32, "float64": torch.float64}
_ROUNDING = 100  # units in the last place of the largest entry, by which a matrix may differ from its transpose
_BLOCK = 8  # columns of a block product of few pairs
_OVERHEAD = 1e8  # FLOPs that a handful of Krylov steps cost beside their arithmetic


def power_of_two(size: float) -> float:
    """The one at `size` or next below it, by which a division rounds nothing; 1 for 0 and for what is not finite."""
    return math.ldexp(1.0, math.frexp(size)[1] - 1) if 0 < size < math.inf else 1.0


def krylov_columns(k: int) -> int:
    """Vectors that a Krylov space of usual size multiplies."""
    return max(64, 4 * (k + 3))


def krylov_flops(points: int, columns: int) -> float:
    """FLOPs of a Krylov space beside the products."""
    return 8.0 * points * columns**2 + 10.0 * columns**3


def dense_flops(points: int) -> float:
    """FLOPs of a dense decomposition."""
    return 10.0 * points**3


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
        self._unit = 1.0

    def product(self, columns: Tensor, dtype: torch.dtype) -> Tensor:
        """H X, X rounded to `dtype` and summed in it, as float64."""
        if dtype == torch.float64:
            return symmetric_product.multiply(self.matrix, columns)
        if self.dtype == dtype:
            matrix = self.matrix
        else:  # float64 entries, float32 products
            if self._rounded is None:  # over a power of two, as its entries may be beyond float32
                self._unit = power_of_two(self.matrix.abs().max().item())
                self._rounded = (self.matrix / self._unit).to(dtype)
            matrix = self._rounded
        return symmetric_product.multiply(matrix, columns.to(dtype)).double() * self._unit

    def chosen(self, k: int) -> "tuple[Matrix, str]":
        """Itself: it is there already."""
        return self, ""

    def to_dense(self) -> Tensor:
        """H in float64."""
        return self.matrix.double()

    def dense_is_cheaper(self, k: int) -> bool:
        """Whether n³ of a dense decomposition are fewer FLOPs than the columns of a Krylov space of usual size."""
        columns = krylov_columns(k)
        krylov = columns * 2.0 * self.points**2 + krylov_flops(self.points, columns)
        return dense_flops(self.points) <= krylov + _OVERHEAD


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
        return self.points <= krylov_columns(k)

    def chosen(self, k: int) -> "tuple[Operand, str]":
        """H formed, where the operator can and forming it is predicted to cost less; and the choice in words.

        Counted are the FLOPs of all products of a Krylov space of usual size, the collecting of gradients that are not
        kept included, against those of H once and the cheapest way to its eigenspace. H must fit in the operator's own
        memory.
        """
        costs = getattr(self.operator, "costs", None)
        if not isinstance(costs, Costs):
            return self, ""
        columns = krylov_columns(k)
        basis = krylov_flops(self.points, columns)
        free = columns * costs.product + columns / _BLOCK * costs.collect + basis
        formed = costs.matrix + costs.collect
        formed += min(dense_flops(self.points), columns * 2.0 * self.points**2 + basis)
        if costs.matrix_bytes > self.operator.memory:
            return (
                self,
                f"matrix-free (H takes {costs.matrix_bytes / 2**30:.3g} GiB, more than the operator's memory): ",
            )
        predicted = f"{formed / 1e9:.3g} GFLOP with H formed, {free / 1e9:.3g} without"
        if formed > free:
            return self, f"matrix-free ({predicted}): "
        return Matrix(self.operator.to_dense()), f"H formed ({predicted}): "


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
        return Matrix(as_tensor("gram", gram))
    if hasattr(gram, "tocsr"):
        from scipy.sparse.linalg import aslinearoperator

        gram = aslinearoperator(gram)
    if hasattr(gram, "matmat") and hasattr(gram, "shape") and hasattr(gram, "dtype"):
        return Operator(gram)
    raise TypeError(
        f"gram: got {type(gram).__name__}, wanted a torch tensor, a NumPy or CuPy array, or an operator with shape, "
        "dtype and matmat"
    )


def as_tensor(name: str, array: Any) -> Tensor:
    """An array of real floating numbers as a tensor, which shares its memory where it can.

    Args:
        name: Of the argument, for the errors.
        array: Of torch, NumPy or CuPy.

    Returns:
        The tensor.

    Raises:
        TypeError: It is no array, or holds other numbers.
    """  # raised by the checks called here
    if isinstance(array, Tensor):
        _checks.check_floating(name, array)
        return array.detach()
    if not (array_api_compat.is_numpy_array(array) or array_api_compat.is_cupy_array(array)):
        raise TypeError(f"{name}: got {type(array).__name__}, wanted a torch tensor, a NumPy or CuPy array")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise TypeError(f"{name}: got {array.dtype}, wanted float32, float64 or float16")
    return _from_numpy(array) if isinstance(array, np.ndarray) else torch.from_dlpack(array)


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
