"""The multipliers of self-distillation: roots of Σ_k w_k (c / (c + d_k))² = 1, round after round.

With w = z² / (Kε) this is the paper's constraint ‖z ∘ c/(c + d)‖² / K = ε (Proposition 2). It is solved by Newton's
method in s = 1/c on ψ(s) = ‖√w / (1 + s d)‖⁻¹ = 1. ψ is increasing and concave, so from the left of the root every step
stays left of it and none overshoots; the quadratic end takes about five steps in all. A round turns w into
w (d / (c + d))² ≤ w, so its root lies left of the last one: one Newton step from there lands left of the new root.

The zero function fits, and the path ends, where Σ w ≤ 1. Equality happens: on a flat spectrum √(Σ w) falls by exactly 1
a round. So that rounding does not decide, **after t rounds a column has collapsed when Σ w ≤ 1 + 2⁻⁵⁰ (1 + t)²**. Every
round adds a rounding of its own size to Σ w, which later ones do not shrink below their share: as √(Σ w) falls by at
most 1 a round, they are of sizes up to 1, 2, …, t beside the last one's, and their sum of the order t² / 2. What is
left out at most, a fit whose targets' energy exceeds Kε by less than that, is zero up to the same rounding.

The functions of this file that take an array namespace are the definition. csrc/secular/secular.h finds the same roots
for the CPU (pybind11) and for CUDA (CuPy compiles the header) in fewer passes over memory: near the root Halley's step
cubes the error, and the next root is foreseen from the last ones. On the CPU csrc/secular/fold.h first folds the many
eigenvalues of an octave onto 32 nodes, for sixteen columns and rounds or more.
"""

import math
import os
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import array_api_compat
import numpy as np

from sdfast.hilbert import _arrays

__all__ = ["BACKENDS", "solve_path", "why_not_native"]

BACKENDS = ("native", "array")
_MAX_STEPS = 200  # Newton takes 2 to 20; this ends a loop that NaN would keep alive
_ENTRIES_PER_THREAD = 20_000
_LAST_STEP = 1e-9  # a step this small (relative) leaves an error of its square


def _load() -> tuple[Any, str | None]:
    """The native solver beside this package, or why there is none."""
    if os.environ.get("SDFAST_NATIVE") == "0":
        return None, "SDFAST_NATIVE=0 is set"
    folder = Path(__file__).parent.parent
    if PathFinder.find_spec("sdfast._secular", [str(folder)]) is None:  # nor that of another copy of the package
        others = ", ".join(sorted(path.name.split(".")[1] for path in folder.glob("_secular.*.so")))
        there = f", there are those of {others}" if others else ""
        return None, (
            f"sdfast._secular is not installed for this Python, {sys.implementation.cache_tag}{there}: it is built "
            "where pybind11 and a C++ compiler are"
        )
    try:
        return import_module("sdfast._secular"), None
    except ImportError as error:
        return None, f"sdfast._secular cannot be loaded: {error}"


_native, _reason = _load()


def why_not_native() -> str | None:
    """Why NumPy arrays take the array-API loop, or ``None`` where the native solver serves them."""
    return _reason


