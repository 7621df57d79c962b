"""The top eigenspace of a Gram matrix or an operator, with the residual of every pair."""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdfast import _checks, _warnings
from sdfast.ntk import krylov
from sdfast.ntk.operands import DTYPES, Operand, Operator, as_operand, as_tensor, output_like, power_of_two

__all__ = ["Eigenspace", "eigenspace"]

_REACH = {torch.float32: 2e-6, torch.float64: 0.0}  # residuals that products summed in this dtype lead to


@dataclass(frozen=True)
class Eigenspace:
    """The k pairs (λ_i, v_i) of a symmetric H with the largest eigenvalues; float64, of the kind of array that H is.

    Attributes:
        values: λ (k,), descending.
        vectors: V (n, k), orthonormal columns.
        residuals: ‖Hv_i − λ_i v_i‖ / |λ|_max (k,), of these very vectors, summed in float64; |λ|_max as far as it was
            seen, which is no more than it is.
        converged: Which residuals are within the tolerance (k,); none of a run that `max_iterations` stopped before it
            knew of no larger eigenvalue.
        gap: (λ_k − λ_{k+1}) / λ_k: near 0 the space, though not its eigenvalues, is undetermined; infinite for k = n,
            0 where a run was stopped before it knew λ_{k+1}.
        angle: The sine between this space and the true one is at most about this: ‖R‖ / (λ_k − λ_{k+1}), R the residual
            vectors (Davis and Kahan); infinite where there is no gap.
        method: How they were found, in words.
        matrix_free: Whether H was given as an operator and never formed.
    """

    values: Any
    vectors: Any = field(repr=False)
    residuals: Any
    converged: Any
    gap: float
    angle: float
    method: str
    matrix_free: bool = False

    def __len__(self) -> int:
        return len(self.values)


def eigenspace(
    gram: Any,
    k: int,
    *,
    tolerance: float | None = None,
    max_iterations: int = 300,
    start: "Eigenspace | Any | None" = None,
    seed: int = 0,
    precision: str | None = None,
    strict: bool = False,
) -> Eigenspace:
    """The k eigenpairs H v = λ v with the largest λ.

    Of ``sdfast.ntk.operator`` H is formed first where that is predicted to cost less; the result says which.
    A small matrix, or a large share of all pairs, is decomposed densely in float64; else a block Krylov space with full
    re-orthogonalisation is built (`sdfast.ntk.krylov`), with products in H's own dtype, or summed in float64 where the
    tolerance is beyond them, or they have not met it. The residuals are always computed anew in float64.

    Args:
        gram: H: a symmetric (n, n) torch tensor, NumPy or CuPy array; or an operator with ``shape``, ``dtype`` and
            ``matmat`` (``sdfast.ntk.operator``, ``scipy.sparse.linalg.LinearOperator``), or a SciPy sparse matrix.
        k: How many, 1 to n.
        tolerance: On each residual ‖Hv − λv‖ / |λ|_max. ``None``: 1e-10 for float64, else 1e-5.
        max_iterations: Block products at most, per precision.
        start: An `Eigenspace` of a similar H, or (n, any) columns, to begin with: a few more than k
            of them at most.
        seed: Of the random columns.
        precision: Of the products while iterating: ``"float32"``, ``"float64"`` or H's own.
        strict: Raise where a pair has not converged, instead of warning.

    Returns:
        The pairs. One whose residual is above the tolerance is marked in ``converged``, and warned of.

    Raises:
        TypeError: H is no array or operator of real floating numbers.
        ValueError: H is not square, finite and symmetric, or an option is impossible.
        RuntimeError: A pair has not converged, and `strict` is set.
    """  # raised by the checks called here
    operand = as_operand(gram)
    points = operand.points
    _check_count("k", k, points)
    _check_count("max_iterations", max_iterations, None)
    if precision is not None:
        _checks.check_option("precision", precision, DTYPES)
    tolerance = _check_tolerance(tolerance, operand.dtype)
    started = None if start is None else _check_start(start, operand)
    operand, chosen = operand.chosen(k)
    dense = operand.dense_is_cheaper(k)
    if dense:
        found = _dense(operand, k)
    else:
        asked = _settings(k, points, operand.device, tolerance, max_iterations)
        found = _krylov(operand, asked, started, seed, precision)
    space = _finish(operand, found)
    space = replace(space, method=f"{chosen}{space.method}", matrix_free=isinstance(operand, Operator) and not dense)
    converged = (space.residuals <= tolerance) & found.complete
    if not bool(converged.all()):
        _report(replace(space, converged=converged), found.complete, tolerance, strict)
    arrays = {name: getattr(space, name) for name in ("values", "vectors", "residuals")} | {"converged": converged}
    return replace(space, **{name: output_like(gram, array) for name, array in arrays.items()})


class _Found(NamedTuple):
    vectors: Tensor
    following: float | None  # λ_{k+1}
    scale: float  # the largest |λ|
    method: str
    complete: bool = True  # not stopped before these were known to be the top pairs


