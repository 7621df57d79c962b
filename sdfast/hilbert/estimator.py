"""Self-distillation in a Hilbert space as scikit-learn estimators that choose their own tolerance and round."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from sdfast.hilbert import _arrays, kernels, selection
from sdfast.hilbert.path import DistillationPath, distill_spectrum
from sdfast.hilbert.spectrum import Spectrum, decompose_checked

__all__ = ["KernelSelfDistillation", "KernelSelfDistillationClassifier"]

FRACTIONS = tuple(np.geomspace(0.002, 0.9, 12))  # of the label energy: the tolerances tried by "auto"
MOST_ROUNDS = 50  # tried by "auto"
_OPTIONS = {  # which of the estimator's own parameters a kernel takes
    "rbf": ("gamma",),
    "laplacian": ("gamma",),
    "polynomial": ("gamma", "degree", "coef0"),
}


class _KernelSelfDistillation(BaseEstimator):
    """What the regressor and the classifier share: everything but the coding of the targets."""

    def __init__(
        self,
        kernel: str | Callable[..., Any] = "rbf",
        *,
        gamma: float | None = None,
        degree: float = 3,
        coef0: float = 1,
        kernel_params: dict[str, Any] | None = None,
        rounds: int | str = "auto",
        tolerance: float | str = "auto",
        relative_tolerance: float | None = None,
        ridge: float | None = None,
    ):
        self.kernel = kernel
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.kernel_params = kernel_params
        self.rounds = rounds
        self.tolerance = tolerance
        self.relative_tolerance = relative_tolerance
        self.ridge = ridge

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = isinstance(self.kernel, str) and self.kernel == "precomputed"
        return tags

    def _gram(self, x1: np.ndarray, x2: np.ndarray | None) -> np.ndarray:
        parameters = {name: getattr(self, name) for name in self._kernel_options} | (self.kernel_params or {})
        return kernels.gram(self.kernel, x1, x2, **parameters)

    @property
    def _kernel_options(self) -> tuple[str, ...]:
        return _OPTIONS.get(self.kernel, ()) if isinstance(self.kernel, str) else ()

    def _check_kernel_options(self) -> None:
        """An option that the kernel does not take, or that is given twice, is refused."""
        given = {} if self.kernel_params is None else self.kernel_params
        if not isinstance(given, dict):
            raise TypeError(f"kernel_params: got {type(given).__name__}, wanted a dictionary")
        for name, default in (("gamma", None), ("degree", 3), ("coef0", 1)):
            value = getattr(self, name)
            if value is default or value == default:
                continue
            if name not in self._kernel_options:
                raise ValueError(
                    f"{name}: got {value}, which kernel={self.kernel!r} does not take (kernel_params has the others)"
                )
            if name in given:
                raise ValueError(f"{name}: got {value}, and {given[name]} in kernel_params, wanted one of them")

    def _fit(self, x: np.ndarray, y: np.ndarray, sample_weight: Any) -> None:
        """Fits (n, outputs) targets; sets everything that `_predict` needs."""
        self._check_options()
        weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        kept = weight > 0
        self.X_fit_, y, weight = x[kept], y[kept], weight[kept]
        self._kept = kept
        self.intercept_ = np.average(y, axis=0, weights=weight)
        total = float(weight.sum())
        root = np.sqrt(weight)
        self.rounds_, self.tolerance_, self.multipliers_, self.gcv_ = 0, 0.0, np.zeros(0), math.nan
        self.degrees_of_freedom_ = 0.0
        self.dual_coef_ = np.zeros_like(y)
        if (y == y[0]).all():
            return  # a constant is predicted by the intercept
        spectrum = self._spectrum(root, total)
        centred = root[:, None] * (y - self.intercept_)
        mean_direction = (spectrum.vectors.T @ (root / math.sqrt(total))) ** 2
        best = self._choose(spectrum, centred, total, mean_direction)
        if best is None:
            return
        path, self.rounds_, self.gcv_ = best
        self.tolerance_ = float(path.tolerance[0])
        self.multipliers_ = path.c[: self.rounds_]
        self.degrees_of_freedom_ = float(path.filter_columns(self.rounds_).sum())
        self.dual_coef_ = root[:, None] * path.dual_coefficients(self.rounds_)

    def _check_options(self) -> None:
        self._check_kernel_options()
        if isinstance(self.rounds, str) and self.rounds != "auto":
            raise ValueError(f"rounds: got {self.rounds!r}, wanted an integer or 'auto'")
        if self.rounds != "auto":
            _arrays.check_count("rounds", self.rounds)
        given = []
        for name, high in (("tolerance", math.inf), ("relative_tolerance", 1), ("ridge", math.inf)):
            value = getattr(self, name)
            if value is None and name != "tolerance":
                continue
            if isinstance(value, str) and name == "tolerance":
                if value == "auto":
                    continue
                raise ValueError(f"tolerance: got {value!r}, wanted a number or 'auto'")
            if not 0 < _arrays.check_number(name, value) < high:
                raise ValueError(f"{name}: got {value!r}, wanted a number in (0, {high})")
            given.append(f"{name}={value}")
        if len(given) > 1:
            raise ValueError(f"{', '.join(given)}: wanted one of tolerance, relative_tolerance and ridge")

    def _spectrum(self, root: np.ndarray, total: float) -> Spectrum:
        """Of G = W^½ K W^½ / Σw."""
        gram = self._gram(self.X_fit_, None)
        if isinstance(self.kernel, str) and self.kernel == "precomputed":
            if gram.shape[1] != len(self._kept):
                raise ValueError(f"X: got {gram.shape[1]} columns with kernel='precomputed', wanted {len(self._kept)}")
            gram = gram[:, self._kept]
        checked = _arrays.check_gram(gram) * np.outer(root, root)
        # The cut of a data set in which each point stands as often as its weight says.
        unit = max(total, len(root)) * 2.0**-52 if checked.dtype == np.float64 else None
        spectrum = decompose_checked(checked, 0.0, unit, False)
        return Spectrum(spectrum.values * (len(root) / total), spectrum.vectors, spectrum.rank)

    def _choose(
        self, spectrum: Spectrum, y: np.ndarray, total: float, mean_direction: np.ndarray
    ) -> tuple[DistillationPath, int, float] | None:
        """The path, its round and the GCV there; ``None`` for the zero function."""
        best: tuple[DistillationPath, int, float] | None = None
        fitted = False
        for path in self._paths(spectrum, y, total):
            if len(path) < (1 if self.rounds == "auto" else int(self.rounds)):
                continue
            fitted = True
            scores = selection.scores(path, "gcv", mean_direction)
            at = int(np.argmin(scores)) if self.rounds == "auto" else int(self.rounds) - 1
            fixed = self.rounds != "auto" and not self._searches
            if (np.isfinite(scores[at]) or fixed) and (best is None or scores[at] < best[2]):
                best = path, at + 1, float(scores[at])
        if best is None and fitted:
            raise ValueError(
                f"sample_weight: sums to {total:.3g}, less than the degrees of freedom of every fit: weights count "
                "samples here, so give them that scale, or fix rounds and tolerance"
            )
        return best

    @property
    def _searches(self) -> bool:
        return isinstance(self.tolerance, str) and self.relative_tolerance is None and self.ridge is None

    def _paths(self, spectrum: Spectrum, y: np.ndarray, total: float) -> Iterator[DistillationPath]:
        """The paths to choose from; those that are infeasible or collapse at once have no fits."""
        most = MOST_ROUNDS if self.rounds == "auto" else int(self.rounds)
        energy = float((y * y).sum()) / total
        if self.ridge is not None:
            yield _ridge_path(spectrum, y, float(self.ridge), most, total)
            return
        if self._searches:
            fractions: tuple[float, ...] = FRACTIONS
        elif self.relative_tolerance is not None:
            fractions = (float(self.relative_tolerance),)
        else:
            fractions = (float(self.tolerance) / energy,)
        for fraction in fractions:
            path = distill_spectrum(spectrum, y, np.array([fraction * energy]), rounds=most, points=total)
            if not self._searches:
                self._check_fixed(path, fraction, most)
            yield path

    def _check_fixed(self, path: DistillationPath, fraction: float, most: int) -> None:
        """A tolerance that was asked for is met, or refused, or said to end in the zero function."""
        if path.infeasible:
            raise ValueError(f"tolerance: {path.infeasible}")
        if len(path) == 0 or (self.rounds != "auto" and len(path) < most):
            after = f"after {len(path)} of {most} rounds" if fraction < 1 else "at once"
            warnings.warn(
                f"the solution collapses to the mean {after} at a tolerance of {fraction:.3g} of the label energy",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _predict(self, x: Any) -> np.ndarray:
        """(points, outputs)."""
        check_is_fitted(self)
        x = validate_data(self, x, reset=False, dtype=np.float64)
        if isinstance(self.kernel, str) and self.kernel == "precomputed":
            cross = x[:, self._kept]
        else:
            cross = self._gram(x, self.X_fit_)
        return cross @ self.dual_coef_ + self.intercept_


def _ridge_path(spectrum: Spectrum, y: np.ndarray, ridge: float, rounds: int, total: float) -> DistillationPath:
    """Rounds that all have the same c."""
    return DistillationPath(
        spectrum=spectrum,
        y=y,
        rotated=spectrum.vectors.T @ y,
        tolerance=np.array([math.nan]),
        multipliers=np.full((rounds, 1), ridge),
        counts=(rounds,),
        asked=rounds,
        infeasible=None,
        joint=True,
        single=False,
        points=total,
    )


_PARAMETERS = """
    Args:
        kernel: A name of `sdfast.hilbert.kernels`, ``"precomputed"``, or a function of two arrays.
        gamma: Of ``"rbf"``, ``"laplacian"`` and ``"polynomial"``; ``None``: 1 / features.
        degree: Of ``"polynomial"``.
        coef0: Of ``"polynomial"``.
        kernel_params: What else the kernel takes.
        rounds: How many fits: 1 is ordinary kernel ridge regression. ``"auto"``: the round of least GCV.
        tolerance: ε, the mean squared error of each round's fit, summed over the outputs. ``"auto"``: the least GCV
            over twelve fractions of the label energy and their rounds, from one eigendecomposition.
        relative_tolerance: ε as a share of the (centred) label energy, instead.
        ridge: A fixed multiplier c for every round, instead of a tolerance; ``KernelRidge``'s alpha is K c.

    Attributes:
        rounds_: The fits made; 0 where a constant is predicted.
        tolerance_: ε; NaN with `ridge`.
        multipliers_: c of each fit.
        gcv_: GCV of the labels at the choice.
        degrees_of_freedom_: tr(B) of the fit, the mean not counted.
        dual_coef_: Weights of the kernel's sections.
        intercept_: The (weighted) mean of the targets, which is not distilled.
        X_fit_: The training points of positive weight.
    """


class KernelSelfDistillation(RegressorMixin, _KernelSelfDistillation):
    """Kernel ridge regression on its own predictions, round after round, as a regressor.

    The targets are centred; rounds and tolerance are chosen by generalised cross-validation from the labels alone.
    `sample_weight` counts samples: an integer weight equals that many copies.
    """

    __doc__ = f"{__doc__}{_PARAMETERS}"

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "KernelSelfDistillation":  # noqa: N803
        """Fits to points and targets.

        Args:
            X: (n, features), or the (n, n) Gram matrix with ``kernel="precomputed"``.
            y: (n,) or (n, outputs); one ε holds for all outputs together.
            sample_weight: (n,), none negative; zero leaves a point out.

        Returns:
            Itself.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        y = np.asarray(y, dtype=np.float64)
        self._single = y.ndim == 1
        self._fit(X, y.reshape(len(y), -1), sample_weight)
        return self

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """The fit at other points.

        Args:
            X: (points, features), or (points, n) kernel values with ``kernel="precomputed"``.

        Returns:
            (points,) or (points, outputs).
        """
        predicted = self._predict(X)
        return predicted[:, 0] if self._single else predicted


