"""Rounds that mix the labels back in, and the best mixture of rounds, from one eigendecomposition.

With S = G (c I + G)⁻¹ the smoother of one ridge fit, a fixed c for all rounds:

- Borup and Andersen 2021: f_τ = S(α y + (1 − α) f_{τ−1}) tends to ordinary ridge regression with c / α.
- Das and Sanghavi 2023, Dang, Patil and Rinaldo 2026: one step on ξ · prediction + (1 − ξ) · label; the best ξ has any
  sign, and exceeds 1 where the noise is strong.
- Pareek, Du and Oh 2024: any rounds with any mixing give Σ_j θ_j Sʲ y with Σ θ_j = 1; the risk is quadratic in θ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdfast.hilbert import _arrays, selection
from sdfast.hilbert.spectrum import Spectrum, decompose

__all__ = ["MixedRounds", "OptimalMixture", "limit_ridge", "mixed_rounds", "noise_variance", "optimal_rounds"]

CRITERIA = ("gcv", "cp")
_SMALLEST_DIRECTION = 1e-9  # of the weights, relative: below it two mixtures predict the same


@dataclass(frozen=True)
class _Problem:
    spectrum: Spectrum
    rotated: Any  # z = Vᵀ y (K, Q)
    single: bool
    ridge: float

    @property
    def points(self) -> int:
        return self.rotated.shape[0]

    @property
    def smoother(self) -> Any:
        """The diagonal of S in the eigenvectors' frame."""
        return self.spectrum.values / (self.spectrum.values + self.ridge)

    def apply(self, kept: Any) -> Any:
        """V diag(kept) Vᵀ y."""
        fitted = self.spectrum.vectors @ (kept[:, None] * self.rotated)
        return fitted[:, 0] if self.single else fitted

    def predict(self, cross_gram: Any, kept_over_smoother: Any) -> Any:
        """The fit at other points: the filter is S times something, and S / d = 1 / (c + d) needs no inverse of d."""
        cross = _arrays.check_cross_gram(cross_gram, self.rotated)
        over = kept_over_smoother / (self.spectrum.values + self.ridge) / self.points
        predicted = cross @ (self.spectrum.vectors @ (over[:, None] * self.rotated))
        return predicted[:, 0] if self.single else predicted


def _problem(gram: Any, y: Any, ridge: float) -> _Problem:
    ridge = _check_ridge(ridge)
    spectrum = gram if isinstance(gram, Spectrum) else decompose(gram)
    columns, single = _arrays.check_targets(y, spectrum.vectors)
    return _Problem(spectrum, spectrum.vectors.T @ columns, single, float(ridge))


def _check_ridge(ridge: Any) -> float:
    ridge = _arrays.check_number("ridge", ridge)
    if not (math.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge: got {ridge}, wanted a finite number > 0, the c of (c I + gram / K)⁻¹")
    return ridge


def limit_ridge(ridge: float, alpha: float) -> float:
    """The c / α of the ridge regression that α-mixed rounds tend to.

    Args:
        ridge: c.
        alpha: Weight of the labels in each round's targets, in (0, 2): outside, the rounds need not converge.

    Returns:
        c / α.

    Raises:
        ValueError: α is outside (0, 2), or c is not above 0.
    """
    ridge, alpha = _check_ridge(ridge), _arrays.check_number("alpha", alpha)
    if not 0 < alpha < 2:
        raise ValueError(f"alpha: got {alpha}, wanted within (0, 2): other rounds collapse (0) or may diverge")
    return ridge / alpha


@dataclass(frozen=True)
class MixedRounds:
    """What `mixed_rounds` returns. A `round` counts fits: 1 is ordinary training.

    Attributes:
        alpha: The weight of the labels in each later round (rounds − 1,).
        filters: The diagonal (rounds, K) of each round's smoother in the eigenvectors' frame.
    """

    alpha: tuple[float, ...]
    filters: Any
    _inner: Any = field(repr=False)  # filters / S
    _problem: _Problem = field(repr=False)

    def __len__(self) -> int:
        """The number of rounds."""
        return self.filters.shape[0]

    def fitted(self, round: int) -> Any:
        """F on the training points, shaped like y."""
        return self._problem.apply(self.filters[_arrays.check_round(round, len(self)) - 1, :])

    def predict(self, cross_gram: Any, round: int) -> Any:
        """F at other points, from (points, K) kernel values."""
        return self._problem.predict(cross_gram, self._inner[_arrays.check_round(round, len(self)) - 1, :])


def mixed_rounds(gram: Any, y: Any, alpha: float | Sequence[float], *, ridge: float, rounds: int) -> MixedRounds:
    """f_1 = S y, then f_τ = S(α y + (1 − α) f_{τ−1}): rounds that keep the labels in their targets.

    Args:
        gram: (K, K) kernel values, or their `decompose`.
        y: Labels (K,) or (K, Q), floats.
        alpha: α, or one for each of the rounds − 1 later fits; any real number.
        ridge: c of every fit, G = gram / K.
        rounds: How many fits.

    Returns:
        The rounds.

    Raises:
        ValueError: An argument has an impossible value.
    """
    rounds = _arrays.check_count("rounds", rounds)
    problem = _problem(gram, y, ridge)
    if isinstance(alpha, Sequence | np.ndarray) and not isinstance(alpha, str):
        weights = [_arrays.check_number("alpha", each) for each in alpha]
    else:
        weights = [_arrays.check_number("alpha", alpha)] * (rounds - 1)
    if len(weights) != rounds - 1:
        raise ValueError(f"alpha: got {len(weights)} values, wanted {rounds - 1}: one for each fit after the first")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"alpha: got {alpha}, wanted finite numbers")
    xp, smoother = _arrays.namespace(problem.rotated), problem.smoother
    inner = [xp.ones_like(smoother)]
    for each in weights:
        inner.append(each + (1 - each) * smoother * inner[-1])
    stacked = xp.stack(inner)
    return MixedRounds(tuple(weights), smoother[None, :] * stacked, stacked, problem)


