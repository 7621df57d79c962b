"""A paper's claim and the test of it: paired differences over seeds, their signs flipped."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EXACT = 16  # up to this many seeds all sign patterns are tried
DRAWS = 100_000
LEVEL = 0.05


class Claim(NamedTuple):
    """One sentence of a paper, and what the seeds say of it.

    Attributes:
        text: The claim.
        holds: Whether it does; ``None`` where there are too few seeds to say.
        size: The effect, in words.
        p: Of the one-sided sign-flip test, or ``None``.
        seeds: How many it rests on.
    """

    text: str
    holds: bool | None
    size: str
    p: float | None = None
    seeds: int = 0


def sign_flip_test(differences: Sequence[float]) -> float:
    """One-sided p of "the mean is above 0": the share of sign patterns whose sum is at least the one seen.

    Exact up to 16 differences, else from 100,000 random patterns with the one seen among them. Under the hypothesis
    that each difference is symmetric about 0, p is at most its level with that probability.

    Args:
        differences: One a seed.

    Returns:
        p, in (0, 1].

    Raises:
        ValueError: There is none, or one is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"differences: got {differences!r}, wanted finite numbers")
    seen = values.sum()
    slack = 1e-12 * np.abs(values).sum()  # sums that differ by rounding are equal
    if len(values) <= EXACT:
        patterns = np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1
        return float(np.mean((1 - 2 * patterns) @ values >= seen - slack))
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (DRAWS, len(values)))
    return float((1 + np.sum(signs @ values >= seen - slack)) / (1 + DRAWS))


def above(text: str, differences: Sequence[float], unit: str = "points", scale: float = 100.0) -> Claim:
    """The claim that paired differences have a mean above 0.

    Args:
        text: The claim.
        differences: One a seed.
        unit: In which the size is told.
        scale: From a difference to that unit.

    Returns:
        The claim, which holds where p ≤ .05; fewer than five seeds cannot say.
    """
    p = sign_flip_test(differences)
    mean = scale * math.fsum(differences) / len(differences)
    deviation = scale * float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    size = f"{mean:+.3g} ± {deviation:.2g} {unit}".strip()
    return Claim(text, _verdict(p, len(differences)), size, p, len(differences))


def within(text: str, differences: Sequence[float], bound: float, unit: str = "points", scale: float = 100.0) -> Claim:
    """The claim that paired differences have a mean within ± `bound`: two one-sided tests.

    Args:
        text: The claim.
        differences: One a seed.
        bound: In the differences' own unit.
        unit: In which the size is told.
        scale: From a difference to that unit.

    Returns:
        The claim, which holds where both p ≤ .05.
    """
    values = np.asarray(differences, dtype=np.float64)
    p = max(sign_flip_test(list(bound + sign * values)) for sign in (-1, 1))
    size = f"{scale * values.mean():+.3g} {unit}, bound ±{scale * bound:.3g}"
    return Claim(text, _verdict(p, len(values)), size, p, len(values))


def _verdict(p: float, seeds: int) -> bool | None:
    """``None`` where not even seeds that all agree could reach the level: fewer than five."""
    return p <= LEVEL if 0.5**seeds <= LEVEL else None
