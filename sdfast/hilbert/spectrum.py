"""The eigenvalues and eigenvectors of a Gram matrix, decomposed once, and which labels are out of their reach."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdfast.hilbert import _arrays

__all__ = ["Infeasible", "Spectrum", "decompose"]


@dataclass(frozen=True)
class Spectrum:
    """Gram matrix G = gram / K = V diag(d) Vᵀ, decomposed once.

    Attributes:
        values: d ascending (points,), zero below the rank cut.
        vectors: V (points, points), eigenvectors as columns.
        rank: How many of `values` are not zero.
    """

    values: Any
    vectors: Any = field(repr=False)
    rank: int


@dataclass(frozen=True)
class Infeasible:
    """Why no function of the kernel's span fits the labels to within ε; its text says it in a sentence.

    Attributes:
        outputs: The outputs that cannot be fitted; ``(0,)`` for a joint ε.
        zero_eigenvalues: How many eigenvalues of the Gram matrix are zero.
        unreachable_energy: ‖part of the labels in their eigenspace‖² / K, per output named: what ε must exceed.
        tolerance: The ε asked for, per output named.
    """

    outputs: tuple[int, ...]
    zero_eigenvalues: int
    unreachable_energy: tuple[float, ...]
    tolerance: tuple[float, ...]

    def __str__(self) -> str:
        worst = int(np.argmax(np.subtract(self.unreachable_energy, self.tolerance)))
        return (
            f"{self.zero_eigenvalues} eigenvalues of the Gram matrix are zero, and the labels have energy "
            f"{self.unreachable_energy[worst]:.6g} there, which no function of this kernel reaches: no fit comes to "
            f"within tolerance {self.tolerance[worst]:.6g}, which must exceed that energy"
        )


def find_infeasible(spectrum: Spectrum, unreachable: Any, epsilon: Any) -> Infeasible | None:
    """The outputs whose unreachable energy is not below ε, if there are any."""
    outputs = tuple(i for i in range(unreachable.shape[0]) if float(unreachable[i]) >= float(epsilon[i]))
    if not outputs:
        return None
    return Infeasible(
        outputs=outputs,
        zero_eigenvalues=spectrum.values.shape[0] - spectrum.rank,
        unreachable_energy=tuple(float(unreachable[i]) for i in outputs),
        tolerance=tuple(float(epsilon[i]) for i in outputs),
    )


def decompose(
    gram: Any, *, jitter: float = 0.0, rank_tolerance: float | None = None, overwrite_gram: bool = False
) -> Spectrum:
    """The spectrum of G = gram / K, eigenvalues below the rank cut set to zero.

    Args:
        gram: (K, K) kernel values g(x_j, x_k), symmetric and positive semi-definite.
        jitter: Added to gram's diagonal; it becomes part of the kernel.
        rank_tolerance: Eigenvalues up to this share of the largest are zero. ``None``: K · 2⁻⁵²; at least 8 units in
            the last place of gram's dtype where that is coarser; and at least twice what rounding left below zero.
        overwrite_gram: Put the eigenvectors into gram's own memory, a float64 NumPy matrix: LAPACK's QR iteration then
            needs O(K) beside it, and takes several times as long as the default, which needs three more matrices.

    Returns:
        The spectrum, in float64.

    Raises:
        TypeError: An argument has the wrong type, or gram is to be overwritten, and cannot be.
        ValueError: The matrix is not square, finite, symmetric and positive semi-definite, or an option is impossible.
    """
    overwrite_gram = check_overwrite(overwrite_gram, gram)
    return decompose_checked(_arrays.check_gram(gram), jitter, rank_tolerance, overwrite_gram)


def check_overwrite(overwrite: Any, gram: Any) -> bool:
    """Whether to work in gram's memory, which must be such that LAPACK can."""
    if not _arrays.check_flag("overwrite_gram", overwrite):
        return False
    fits = type(gram) is np.ndarray and gram.dtype == np.float64 and (gram.flags.forc and gram.flags.writeable)
    if not fits:
        what = f"of {gram.dtype}" if isinstance(gram, np.ndarray) else f"a {type(gram).__name__}"
        raise TypeError(f"overwrite_gram: gram is {what}, wanted a contiguous writeable float64 NumPy array to work in")
    return True


def decompose_checked(gram: Any, jitter: float, rank_tolerance: float | None, overwrite_gram: bool) -> Spectrum:
    """`decompose` of a matrix that `check_gram` has seen."""
    xp = _arrays.namespace(gram)
    points = gram.shape[0]
    jitter = _arrays.check_number("jitter", jitter)
    if not (math.isfinite(jitter) and jitter >= 0):
        raise ValueError(f"jitter: got {jitter}, wanted a finite number >= 0")
    unit = float(xp.finfo(gram.dtype).eps)
    if rank_tolerance is None:
        cut = max(points * 2.0**-52, 0.0 if unit < 1e-12 else 8 * unit)
    else:
        cut = _arrays.check_number("rank_tolerance", rank_tolerance)
        if not 0 <= cut < 1:
            raise ValueError(f"rank_tolerance: got {rank_tolerance}, wanted within [0, 1)")
    values, vectors = _eigh(xp.astype(gram, xp.float64, copy=False), overwrite_gram)
    values = values + jitter
    largest = float(xp.max(xp.abs(values)))
    smallest = float(xp.min(values))
    if smallest < -max(cut, points * 2.0**-52, unit ** (2 / 3)) * largest:
        raise ValueError(
            f"gram: is indefinite, its smallest eigenvalue is {smallest:.6g} (largest {float(xp.max(values)):.6g}); "
            f"wanted a positive semi-definite matrix, which jitter={1.01 * -smallest + jitter:.3g} would make of it"
        )
    if rank_tolerance is None and largest > 0:
        cut = max(cut, -2 * smallest / largest)  # how wrong the kernel's own rounding made its eigenvalues
    values = xp.where(values > cut * largest, values, 0.0) / points
    return Spectrum(values, vectors, int(xp.sum(xp.astype(values > 0, xp.int64))))


def _eigh(gram: Any, overwrite: bool) -> tuple[Any, Any]:
    if not overwrite:
        return tuple(_arrays.namespace(gram).linalg.eigh(gram))
    from scipy.linalg import eigh

    columns = gram if gram.flags.f_contiguous else gram.T  # LAPACK wants columns, and would copy rows
    # Of LAPACK's drivers the only one whose workspace is not another K × K or two.
    return eigh(columns, overwrite_a=True, check_finite=False, driver="ev")