class KernelSelfDistillationClassifier(ClassifierMixin, _KernelSelfDistillation):
    """Kernel ridge regression on its own predictions, round after round, as a classifier for noisy labels.

    Classes are one-hot rows less their shares, with one ε for all; the largest output wins. Rounds and tolerance are
    chosen by generalised cross-validation from the noisy labels alone. `sample_weight` counts samples.
    """

    __doc__ = f"{__doc__}{_PARAMETERS}"

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "KernelSelfDistillationClassifier":  # noqa: N803
        """Fits to points and class labels.

        Args:
            X: (n, features), or the (n, n) Gram matrix with ``kernel="precomputed"``.
            y: (n,) labels of any type.
            sample_weight: (n,), none negative; zero leaves a point out.

        Returns:
            Itself.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, place = np.unique(y, return_inverse=True)
        self._fit(X, np.eye(len(self.classes_))[place], sample_weight)
        return self

    def decision_function(self, X: Any) -> np.ndarray:  # noqa: N803
        """The outputs: near 1 for the class, near 0 for the others.

        Args:
            X: (points, features), or (points, n) kernel values with ``kernel="precomputed"``.

        Returns:
            (points, classes); for two classes (points,), the difference, positive for the second.
        """
        outputs = self._predict(X)
        return outputs[:, 1] - outputs[:, 0] if len(self.classes_) == 2 else outputs

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """The class of the largest output.

        Args:
            X: (points, features), or (points, n) kernel values with ``kernel="precomputed"``.

        Returns:
            (points,) labels.
        """
        outputs = self._predict(X)
        return self.classes_[np.argmax(outputs, axis=1)]
