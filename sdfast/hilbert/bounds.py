"""What theory promises of self-distillation before any round is run: one result a function, with its number.

Numbers are those of Mobahi, Farajtabar, Bartlett 2020. Throughout, G = gram / K has eigenvalues d with condition number
κ = d_max / d_min, and r₀ = ‖y‖ / √(Kε) > 1 is the size of the labels against the tolerance; t counts fits: t = 1
is ordinary training where the paper writes B_{t−1}. Everything here is NumPy float64, and arrays broadcast.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sdfast.hilbert import _arrays

__all__ = [
    "Interval",
    "condition_number",
    "contraction",
    "equivalent_trace",
    "filter_ratio_bound",
    "fits_interval",
    "guaranteed_fits",
    "guaranteed_fits_by_norm",
    "multiplier_interval",
    "norm_lower_bound",
    "rademacher_complexity",
    "relative_norm",
    "sparsity_index",
    "sparsity_index_at_collapse",
    "sparsity_limit",
    "tail_complexity",
]


class Interval(NamedTuple):
    """Where a quantity lies, both ends included."""

    lower: np.ndarray
    upper: np.ndarray


def _eigenvalues(values: ArrayLike) -> np.ndarray:
    d = np.sort(_arrays.to_numpy(_arrays.as_array("eigenvalues", values)).astype(np.float64))
    if d.ndim != 1 or d.size == 0:
        raise ValueError(f"eigenvalues: got shape {d.shape}, wanted a vector with at least one entry")
    if not np.all(np.isfinite(d)) or d[0] < 0 or d[-1] == 0:
        raise ValueError(f"eigenvalues: got {d[0]:.3g} to {d[-1]:.3g}, wanted finite, none negative, one positive")
    return d


def _numbers(name: str, value: ArrayLike) -> np.ndarray:
    return _arrays.to_numpy(_arrays.as_array(name, value)).astype(np.float64)


def _fits(fits: ArrayLike) -> np.ndarray:
    t = _numbers("fits", fits)
    if not np.all(t >= 0):
        raise ValueError(f"fits: got {t.min() if t.size else t}, wanted none negative")
    return t


def _condition(condition: ArrayLike) -> np.ndarray:
    k = _numbers("condition", condition)
    if not np.all(k >= 1):
        raise ValueError(f"condition: got {k.min() if k.size else k}, wanted κ = d_max / d_min >= 1")
    return k


def _size(relative: ArrayLike) -> np.ndarray:
    r = _numbers("relative_norm", relative)
    if not np.all(r > 1):
        raise ValueError(f"relative_norm: got {r.min() if r.size else r}, wanted > 1: from 1 down the solution is zero")
    return r


def relative_norm(y: ArrayLike, tolerance: float) -> float:
    """r₀ = ‖y‖ / √(Kε), for labels (K,) or (K, outputs) under a joint tolerance ε."""
    labels, epsilon = _numbers("y", y), _arrays.check_number("tolerance", tolerance)
    if labels.ndim not in (1, 2) or labels.shape[0] == 0:
        raise ValueError(f"y: got shape {labels.shape}, wanted (points,) or (points, outputs)")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"tolerance: got {epsilon}, wanted a finite number > 0")
    return float(np.linalg.norm(labels) / math.sqrt(labels.shape[0] * epsilon))


def condition_number(eigenvalues: ArrayLike) -> float:
    """κ = d_max / d_min; infinite for a singular Gram matrix, where every bound with κ is void."""
    d = _eigenvalues(eigenvalues)
    return float(d[-1] / d[0]) if d[0] > 0 else math.inf


def multiplier_interval(eigenvalues: ArrayLike, relative: ArrayLike) -> Interval:
    """Equations 12 and 16: d_min / (r_t − 1) ≤ c_t ≤ d_max / (r_t − 1), with r_t = ‖y_t‖ / √(Kε).

    Args:
        eigenvalues: d (K,).
        relative: r_t of any shape, above 1.

    Returns:
        The interval, shaped like `relative`.
    """
    d, r = _eigenvalues(eigenvalues), _size(relative)
    return Interval(d[0] / (r - 1), d[-1] / (r - 1))


def contraction(condition: ArrayLike, relative: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The a(κ) and b(κ) of Proposition 3.

    a(x) = ((r₀ − 1)² + x(2r₀ − 1)) / (r₀ − 1 + x)² and b(x) = r₀² x / (r₀ − 1 + x)².

    Args:
        condition: κ ≥ 1, finite.
        relative: r₀ > 1.

    Returns:
        a and b.
    """
    x, r = _condition(condition), _size(relative)
    if not np.all(np.isfinite(x)):
        raise ValueError("condition: got inf, wanted finite: on a singular Gram matrix Proposition 3 says nothing")
    below = (r - 1 + x) ** 2
    return ((r - 1) ** 2 + x * (2 * r - 1)) / below, r**2 * x / below


