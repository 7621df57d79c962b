"""The entry to self-distillation in a Hilbert space: checks the arguments, decomposes, runs the rounds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdfast.hilbert import _arrays
from sdfast.hilbert.path import DistillationPath, distill_spectrum
from sdfast.hilbert.spectrum import check_overwrite, decompose_checked

__all__ = ["self_distill"]

SMALLEST_TOLERANCE = 1e-303  # squares are summed beside it, and below 1e-308 they are rounded to 5e-324


def self_distill(
    gram: Any,
    y: Any,
    *,
    tolerance: float | Sequence[float] | None = None,
    relative_tolerance: float | None = None,
    rounds: int | None = None,
    joint: bool = True,
    jitter: float = 0.0,
    rank_tolerance: float | None = None,
    overwrite_gram: bool = False,
    backend: str | None = None,
) -> DistillationPath:
    """Fits labels to within ε, then the fit's own predictions to within ε, and so on until the solution collapses.

    Round t minimises the kernel's norm R(f) subject to ‖f − y_t‖² / K ≤ ε, with y_0 = y and y_{t+1} = f_t on the
    training points: f_t = G (c_t I + G)⁻¹ y_t, where **G = gram / K** and c_t is the multiplier that meets ε exactly
    (Propositions 1 and 2). One eigendecomposition, then O(K · outputs) a round. Everything is float64.

    Args:
        gram: (K, K) kernel values g(x_j, x_k): NumPy, CuPy, or anything with ``__dlpack__`` such as the Gram matrix of
            ``sdfast.ntk``. Not divided by K.
        y: Labels, floats: (K,) or (K, outputs), such as one-hot rows less their mean.
        tolerance: ε, the mean squared error of each fit; with ``joint`` summed over the outputs. With ``joint=False``
            also one per output.
        relative_tolerance: ε as a share of the label energy ‖y‖² / K, in (0, 1), instead of `tolerance`.
        rounds: How many fits: 1 is ordinary training (the paper's t = 0). ``None``: until the collapse, at most 10,000.
        joint: One ε and one c for all outputs together; otherwise each output has its own.
        jitter: Added to gram's diagonal.
        rank_tolerance: Eigenvalues up to this share of the largest count as zero (``decompose`` has the default).
        overwrite_gram: Put the eigenvectors into gram's own memory, a float64 NumPy matrix: beyond it O(K · outputs) is
            needed, in exchange for an eigendecomposition that takes several times as long.
        backend: Of the multipliers: ``"native"``, ``"array"``, or the best there is.

    Returns:
        The path. Where labels cannot be fitted to within ε, because eigenvalues are zero, `path.infeasible` says so.

    Raises:
        TypeError: An argument has the wrong type; class labels are integers, and must be coded first. Or gram is to be
            overwritten, and cannot be.
        ValueError: An argument has an impossible value: both or neither tolerance, an indefinite Gram matrix, all
            labels equal, or an ε that is not above zero or that already the zero function meets (collapse).
    """
    if rounds is not None:
        rounds = _arrays.check_count("rounds", rounds)
    joint = _arrays.check_flag("joint", joint)
    overwrite_gram = check_overwrite(overwrite_gram, gram)
    checked = _arrays.check_gram(gram)
    columns, single = _arrays.check_targets(y, checked)
    epsilon = _tolerance(columns, tolerance, relative_tolerance, joint)
    spectrum = decompose_checked(checked, jitter, rank_tolerance, overwrite_gram)
    return distill_spectrum(spectrum, columns, epsilon, rounds=rounds, joint=joint, single=single, backend=backend)


def _tolerance(y: Any, tolerance: Any, relative_tolerance: float | None, joint: bool) -> Any:
    """ε per column of weights, (1,) or (outputs,)."""
    xp = _arrays.namespace(y)
    if (tolerance is None) == (relative_tolerance is None):
        got = "neither" if tolerance is None else f"both, {tolerance} and {relative_tolerance}"
        raise ValueError(f"tolerance, relative_tolerance: got {got}, wanted exactly one")
    with np.errstate(over="ignore"):  # said below
        energy = xp.sum(y * y, axis=0) / y.shape[0]
    if joint:
        energy = xp.sum(energy, keepdims=True)
    if not xp.all(xp.isfinite(energy) & (energy > 0)):
        worst = int(xp.argmin(xp.where(xp.isfinite(energy), energy, -1.0)))
        which = "" if joint else f" of output {worst}"
        raise ValueError(
            f"y: its energy ‖y‖²/K{which} is {float(energy[worst])} in float64, wanted a finite number > 0: labels "
            "that are all zero have nothing to distil, others want another unit"
        )
    if relative_tolerance is not None:
        relative_tolerance = _arrays.check_number("relative_tolerance", relative_tolerance)
        if not 0 < relative_tolerance < 1:
            raise ValueError(
                f"relative_tolerance: got {relative_tolerance}, wanted within (0, 1): at 1 the zero function already "
                "fits, the solution collapses"
            )
        epsilon = relative_tolerance * energy
    else:
        given = _arrays.as_array("tolerance", tolerance)
        if not _arrays.is_floating(given) and _arrays.namespace(given).isdtype(given.dtype, "bool"):
            raise TypeError(f"tolerance: got {tolerance}, wanted a number")
        if given.ndim > 1 or (given.ndim == 1 and given.shape[0] != energy.shape[0]):
            wanted = "a number" if joint else f"a number or {energy.shape[0]} of them"
            raise ValueError(f"tolerance: got shape {tuple(given.shape)} with joint={joint}, wanted {wanted}")
        epsilon = xp.zeros_like(energy) + xp.asarray(_arrays.to_numpy(given), dtype=xp.float64)
        if not xp.all(epsilon > 0):
            raise ValueError(f"tolerance: got {tolerance}, wanted > 0: no finite c reaches exact interpolation")
    if not xp.all(epsilon >= SMALLEST_TOLERANCE):
        raise ValueError(
            f"tolerance: comes to {float(xp.min(epsilon)):.3g}, wanted at least {SMALLEST_TOLERANCE}: squares "
            "below it lose their digits in float64, so give y another unit"
        )
    if not xp.all(energy > epsilon):
        worst = int(xp.argmin(energy - epsilon))
        which = "" if joint else f" of output {worst}"
        raise ValueError(
            f"tolerance: got {float(epsilon[worst]):.6g}, wanted below {float(energy[worst]):.6g}, the label energy "
            f"‖y‖²/K{which}: from there on the zero function is the smallest that fits, the solution collapses at once"
        )
    return epsilon