@dataclass(frozen=True)
class OptimalMixture:
    """What `optimal_rounds` returns: f = Σ_j θ_j Sʲ y.

    Attributes:
        weights: θ, which sum to 1: as many rounds as score best, or the plain fit alone, (1,).
        helps: Whether the best mixture beats the plain fit by more than two standard errors of that gain.
        scores: The criterion at the best mixture of up to 1, 2, … rounds; the first is the plain fit's. Each freely
            chosen weight counts as a degree of freedom, without which more rounds would always look better.
        gain_error: The standard error of the gain; ``None`` where the plain fit scores best.
        criterion: ``"gcv"`` or ``"cp"``.
        noise_variance: The σ² of ``"cp"``, summed over the outputs; ``None`` for ``"gcv"``.
    """

    weights: Any
    helps: bool
    scores: Any
    gain_error: float | None
    criterion: str
    noise_variance: float | None
    _problem: _Problem = field(repr=False)

    @property
    def xi(self) -> float:
        """ξ of the one-step mixture, target ξ · prediction + (1 − ξ) · label: 0 where it is predicted not to help."""
        if self.weights.shape[0] > 2:
            raise ValueError(f"xi: these are {self.weights.shape[0]} rounds, wanted optimal_rounds(..., rounds=2)")
        return 1 - float(self.weights[0])

    def fitted(self) -> Any:
        """F on the training points, shaped like y."""
        return self._problem.apply(self._problem.smoother * self._inner())

    def predict(self, cross_gram: Any) -> Any:
        """F at other points, from (points, K) kernel values."""
        return self._problem.predict(cross_gram, self._inner())

    def _inner(self) -> Any:
        powers = _powers(self._problem.smoother, self.weights.shape[0])  # S⁰ … : one S is split off
        return powers @ self.weights


def _powers(smoother: Any, count: int) -> Any:
    xp = _arrays.namespace(smoother)
    return xp.stack([smoother**j for j in range(count)], axis=1)


def _residual_filters(problem: _Problem, rounds: int) -> Any:
    """The diagonals of 1 − Sʲ, (K, rounds), exact to rounding also where c is small and S near 1."""
    xp, d = _arrays.namespace(problem.rotated), problem.spectrum.values
    log_smoother = -xp.log1p(problem.ridge * xp.where(d > 0, 1 / xp.where(d > 0, d, 1.0), xp.inf))
    return -xp.stack([xp.expm1(j * log_smoother) for j in range(1, rounds + 1)], axis=1)


def noise_variance(gram: Any, y: Any) -> float:
    """σ² from the ridge fit of least GCV: its residual over its residual degrees of freedom, summed over the outputs.

    Args:
        gram: (K, K) kernel values, or their `decompose`.
        y: Labels (K,) or (K, Q).

    Returns:
        ‖(I − S)y‖² / tr(I − S).
    """
    return _variance(_problem(gram, y, 1.0))


def _variance(problem: _Problem) -> float:
    xp = _arrays.namespace(problem.rotated)
    _, residual, freedom = selection.ridge_of_least_gcv(problem.spectrum.values, xp.sum(problem.rotated**2, axis=1))
    return residual / freedom