def norm_lower_bound(fits: ArrayLike, condition: ArrayLike, relative: ArrayLike) -> np.ndarray:
    """Proposition 3: r_t ≥ a(κ)ᵗ r₀ − b(κ) (a(κ)ᵗ − 1) / (a(κ) − 1), where r_t is what `fits` fits leave of r₀.

    It holds while all the earlier r exceed 1. The paper states it for ‖z_t‖ = r_t √(Kε).

    Args:
        fits: t ≥ 0, how many fits went before.
        condition: κ.
        relative: r₀.

    Returns:
        The bound on r_t; it may be negative, and says nothing then.
    """
    t = _fits(fits)
    a, b = contraction(condition, relative)
    flat = np.isclose(a, 1.0, rtol=1e-12, atol=0)  # κ = 1: the geometric sum is t
    return a**t * np.asarray(relative, dtype=np.float64) - b * np.where(flat, t, (a**t - 1) / np.where(flat, 1, a - 1))


def guaranteed_fits(condition: ArrayLike, relative: ArrayLike) -> np.ndarray:
    """Proposition 4: t = (r₀ − 1) / κ; at least ⌈t⌉ fits precede the collapse.

    Args:
        condition: κ.
        relative: r₀.

    Returns:
        t, real.
    """
    return (_size(relative) - 1) / _condition(condition)


def guaranteed_fits_by_norm(condition: ArrayLike, relative: ArrayLike) -> np.ndarray:
    """Proposition 3 solved exactly for r_t = 1: t = ln((κ − 1 + r₀²) / (r₀(κ − 1 + r₀))) / ln a(κ), above Prop. 4's.

    Args:
        condition: κ.
        relative: r₀.

    Returns:
        t, real.
    """
    k, r = _condition(condition), _size(relative)
    a, _ = contraction(k, r)
    flat = np.isclose(a, 1.0, rtol=1e-12, atol=0)
    exact = np.log((k - 1 + r**2) / (r * (k - 1 + r))) / np.where(flat, 1, np.log(np.where(flat, 2, a)))
    return np.where(flat, r - 1, exact)


def fits_interval(relative: ArrayLike) -> Interval:
    """⌈r₀ − 1⌉ ≤ N ≤ ⌈r₀² − 1⌉ for the number N of fits before the collapse, whatever the kernel.

    Each fit's residual has norm exactly √(Kε) and makes no obtuse angle with the fit, so
    r_t − 1 ≤ r_{t+1} ≤ √(r_t² − 1). It needs feasible labels, not a bounded κ: Proposition 4 is the lower end over κ.

    Args:
        relative: r₀.

    Returns:
        The interval, of integers in float64.
    """
    r = _size(relative)
    # Rounding must not turn an integer r₀² − 1 into the next one up from just above, nor r₀ − 1 likewise.
    return Interval(np.ceil((r - 1) * (1 - 1e-13)), np.ceil((r - 1) * (r + 1) * (1 - 1e-13)))


def filter_ratio_bound(
    larger: ArrayLike, smaller: ArrayLike, d_min: float, relative: float, fits: ArrayLike
) -> np.ndarray:
    """Theorem 5, eq. 20: B[k] / B[j] ≥ ((r₀ − 1 + d_min/d_j) / (r₀ − 1 + d_min/d_k))ᵗ after t fits, for d_k > d_j.

    Args:
        larger: d_k.
        smaller: d_j.
        d_min: The least eigenvalue.
        relative: r₀.
        fits: t, in the paper the t of B_{t−1}; it holds while no fit has collapsed.

    Returns:
        The bound, at least 1.
    """
    r, least = _size(relative), _arrays.check_number("d_min", d_min)
    low, high = _numbers("smaller", smaller), _numbers("larger", larger)
    if not (least > 0 and np.all(low >= least) and np.all(high >= low)):
        raise ValueError(
            f"larger, smaller: got d_min {least:.3g} and d_j from {low.min():.3g}, wanted d_k >= d_j >= d_min > 0"
        )
    return np.exp(_fits(fits) * _log_ratio(least, low, high, r))


