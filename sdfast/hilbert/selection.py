"""Which round to stop at, and how many labels are wrong, judged from the noisy labels alone."""

from typing import TYPE_CHECKING, Any

import numpy as np

from sdfast.hilbert import _arrays

if TYPE_CHECKING:
    from sdfast.hilbert.path import DistillationPath

__all__ = ["CRITERIA", "RoundChoice", "best_round", "noise_rate", "ridge_of_least_gcv", "scores"]

CRITERIA = ("gcv", "loo")
OTHER_TOLERANCES = (0.5, 0.5**0.5, 2.0**0.5, 2.0)  # factors of ε at which the choice is looked at again


class RoundChoice(int):
    """A round that was chosen: the integer itself, and what it rests on.

    Attributes:
        criterion: ``"gcv"`` or ``"loo"``.
        scores: Of every round (fits,): the estimated mean squared error on new points.
        standard_errors: Of the scores, from the spread over the points.
        difference_errors: Of each score's difference to the chosen one: the same points are in both, so it is smaller.
        other_tolerances: Per factor of ε, the round chosen there and its score; ``None`` where that ε has no fits. A
            choice that moves much, or a score that falls much, says that ε matters more than the round.
    """

    criterion: str
    scores: Any
    standard_errors: Any
    difference_errors: Any
    other_tolerances: dict[float, tuple[int, float] | None]

    def __repr__(self) -> str:
        at = int(self) - 1
        return (
            f"RoundChoice({int(self)} of {len(self.scores)}, {self.criterion} {float(self.scores[at]):.4g} ± "
            f"{float(self.standard_errors[at]):.2g})"
        )

    __str__ = int.__repr__


