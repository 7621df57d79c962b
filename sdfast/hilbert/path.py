"""The rounds of self-distillation on a kernel, in closed form (Mobahi, Farajtabar, Bartlett 2020)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sdfast.hilbert import _arrays, equivalent, secular, selection
from sdfast.hilbert.spectrum import Infeasible, Spectrum, find_infeasible

__all__ = ["DistillationPath", "distill_spectrum"]

MOST_FITS = 10_000  # of a path without `rounds`


def distill_spectrum(
    spectrum: Spectrum,
    y: Any,
    epsilon: Any,
    *,
    rounds: int | None = None,
    joint: bool = True,
    single: bool = False,
    backend: str | None = None,
    points: float | None = None,
) -> "DistillationPath":
    """`self_distill` on a decomposed Gram matrix, arguments already checked.

    Args:
        spectrum: Of G.
        y: (rows, outputs) float64.
        epsilon: (1,) for a joint ε, else (outputs,).
        rounds: The most fits.
        joint: Whether one ε holds for all outputs.
        single: Whether y came as one vector.
        backend: Of the multipliers.
        points: K where it is not the number of rows: the sum of sample weights.

    Returns:
        The path.
    """
    xp = _arrays.namespace(y)
    points = y.shape[0] if points is None else points
    rotated = spectrum.vectors.T @ y  # z
    energy = rotated * rotated
    if joint:
        energy = xp.sum(energy, axis=1, keepdims=True)
    weights = energy / (points * epsilon)
    c, counts = secular.solve_path(spectrum.values, weights, MOST_FITS if rounds is None else rounds, backend=backend)
    unreachable = xp.sum(xp.where(spectrum.values[:, None] > 0, 0.0, energy), axis=0) / points
    return DistillationPath(
        spectrum=spectrum,
        y=y,
        rotated=rotated,
        tolerance=epsilon,
        multipliers=c,
        counts=tuple(int(count) for count in counts),
        asked=rounds or MOST_FITS,
        infeasible=find_infeasible(spectrum, unreachable, epsilon),
        joint=joint,
        single=single,
        points=points,
        backend=backend,
    )


@dataclass(frozen=True, eq=False, repr=False)
class DistillationPath:
    """What `self_distill` returns: every round of self-distillation on the training points and off them.

    A `round` counts fits: round 1 is ordinary training (the paper's t = 0), and entry ``round - 1`` of a field is its
    own. K points, Q outputs; per-round arrays lose the last axis for a joint ε, and Q where y was one vector. Fields
    of size rounds × K are made when asked for; the path itself holds c.

    Attributes:
        spectrum: Eigenvalues d and eigenvectors V of G = gram / K.
        y: The labels (K, Q).
        rotated: z = Vᵀ y (K, Q).
        tolerance: ε (1,), or (Q,) without ``joint``.
        multipliers: c (fits, 1), or (fits, Q) without ``joint``; ``inf`` once an output has collapsed, NaN for one
            that is infeasible.
        counts: Fits before the collapse, per column of `multipliers`.
        asked: The most fits that were asked for.
        infeasible: Why ε cannot be met, or ``None`` where it can.
        joint: Whether one ε holds for all outputs together.
        single: Whether y was one vector.
        points: K; the sum of the sample weights where there are any.
        backend: Of the multipliers, as it was asked for.
    """

    spectrum: Spectrum
    y: Any
    rotated: Any
    tolerance: Any
    multipliers: Any
    counts: tuple[int, ...]
    asked: int
    infeasible: Infeasible | None
    joint: bool
    single: bool
    points: float
    backend: str | None = None

    def __len__(self) -> int:
        """The number of fits."""
        return self.multipliers.shape[0]

    def __repr__(self) -> str:
        end = f"infeasible: {self.infeasible}" if self.infeasible else f"collapsed_at={self.collapsed_at}"
        points, outputs = self.y.shape
        return f"DistillationPath({len(self)} fits, {points} points, {outputs} outputs, joint={self.joint}, {end})"

    @property
    def c(self) -> Any:
        """The multiplier of each fit: (fits,), or (fits, Q) without ``joint``."""
        return self._per_column(self.multipliers)

    @property
    def collapsed_at(self) -> Any:
        """How many fits precede the collapse to zero, or ``None`` where it was not reached; a tuple without ``joint``.

        In the paper's count from t = 0 it is the round that collapses.
        """
        unfit = self.infeasible.outputs if self.infeasible else ()
        ends = [None if n >= self.asked or i in unfit else n for i, n in enumerate(self.counts)]
        return ends[0] if self.joint or self.single else tuple(ends)

    @property
    def A(self) -> Any:  # noqa: N802  the paper's name
        """Diagonals d / (c_t + d) (fits, K[, Q]): what each fit does to its own targets (eq. 13)."""
        return self._per_column(self._step_filters())

    @property
    def B(self) -> Any:  # noqa: N802  the paper's name
        """Diagonals of B_t = A_0 ⋯ A_t (fits, K[, Q]): what all fits so far do to the labels (eq. 19)."""
        return self._per_column(_arrays.namespace(self.y).cumulative_prod(self._step_filters(), axis=0))

    @property
    def targets(self) -> Any:
        """y_t (fits, K[, Q]): what each fit learns; the labels, then the fit before it."""
        xp = _arrays.namespace(self.y)
        return self._per_output(xp.stack([self.y, *self._fitted()][: len(self)])) if len(self) else self.predictions

    @property
    def predictions(self) -> Any:
        """f_t on the training points (fits, K[, Q])."""
        xp = _arrays.namespace(self.y)
        return self._per_output(xp.stack(self._fitted()) if len(self) else xp.zeros((0, *self.y.shape)))

    @property
    def norms(self) -> Any:
        """‖y_t‖ of each fit's targets (fits,), or (fits, Q) without ``joint``; the collapse comes below √(Kε)."""
        xp = _arrays.namespace(self.y)
        return xp.sqrt(self._energies([before * self.rotated for before, _, _ in self.each_round()]))

    @property
    def training_error(self) -> Any:
        """‖f_t − y_t‖² / K of each fit against its own targets: ε up to rounding, below it where a fit is zero."""
        d = self.spectrum.values[:, None]
        rounds = zip(self.multipliers, self.each_round(), strict=True)
        return self._energies([before * self.rotated / (1 + d / c) for c, (before, _, _) in rounds]) / self.points

    @property
    def label_error(self) -> Any:
        """‖f_t − y‖² / K of each fit against the labels given."""
        return self._energies([left * self.rotated for _, _, left in self.each_round()]) / self.points

    @property
    def degrees_of_freedom(self) -> Any:
        """tr(B_t), the effective number of parameters of each fit: (fits,), or (fits, Q) without ``joint``."""
        xp = _arrays.namespace(self.y)
        sums = [xp.sum(after, axis=0) for _, after, _ in self.each_round()]
        return self._per_column(xp.stack(sums) if sums else self.multipliers)

    def each_round(self) -> Iterator[tuple[Any, Any, Any]]:
        """Round after round B before it, B after it, and 1 − B after it, each (K, 1) or (K, Q)."""
        xp, d = _arrays.namespace(self.y), self.spectrum.values[:, None]
        before, shrinkage = xp.stack([xp.ones_like(d[:, 0])] * self.multipliers.shape[1], axis=1), 0.0
        for c in self.multipliers:
            after = before * (d / (c + d))
            shrinkage = shrinkage + self._log_step(c)
            yield before, after, -xp.expm1(-shrinkage)
            before = after

    def filter_columns(self, round: int) -> Any:
        """B after `round` fits, (K, 1) or (K, Q): what the fits do to the rotated labels."""
        d, c = self.spectrum.values[:, None], self.multipliers
        product = d / (c[0, :] + d)
        for t in range(1, round):
            product = product * (d / (c[t, :] + d))
        return product

    def residual_columns(self, round: int) -> Any:
        """1 − B after `round` fits, (K, 1) or (K, Q), exact to rounding also where B is near 1."""
        return -_arrays.namespace(self.y).expm1(-self.log_shrinkage(round))

    def predict(self, cross_gram: Any, round: int) -> Any:
        """f_t at other points: g_xᵀ (c_t I + G)⁻¹ y_t, with g_x = cross_gram / K (eq. 14).

        Args:
            cross_gram: (points, K) kernel values g(x, x_k), not divided by K.
            round: 1 is ordinary training.

        Returns:
            (points,), or (points, Q).

        Raises:
            ValueError: The shape does not fit, or there is no such round.
        """
        cross = _arrays.check_cross_gram(cross_gram, self.y)
        predicted = cross @ self.dual_coefficients(_arrays.check_round(round, len(self)))
        return predicted[:, 0] if self.single else predicted

    def dual_coefficients(self, round: int) -> Any:
        """The weights (K, Q) of the kernel's sections: f(x) = Σ_k g(x, x_k) weight_k; no inverse of D is needed."""
        round = _arrays.check_round(round, len(self))
        d, c = self.spectrum.values[:, None], self.multipliers[round - 1, :]
        before = self.filter_columns(round - 1) if round > 1 else 1.0
        return self.spectrum.vectors @ (before / (c + d) * self.rotated) / self.points

    def equivalent_spectrum(self, round: int) -> Any:
        """Eigenvalues d† (K[, Q]) of the kernel whose ordinary ridge fit with c_0 is this round (eq. 25).

        d† = c_0 / (∏_i (d + c_i) / d − 1).

        Args:
            round: 1 gives d itself.

        Returns:
            d†, in the order of `spectrum.values`.
        """
        return self._per_column(equivalent.equivalent_spectrum(self, round)[None])[0]

    def equivalent_gram(self, round: int, *, output: int | None = None) -> Any:
        """The Gram matrix (K, K) of that kernel, in the units of `gram`.

        Args:
            round: 1 gives the Gram matrix itself (but for eigenvalues under the rank cut).
            output: Whose, without ``joint``.

        Returns:
            K V diag(d†) Vᵀ.
        """
        return equivalent.equivalent_gram(self, round, output)

    def equivalent_cross_gram(self, cross_gram: Any, round: int, *, output: int | None = None) -> Any:
        """That kernel between other points and the training points: g†_x = V D† D⁻¹ Vᵀ g_x.

        Ordinary ridge regression with it and `equivalent_gram` predicts what `predict` does.

        Args:
            cross_gram: (points, K) kernel values g(x, x_k).
            round: 1 gives their projection on the kernel's span.
            output: Whose, without ``joint``.

        Returns:
            (points, K), in the units of `cross_gram`.
        """
        cross = _arrays.check_cross_gram(cross_gram, self.y)
        return equivalent.equivalent_cross_gram(self, cross, round, output)

    def early_stopping_match(self) -> equivalent.EarlyStoppingMatch:
        """Each round beside one single fit of the same error on the labels (paper §3.4)."""
        return equivalent.early_stopping_match(self)

    def scores(self, criterion: str = "gcv") -> Any:
        """An estimate of each round's error on new points from the labels alone, (fits,); `best_round` takes the least.

        Args:
            criterion: ``"gcv"`` or ``"loo"`` (see `best_round`).

        Returns:
            Mean squared errors, summed over the outputs; ``inf`` where a fit leaves no degrees of freedom.
        """
        return selection.scores(self, criterion)

    def best_round(self, criterion: str = "gcv") -> selection.RoundChoice:
        """The round that promises the least error on new points, judged from the labels alone.

        Args:
            criterion: ``"gcv"``: ‖(I − S)y‖²/K / (1 − tr S/K)² with S = V B_t Vᵀ. ``"loo"``: the mean of
                (residual_i / (1 − S_ii))², leave-one-out of the round's equivalent kernel with its Gram matrix and the
                multipliers held.

        Returns:
            The round, an integer that also carries scores, standard errors and the choice at other tolerances.
        """
        return selection.best_round(self, criterion)

    def noise_rate(self, *, convention: str = "all", round: int | None = None) -> float:
        """An upper estimate of the share of wrong class labels: the share that leave-one-out predictions contradict.

        It counts the model's own errors too, so it comes out too high.

        Args:
            convention: The rate of which noise, named as in ``sdfast.data.flip_labels``: ``"all"``, labels redrawn
                over all C classes with this probability, the disagreement times C / (C − 1); or ``"others"``, labels
                turned into one of the others, the disagreement itself.
            round: Whose predictions. ``None``: `best_round`.

        Returns:
            The estimate, at most 1.
        """
        return selection.noise_rate(self, convention, round)

    def at_tolerance(self, factor: float, *, rounds: int | None = None) -> "DistillationPath":
        """The path at another ε from the same decomposition.

        Args:
            factor: Of the present ε, above 0.
            rounds: The most fits; ``None`` as many as were asked for here.

        Returns:
            The path; without fits where that ε collapses at once.

        Raises:
            ValueError: An argument has an impossible value.
        """
        factor = _arrays.check_number("factor", factor)
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"factor: got {factor}, wanted a finite number > 0")
        rounds = self.asked if rounds is None else _arrays.check_count("rounds", rounds)
        return distill_spectrum(
            self.spectrum,
            self.y,
            self.tolerance * factor,
            rounds=rounds,
            joint=self.joint,
            single=self.single,
            points=self.points,
            backend=self.backend,
        )

    def to_dataframe(self) -> Any:
        """A pandas table, one row a round (and output, without ``joint``)."""
        from sdfast.hilbert import figures

        return figures.dataframe(self)

    def plot(self) -> Any:
        """A matplotlib figure: bars of B_t, and c, norms, errors and degrees of freedom over the rounds."""
        from sdfast.hilbert import figures

        return figures.plot(self)

    def log_shrinkage(self, round: int) -> Any:
        """−log B after `round` fits, (K, 1) or (K, Q): Σ_i log(1 + c_i / d), infinite where d is zero."""
        return sum(
            (self._log_step(self.multipliers[t, :]) for t in range(1, round)), self._log_step(self.multipliers[0, :])
        )

    def _log_step(self, c: Any) -> Any:
        xp, d = _arrays.namespace(self.y), self.spectrum.values[:, None]
        return xp.log1p(c * xp.where(d > 0, 1 / xp.where(d > 0, d, 1.0), xp.inf))

    def check_has_fits(self) -> None:
        """Refuses a path on which something was not fitted.

        Raises:
            ValueError: The labels, or those of an output, are infeasible; or ε collapses at once.
        """
        if self.infeasible or len(self) == 0:
            where = "" if self.joint or self.infeasible is None else f" for outputs {self.infeasible.outputs}"
            raise ValueError(
                f"path: has no fits{where}: {self.infeasible or 'the zero function is within the tolerance'}"
            )

    def _step_filters(self) -> Any:  # (fits, K, 1 or Q)
        d = self.spectrum.values[None, :, None]
        return d / (self.multipliers[:, None, :] + d)

    def _fitted(self) -> list[Any]:
        return [self.spectrum.vectors @ (after * self.rotated) for _, after, _ in self.each_round()]

    def _energies(self, rotated: list[Any]) -> Any:
        """The squared norm of each round's rotated vectors, summed over the outputs of a joint ε."""
        xp = _arrays.namespace(self.y)
        if not rotated:
            return self.c
        sums = xp.stack([xp.sum(each * each, axis=0) for each in rotated])  # (fits, Q)
        return self._per_column(xp.sum(sums, axis=1, keepdims=True) if self.joint else sums)

    def _per_column(self, values: Any) -> Any:
        return values[..., 0] if self.joint or self.single else values

    def _per_output(self, values: Any) -> Any:
        return values[..., 0] if self.single else values