def _log_ratio(d_min: float, smaller: np.ndarray, larger: np.ndarray, r: np.ndarray) -> np.ndarray:
    """log((r₀ − 1 + d_min/d_j) / (r₀ − 1 + d_min/d_k)), to full precision also near 0, where powers are large."""
    return np.log1p((d_min / smaller - d_min / larger) / (r - 1 + d_min / larger))


def sparsity_index(eigenvalues: ArrayLike, relative: ArrayLike, fits: ArrayLike) -> np.ndarray:
    """Eq. 23: the least of Theorem 5's bounds over neighbouring eigenvalues, after t fits. Larger is sparser.

    Args:
        eigenvalues: d, at least two.
        relative: r₀.
        fits: t, real.

    Returns:
        The index, shaped like `relative` and `fits` together.
    """
    d = _eigenvalues(eigenvalues)
    if d.size < 2:
        raise ValueError("eigenvalues: got 1, wanted at least two to compare")
    if d[0] == 0:
        raise ValueError("eigenvalues: the least is 0, wanted all positive: d_min / d has no meaning")
    r = _size(relative)[..., None]
    least = np.min(_log_ratio(float(d[0]), d[:-1], d[1:], r), axis=-1)
    return np.exp(least * _fits(fits))


def sparsity_index_at_collapse(eigenvalues: ArrayLike, relative: ArrayLike) -> np.ndarray:
    """Eq. 24: the sparsity index after the t = r₀/κ − 1/κ rounds that Proposition 4 guarantees (t real).

    Theorem 6: it falls as ε rises, so near-interpolation ends sparser. With t rounded down it need not.

    Args:
        eigenvalues: d, at least two.
        relative: r₀.

    Returns:
        The index, shaped like `relative`.
    """
    return sparsity_index(eigenvalues, relative, guaranteed_fits(condition_number(eigenvalues), relative))


def sparsity_limit(eigenvalues: ArrayLike) -> float:
    """Theorem 6: the limit of eq. 24 for ε → 0, exp(d_min / κ · min_k (1/d_k − 1/d_{k+1}))."""
    d = _eigenvalues(eigenvalues)
    if d.size < 2 or d[0] == 0:
        raise ValueError(f"eigenvalues: got {d.size} with least {d[0]:.3g}, wanted at least two, all positive")
    return float(np.exp(d[0] / condition_number(d) * np.min(1 / d[:-1] - 1 / d[1:])))


def equivalent_trace(equivalent_eigenvalues: ArrayLike) -> float:
    """tr(G†) = Σ d† of §3.7, from `DistillationPath.equivalent_spectrum`: falls with every round."""
    return float(np.sum(_eigenvalues(equivalent_eigenvalues)))


def rademacher_complexity(equivalent_eigenvalues: ArrayLike, radius: float = 1.0) -> float:
    """Bound 2·radius·√(tr(G†) / K) on the empirical Rademacher complexity of the ball ‖f‖ ≤ radius (§3.7).

    Bartlett and Mendelson 2002, Lemma 22, whose kernel matrix is K G†: (2·radius / K) √(tr(K G†)).

    Args:
        equivalent_eigenvalues: d†.
        radius: Of the ball in the norm of the equivalent kernel.

    Returns:
        The bound.
    """
    d, radius = _eigenvalues(equivalent_eigenvalues), _arrays.check_number("radius", radius)
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius: got {radius}, wanted a finite number > 0")
    return 2 * radius * math.sqrt(float(np.sum(d)) / d.size)


def tail_complexity(equivalent_eigenvalues: ArrayLike) -> float:
    """min_k (k/K + √(Σ_{j>k} d†_j / K)), d† from the largest down: the tail quantity of §3.7.

    Bartlett, Bousquet and Mendelson 2005, Corollary 6.7: the generalisation bound is affine in it.

    Args:
        equivalent_eigenvalues: d†.

    Returns:
        The quantity, at most 1.
    """
    d = _eigenvalues(equivalent_eigenvalues)  # ascending
    tails = np.concatenate([[0.0], np.cumsum(d)])[::-1]  # the tail after the k largest
    return float(np.min(np.arange(d.size + 1) / d.size + np.sqrt(tails / d.size)))