def check_criterion(criterion: object) -> None:
    """Refuses what is no criterion."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: got {criterion!r}, wanted 'gcv' or 'loo'")


def scores(path: "DistillationPath", criterion: str = "gcv", mean_direction: Any = None) -> Any:
    """The score of each round (fits,).

    Args:
        path: With at least one fit.
        criterion: ``"gcv"``, from the spectrum alone, or ``"loo"``, from each point's residual.
        mean_direction: Squares of the rotated unit vector along which the labels were centred, whose coefficient counts
            as one more degree of freedom; gcv only.

    Returns:
        Mean squared errors, ``inf`` where a fit leaves no degrees of freedom.
    """
    check_criterion(criterion)
    path.check_has_fits()
    xp = _arrays.namespace(path.y)
    if criterion == "loo":
        return _means(xp, _contributions(path, "loo"))
    found = []
    for _, kept, left in path.each_round():
        freedom = xp.sum(kept, axis=0)
        if mean_direction is not None:
            freedom = freedom + 1 - xp.sum(kept * mean_direction[:, None], axis=0)
        residual = xp.sum((left * path.rotated) ** 2, axis=0) / path.points
        found.append(xp.sum(_over_squared(xp, residual, 1 - freedom / path.points)))
    return _without_nan(xp, xp.stack(found))


def _over_squared(xp: Any, residual: Any, share: Any) -> Any:
    """Residual / share², ``inf`` where the share of degrees of freedom left is nothing but rounding."""
    usable = share > 1e-12
    return xp.where(usable, residual / xp.where(usable, share, 1.0) ** 2, xp.inf)


def _without_nan(xp: Any, values: Any) -> Any:
    return xp.where(xp.isnan(values), xp.inf, values)


def _contributions(path: "DistillationPath", criterion: str) -> list[Any]:
    """Per round what each point adds to the score (K,): their mean is the score."""
    xp, vectors = _arrays.namespace(path.y), path.spectrum.vectors
    found = []
    for _, kept, left in path.each_round():
        residual = vectors @ (left * path.rotated)  # (K, Q)
        if criterion == "loo":
            share = _diagonal(vectors, left)
        else:
            share = 1 - xp.sum(kept, axis=0, keepdims=True) / path.points
        found.append(_without_nan(xp, xp.sum(_over_squared(xp, residual**2, share), axis=1)))
    return found


def _means(xp: Any, contributions: list[Any]) -> Any:
    return xp.stack([xp.mean(each) for each in contributions])


def _least(values: Any, criterion: str) -> int:
    """Where the least score is."""
    best = int(np.argmin(_arrays.to_numpy(values)))
    if not bool(np.isfinite(float(values[best]))):
        raise ValueError(f"criterion: {criterion!r} is infinite in every round: no fit leaves a degree of freedom")
    return best


def _diagonal(vectors: Any, values: Any) -> Any:
    """diag(V diag(values) Vᵀ), (K, columns), without a second K × K matrix."""
    xp = _arrays.namespace(vectors)
    return xp.concat([vectors[rows, :] ** 2 @ values for rows in _arrays.row_blocks(vectors)])


def best_round(path: "DistillationPath", criterion: str = "gcv") -> RoundChoice:
    """The round of least score, with standard errors and the choice at other tolerances."""
    check_criterion(criterion)
    path.check_has_fits()
    xp = _arrays.namespace(path.y)
    contributions = _contributions(path, criterion)
    values = _means(xp, contributions) if criterion == "loo" else scores(path, criterion)
    best = _least(values, criterion)
    choice = RoundChoice(best + 1)
    choice.criterion = criterion
    choice.scores = values
    choice.standard_errors = xp.stack([_standard_error(xp, each) for each in contributions])
    choice.difference_errors = xp.stack([_standard_error(xp, each - contributions[best]) for each in contributions])
    choice.other_tolerances = {factor: _choice_at(path, factor, criterion) for factor in OTHER_TOLERANCES}
    return choice


def _standard_error(xp: Any, contributions: Any) -> Any:
    points = contributions.shape[0]
    if points < 2 or not bool(xp.all(xp.isfinite(contributions))):
        return xp.asarray(xp.nan)
    size = float(xp.max(xp.abs(contributions))) or 1.0  # whose square may be beyond float64
    return xp.std(contributions / size, correction=1) * (size / points**0.5)


def _choice_at(path: "DistillationPath", factor: float, criterion: str) -> tuple[int, float] | None:
    other = path.at_tolerance(factor)
    if len(other) == 0:
        return None
    values = _arrays.to_numpy(scores(other, criterion))
    best = int(np.argmin(values))
    return (best + 1, float(values[best])) if np.isfinite(values[best]) else None


def ridge_of_least_gcv(values: Any, energy: Any) -> tuple[float, float, float]:
    """The single fit to compare with: ordinary ridge regression with the c of least GCV.

    Args:
        values: Eigenvalues d of G (K,).
        energy: z² summed over the outputs (K,).

    Returns:
        c, ‖(I − S)y‖², and tr(I − S).
    """
    xp = _arrays.namespace(values)
    ridges = float(xp.max(values)) * 10.0 ** xp.linspace(-9, 2, 221)
    left = ridges[None, :] / (ridges[None, :] + values[:, None])
    residual, freedom = energy @ left**2, xp.sum(left, axis=0)
    best = int(xp.argmin(_over_squared(xp, residual, freedom)))
    return float(ridges[best]), float(residual[best]), float(freedom[best])


def noise_rate(path: "DistillationPath", convention: str = "all", round: int | None = None) -> float:
    """The share of labels that the leave-one-out predictions of a round contradict, as a noise rate."""
    if convention not in ("all", "others"):
        raise ValueError(f"convention: got {convention!r}, wanted 'all' or 'others'")
    path.check_has_fits()
    xp, vectors = _arrays.namespace(path.y), path.spectrum.vectors
    given, zero, classes = _classes(xp, path.y)
    chosen = _least(scores(path), "gcv") + 1 if round is None else _arrays.check_round(round, len(path))
    left = path.residual_columns(chosen)
    share = _diagonal(vectors, left)
    usable = share > 1e-12
    held_out = path.y - xp.where(usable, vectors @ (left * path.rotated) / xp.where(usable, share, 1.0), 0.0)
    predicted = (
        held_out[:, 0] > zero[0] if classes == 2 and path.y.shape[1] == 1 else xp.argmax(held_out - zero, axis=1)
    )
    disagreement = float(xp.mean(xp.astype(predicted != given, xp.float64)))
    return min(1.0, disagreement * (classes / (classes - 1) if convention == "all" else 1.0))


def _classes(xp: Any, y: Any) -> tuple[Any, Any, int]:
    """The class of each point, the value that stands for no class in each column, and the number of classes."""
    low, high = xp.min(y, axis=0), xp.max(y, axis=0)
    if y.shape[1] == 1:
        if not bool(xp.all((y == low) | (y == high))):
            raise ValueError("noise_rate: y has more than two values, wanted class labels: one-hot rows, or two values")
        middle = (low + high) / 2
        return y[:, 0] > middle[0], middle, 2
    size = float(xp.max(high - low))
    shifted = (y - low) / size  # one-hot, whatever was subtracted from the columns
    hot = xp.sum(xp.astype(xp.abs(shifted - 1) < 1e-6, xp.int64), axis=1)
    cold = xp.sum(xp.astype(xp.abs(shifted) < 1e-6, xp.int64), axis=1)
    if not bool(xp.all((hot == 1) & (cold == y.shape[1] - 1))):
        raise ValueError("noise_rate: y is not one-hot (less a constant per column), wanted class labels")
    return xp.argmax(shifted, axis=1), low, y.shape[1]