def _dense(operand: Operand, k: int) -> _Found:
    values, vectors = torch.linalg.eigh(operand.to_dense())
    following = values[-k - 1].item() if k < len(values) else None
    return _Found(vectors.flip(1)[:, :k], following, values.abs().max().item(), "dense eigh in float64")


def _settings(k: int, points: int, device: torch.device, tolerance: float, products: int) -> krylov.Settings:
    return krylov.Settings(k, tolerance, krylov.block_size(k, points, device), krylov.basis_size(k, points), products)


def _krylov(operand: Operand, asked: krylov.Settings, start: Tensor | None, seed: int, precision: str | None) -> _Found:
    first = operand.dtype if asked.tolerance >= _REACH[operand.dtype] else torch.float64
    dtypes = [first, torch.float64] if precision is None else [DTYPES[precision]]
    generator = torch.Generator(operand.device).manual_seed(seed)
    empty = torch.empty((operand.points, 0), dtype=torch.float64, device=operand.device)
    said: list[str] = []
    for dtype in dict.fromkeys(dtypes):
        within = replace(asked, tolerance=max(asked.tolerance, _REACH[dtype]))
        outcome = krylov.top_pairs(partial(operand.product, dtype=dtype), start, empty, generator, within)
        name = str(dtype).removeprefix("torch.")
        said.append(f"{outcome.products} products of {outcome.columns} columns in {name}")
        start, finished = outcome.vectors, outcome.finished
        if finished:
            break
    following = None if asked.wanted == operand.points else math.inf  # not known, so no gap is
    if finished and following is not None:
        following = float(outcome.values[asked.wanted])
    return _Found(outcome.vectors, following, outcome.scale, f"block Krylov: {', then '.join(said)}", finished)


def _finish(operand: Operand, found: _Found) -> Eigenspace:
    """Rayleigh–Ritz within the space found, and the residuals, all from one product summed in float64."""
    image = operand.product(found.vectors, torch.float64)
    unit = power_of_two(max(found.scale, image.abs().max().item()))  # squares of residuals: numbers at any size
    image = image / unit
    small = found.vectors.mT @ image
    values, rotation = torch.linalg.eigh((small + small.mT) / 2)
    values, rotation = values.flip(0), rotation.flip(1)
    vectors, image = found.vectors @ rotation, image @ rotation
    scale = max(found.scale / unit, values.abs().max().item())
    residuals = (image - vectors * values).norm(dim=0) / (scale or 1.0)
    last = values[-1].item()
    gap = _gap(last, None if found.following is None else found.following / unit, scale)
    distance, size = gap * abs(last), residuals.norm().item() * scale
    angle = 0.0 if gap == math.inf else size / distance if distance > 0 else math.inf
    return Eigenspace(values * unit, vectors, residuals, None, gap, angle, found.method)


def _gap(last: float, following: float | None, scale: float) -> float:
    if following is None:
        return math.inf
    if abs(last) <= torch.finfo(torch.float64).eps * scale or last <= following:
        return 0.0
    return (last - following) / abs(last)


def _report(space: Eigenspace, complete: bool, tolerance: float, strict: bool) -> None:
    count, worst = int((~space.converged).sum()), space.residuals.max().item()
    why = "" if complete else " or a larger eigenvalue may have been missed, as max_iterations came first"
    message = (
        f"eigenspace: {count} of {len(space)} pairs have not converged: the largest residual is {worst:.3g}, wanted "
        f"{tolerance:.3g}{why} ({space.method}); raise max_iterations or the tolerance"
    )
    if strict:
        raise RuntimeError(message)
    _warnings.warn_caller(message)


def _check_count(name: str, value: int, largest: int | None) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an integer")
    if value < 1 or (largest is not None and value > largest):
        wanted = "at least 1" if largest is None else f"1 to {largest}, the points of gram"
        raise ValueError(f"{name}: got {value}, wanted {wanted}")


def _check_tolerance(tolerance: float | None, dtype: torch.dtype) -> float:
    if tolerance is None:
        return 1e-10 if dtype == torch.float64 else 1e-5
    if not _checks.is_number(tolerance) or not 0 < tolerance < 1:
        raise ValueError(f"tolerance: got {tolerance!r}, wanted a number between 0 and 1")
    return float(tolerance)


def _check_start(start: Any, operand: Operand) -> Tensor:
    given = start.vectors if isinstance(start, Eigenspace) else start
    columns = as_tensor("start", given).to(operand.device, torch.float64)
    if columns.dim() != 2 or len(columns) != operand.points or not 1 <= columns.shape[1] <= operand.points:
        raise ValueError(
            f"start: got shape {tuple(columns.shape)}, wanted ({operand.points}, columns) for the points of gram"
        )
    if not bool(torch.isfinite(columns).all()):
        raise ValueError("start: holds NaN or infinity, wanted finite numbers")
    return columns