def optimal_rounds(
    gram: Any, y: Any, *, ridge: float, rounds: int, criterion: str = "gcv", variance: float | None = None
) -> OptimalMixture:
    """The mixture Σ_j θ_j Sʲ y of up to `rounds` fits with Σ θ_j = 1 that is predicted best, in closed form.

    ``rounds=2`` is one step of distillation with the best ξ (`OptimalMixture.xi`).

    Args:
        gram: (K, K) kernel values, or their `decompose`.
        y: Labels (K,) or (K, Q), floats.
        ridge: c of every fit, G = gram / K; the mixture repairs one that was chosen badly.
        rounds: The most fits.
        criterion: ``"gcv"``: the mixture of the rounds' residuals, each over its share 1 − tr(Sʲ)/K of residual
            freedom; for one fit plain GCV. ``"cp"``: Mallows' Cp, which takes the noise's variance.
        variance: σ² of the labels' noise, summed over the outputs; for ``"cp"`` only. ``None``: `noise_variance`.

    Returns:
        The mixture; where `helps` is False it is the plain fit, predicted to be as good.

    Raises:
        ValueError: An argument has an impossible value.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: got {criterion!r}, wanted 'gcv' or 'cp'")
    variance = None if variance is None else _arrays.check_number("variance", variance)
    if variance is not None and (criterion != "cp" or not (math.isfinite(variance) and variance >= 0)):
        raise ValueError(f"variance: got {variance} with criterion={criterion!r}, wanted >= 0, and with 'cp' only")
    rounds = _arrays.check_count("rounds", rounds)
    problem = _problem(gram, y, ridge)
    if criterion == "cp" and variance is None:
        variance = _variance(problem)
    xp, points = _arrays.namespace(problem.rotated), problem.points
    left = _residual_filters(problem, rounds)
    freedom = xp.mean(left, axis=0)
    if not bool(freedom[0] > 0):
        raise ValueError(
            f"ridge: got {ridge}, so small beside the kernel that 1 − S is 0 in float64: take a larger one"
        )
    energy = xp.sum(problem.rotated**2, axis=1) / points
    residual = left * xp.sqrt(energy)[:, None]
    found = []
    for m in range(1, rounds + 1):
        if variance is None:
            found.append(_least_gcv(xp, residual[:, :m], freedom[:m], points))
        else:
            found.append(_least_cp(xp, residual[:, :m], freedom[:m], points, variance))
    scores = xp.stack([score for _, score in found])
    best = int(xp.argmin(scores))
    weights, error = found[best][0], None
    if best:
        scale = freedom if variance is None else xp.ones_like(freedom)
        factors = [left[:, 0] / scale[0], left[:, : best + 1] @ (weights / scale[: best + 1])]
        error = _difference_error(problem, *factors)
    helps = error is not None and float(scores[0] - scores[best]) > 2 * error
    return OptimalMixture(weights if helps else found[0][0], helps, scores, error, criterion, variance, problem)


def _difference_error(problem: _Problem, plain: Any, mixed: Any) -> float:
    """Standard error of the mean difference of two residuals' squares, from its spread over the points."""
    xp, vectors = _arrays.namespace(problem.rotated), problem.spectrum.vectors
    squares = [xp.sum((vectors @ (each[:, None] * problem.rotated)) ** 2, axis=1) for each in (plain, mixed)]
    return float(xp.std(squares[0] - squares[1], correction=1)) / problem.points**0.5


def _least_gcv(xp: Any, residual: Any, freedom: Any, points: int) -> tuple[Any, Any]:
    """‖R̃θ‖² / (1 − (m − 1)/K)² under Σθ = 1, R̃ being each round's residual over its share of residual freedom.

    GCV's ratio of the mixture itself, ‖Rθ‖² / (gᵀθ)², would be lowered without end by a negative trace. Enlarging each
    round's residual to the size it has on new points first leaves a least squares problem.
    """
    enlarged = residual / freedom[None, :]
    weights = _solve(xp, enlarged, xp.ones_like(freedom))
    weights = weights / xp.sum(weights)
    share = 1 - (freedom.shape[0] - 1) / points
    score = xp.sum((enlarged @ weights) ** 2) / share**2 if share > 0 else xp.asarray(xp.inf)
    return weights, score


def _least_cp(xp: Any, residual: Any, freedom: Any, points: int, variance: float) -> tuple[Any, Any]:
    """‖Rθ‖² + 2σ²(1 − gᵀθ + (m − 1)/K) under Σθ = 1: RᵀR θ = σ² g + μ."""
    free, ones = _solve(xp, residual, variance * freedom), _solve(xp, residual, xp.ones_like(freedom))
    weights = free + ones * (1 - xp.sum(free)) / xp.sum(ones)
    used = 1 - xp.sum(freedom * weights) + (freedom.shape[0] - 1) / points
    return weights, xp.sum((residual @ weights) ** 2) + 2 * variance * used


def _solve(xp: Any, residual: Any, right: Any) -> Any:
    """(RᵀR)⁻¹ right from R's singular values, so that R's condition is not squared; negligible directions left out."""
    _, sizes, directions = xp.linalg.svd(residual, full_matrices=False)
    kept = sizes > _SMALLEST_DIRECTION * sizes[0]
    inverse = xp.where(kept, 1 / xp.where(kept, sizes, 1.0), 0.0)
    return directions.T @ (inverse**2 * (directions @ right))