def solve_path(eigenvalues: Any, weights: Any, rounds: int, *, backend: str | None = None) -> tuple[Any, Any]:
    """The multipliers of up to `rounds` fits: c with Σ_k w_k (c / (c + d_k))² = 1, then w ← w (d / (c + d))².

    Args:
        eigenvalues: d (points,), none negative, in the units that c gets.
        weights: w (points, columns): squared rotated labels over Kε, one independent problem a column. Not changed.
        rounds: The most fits.
        backend: ``"native"`` (C++ for NumPy arrays, CUDA for CuPy's) or ``"array"`` (the definition); ``None`` takes
            the first that is there.

    Returns:
        c (fits, columns), where ``inf`` stands from the round at which a column's Σ w ≤ 1 (collapse: the fit is zero;
        1 up to rounding, see above), and NaN in the columns that no c solves (Σ of w where d = 0 reaches 1); and each
        column's count of fits.

    Raises:
        ValueError: The backend does not exist.
        NotImplementedError: The native solver was asked for and is not there.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend: got {backend!r}, wanted one of {', '.join(map(repr, BACKENDS))} or None")
    xp = _arrays.namespace(weights)
    most = float(xp.max(xp.sum(weights, axis=0)))  # r₀²: the fits are at most ⌈r₀² − 1⌉, and memory is for so many
    rounds = min(rounds, math.ceil(most) + 1 if math.isfinite(most) else rounds, sys.maxsize)
    largest = float(xp.max(eigenvalues))
    scaled = eigenvalues / (largest if largest > 0 else 1.0)
    if backend == "array":
        c, counts = _solve_with_arrays(scaled, weights, rounds)
    elif array_api_compat.is_cupy_array(weights):
        c, counts = _solve_on_cuda(scaled, weights, rounds)
    elif _native is not None and array_api_compat.is_numpy_array(weights):
        c, counts, _ = _native.solve_path(scaled, np.ascontiguousarray(weights.T), rounds, _threads(weights))
        c = c.T
    elif backend == "native":
        raise NotImplementedError(f"backend: 'native' is not here: {_reason or 'it takes NumPy and CuPy arrays'}")
    else:
        c, counts = _solve_with_arrays(scaled, weights, rounds)
    unsolved = xp.sum(xp.where(scaled[:, None] > 0, 0.0, weights), axis=0) >= 1
    fits = int(xp.max(xp.where(unsolved, 0, counts)))
    c = xp.where(unsolved[None, :], xp.nan, c[:fits, :]) * largest
    return c, xp.where(unsolved, 0, counts)


def _threads(weights: np.ndarray) -> int:
    """As many as there are processors, or OMP_NUM_THREADS; fewer where starting them would cost more than they save."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    most = int(asked) if asked.isdigit() and int(asked) > 0 else allowed
    return max(1, min(weights.shape[1], most, weights.size // _ENTRIES_PER_THREAD))


def _solve_with_arrays(d: Any, w: Any, rounds: int) -> tuple[Any, Any]:
    """The definition, in any array namespace; d scaled to a largest of 1."""
    xp = _arrays.namespace(w)
    d = d[:, None]
    solvable = xp.sum(xp.where(d > 0, 0.0, w), axis=0) < 1
    counts = xp.zeros(w.shape[1], dtype=xp.int64, device=array_api_compat.device(w))
    s = None
    found = []
    for passed in range(rounds):
        active = solvable & (xp.sum(w, axis=0) > 1 + 2.0**-50 * (1 + passed) ** 2)
        if not xp.any(active):
            break
        s = _newton(d, w, active, s)
        found.append(xp.where(active, 1 / s, xp.inf))
        counts = counts + xp.astype(active, xp.int64)
        kept = xp.where(active, s, 0.0) * d
        w = w * (kept / (1 + kept)) ** 2
    if not found:
        return xp.full((1, w.shape[1]), xp.inf, device=array_api_compat.device(w)), counts
    return xp.stack(found), counts


def _newton(d: Any, w: Any, active: Any, last: Any) -> Any:
    """The roots s of Σ w / (1 + s d)² = 1 in the active columns, from 0 or from the last round's roots."""
    xp = _arrays.namespace(w)
    first = _step(d, w, xp.zeros_like(w[0, :]))  # from s = 0: never right of the root
    s = first if last is None else xp.maximum(last + _step(d, w, last), first)
    s = xp.where(active, s, 1.0)
    moving = active
    for _ in range(_MAX_STEPS):
        step = xp.where(moving, _step(d, w, s), 0.0)
        s = s + step
        moving = moving & (step > _LAST_STEP * s)
        if not xp.any(moving):
            break
    return s


def _step(d: Any, w: Any, s: Any) -> Any:
    """Newton's step on ψ(s) = 1: φ² (φ − 1) / Σ w d / (1 + s d)³ with φ = 1/ψ."""
    xp = _arrays.namespace(w)
    t = 1 / (1 + s * d)
    terms = w * t * t
    value = xp.sum(terms, axis=0)
    slope = xp.sum(terms * t * d, axis=0)
    return value * ((value - 1) / (xp.sqrt(value) + 1)) / xp.where(slope > 0, slope, 1.0)


def _solve_on_cuda(d: Any, w: Any, rounds: int) -> tuple[Any, Any]:
    """The same loop as one CUDA kernel, a block of threads per column; CuPy compiles secular.h once per process."""
    import cupy

    columns, points = w.shape[1], w.shape[0]
    energies = cupy.array(w.T, order="C")  # (columns, points), consumed by the kernel
    c = cupy.full((columns, rounds), cupy.inf)
    counts = cupy.zeros(columns, dtype=cupy.int64)
    arguments = (cupy.ascontiguousarray(d), energies, np.int64(points), np.int64(rounds), c, counts)
    _cuda_kernel()((columns,), (256,), arguments)
    return c[:, : max(1, int(counts.max()))].T, counts


def _cuda_kernel() -> Any:
    import cupy

    source = (Path(__file__).parent / "secular.h").read_text()
    module = cupy.RawModule(code=source, options=("-std=c++17",))  # CuPy keeps compiled modules by their source
    return module.get_function("sdfast_secular_path")
