"""What a round equals: one ridge regression with another kernel (eq. 25), but not one that stops early (§3.4)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdfast.hilbert import _arrays, secular

if TYPE_CHECKING:
    from sdfast.hilbert.path import DistillationPath

__all__ = ["EarlyStoppingMatch"]


@dataclass(frozen=True)
class EarlyStoppingMatch:
    """Each round beside one single fit, stopped early enough to have the same error on the labels (paper §3.4).

    Each field has one entry a round; the contrasts are over the eigenvalues that are not zero.

    Attributes:
        label_error: ‖f_t − y‖² / K of both.
        c: The single fit's multiplier.
        contrast: log₁₀(largest / smallest entry of B_t): how sparse self-distillation is.
        early_stopping_contrast: The same of the single fit.
        limit: log₁₀(d_max / d_min), which no single fit exceeds.
        degrees_of_freedom: tr(B_t).
        early_stopping_degrees_of_freedom: The same of the single fit.
    """

    label_error: Any
    c: Any
    contrast: Any
    early_stopping_contrast: Any
    limit: float
    degrees_of_freedom: Any
    early_stopping_degrees_of_freedom: Any


def equivalent_spectrum(path: "DistillationPath", round: int) -> Any:
    """d† = c_0 / (∏_i (d + c_i) / d − 1) = c_0 B / (1 − B), (K, 1) or (K, Q); zero where d is.

    B as a product and 1 − B from logarithms are each exact to rounding: the one formula with the logarithms alone loses
    as many units in the last place as −log B is large.
    """
    round = _arrays.check_round(round, len(path))
    return path.multipliers[0, :] * (path.filter_columns(round) / path.residual_columns(round))


def _column(path: "DistillationPath", round: int, output: int | None) -> Any:
    values = equivalent_spectrum(path, round)
    if values.shape[1] == 1 and output is None:
        return values[:, 0]
    if path.joint or path.single or output is None:
        wanted = "None: one kernel serves all" if path.joint or path.single else f"0 to {values.shape[1] - 1}"
        raise ValueError(f"output: got {output}, wanted {wanted} (joint={path.joint})")
    if _arrays.check_count("output", output, 0) >= values.shape[1]:
        raise ValueError(f"output: got {output}, wanted 0 to {values.shape[1] - 1}")
    return values[:, output]


def equivalent_gram(path: "DistillationPath", round: int, output: int | None) -> Any:
    """K V diag(d†) Vᵀ."""
    values, vectors = _column(path, round, output), path.spectrum.vectors
    return path.points * (vectors * values[None, :]) @ vectors.T


def equivalent_cross_gram(path: "DistillationPath", cross: Any, round: int, output: int | None) -> Any:
    """g†_x = V D† D⁻¹ Vᵀ g_x, rows of `cross` being g_x."""
    xp, d, vectors = _arrays.namespace(path.y), path.spectrum.values, path.spectrum.vectors
    ratio = xp.where(d > 0, _column(path, round, output) / xp.where(d > 0, d, 1.0), 0.0)
    return cross @ (vectors * ratio[None, :]) @ vectors.T


def early_stopping_match(path: "DistillationPath") -> EarlyStoppingMatch:
    """One single fit per round with the round's error on the labels, found by the same secular equation."""
    if not (path.joint or path.single):
        raise NotImplementedError("early_stopping_match: compares paths with one ε, wanted joint=True")
    path.check_has_fits()
    xp, d = _arrays.namespace(path.y), path.spectrum.values
    energy = xp.sum(path.rotated**2, axis=1, keepdims=True)
    errors = path.label_error  # (fits,)
    c, _ = secular.solve_path(d, energy / (path.points * errors[None, :]), 1, backend=path.backend)
    kept = d > 0
    logs = [xp.log10(after[kept, 0]) for _, after, _ in path.each_round()]
    single = d[:, None] / (c + d[:, None])  # (K, fits)
    single_logs = xp.log10(single[kept, :])
    return EarlyStoppingMatch(
        label_error=errors,
        c=c[0, :],
        contrast=xp.stack([xp.max(each) - xp.min(each) for each in logs]),
        early_stopping_contrast=xp.max(single_logs, axis=0) - xp.min(single_logs, axis=0),
        limit=float(xp.log10(xp.max(d) / xp.min(d[kept]))),
        degrees_of_freedom=path.degrees_of_freedom,
        early_stopping_degrees_of_freedom=xp.sum(single, axis=0),
    )
