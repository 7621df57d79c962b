"""Captured gradients against autograd's: alike but by rounding, with NaN and infinity in the same places."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sdfast.ntk.factors import backward_factors

_CACHED = 2**16  # entries
_LOST = 1e-24  # a sum of squares below it may have lost those that its dtype cannot hold
UNSEEN = "used where no torch function shows it: in a scripted module, or a custom autograd.Function"


def loop_what_differs(
    exact: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    sample: int,
    looped: dict[str, str],
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Notes the parameters whose captured gradient, or what their captured factors stand for, is not autograd's.

    Args:
        exact: By parameter: the gradient of one sample's output by autograd alone.
        rows: Captured gradients (samples, *shape); a missing one counts as zero.
        sample: Which.
        looped: Is given the reason for each that differs.
        factors: Captured factors A (samples, T, d), or tokens, and B (samples, T, p), in place of rows.
    """
    dense = {name: gradient.to_dense() if gradient.is_sparse else gradient for name, gradient in exact.items()}
    norms = {name: _norm(gradient) for name, gradient in dense.items()}
    total = math.hypot(*norms.values())
    for name, gradient in dense.items():
        double = gradient.dtype == torch.float64
        allowed = (1e-9 if double else 1e-3) * norms[name] + (1e-11 if double else 1e-5) * total
        if factors and name in factors:
            product = _product_of(factors[name], sample, gradient)
            # A gradient's products are those of its transpose, and a rule's factors may stand for either.
            seen, alike = "factors", any(_alike(side, gradient, allowed) for side in (product, product.mT))
        else:
            captured = rows[name][sample] if name in rows else torch.zeros_like(gradient)
            seen, alike = "gradient" if name in rows else "", _alike(captured, gradient, allowed)
        if not alike:
            looped.setdefault(name, f"its captured {seen} differs from autograd's" if seen else UNSEEN)


def _product_of(factors: tuple[Tensor, Tensor], sample: int, like: Tensor) -> Tensor:
    """What the factors of one sample stand for."""
    a, b = (side[sample : sample + 1] for side in factors)
    return backward_factors(a, b[None], b.new_ones(1, 1, 1), len(like))[0]


def _alike(captured: Tensor, gradient: Tensor, allowed: float) -> bool:
    """Whether they are no further apart than that, and finite in the same places."""
    square = _square(captured, gradient)
    if square < math.inf and max(square, _LOST) <= allowed**2:
        return True  # a finite sum of squared differences: both are finite throughout
    if not torch.equal(captured.isfinite(), gradient.isfinite()):
        return False
    return _exact_norm(captured - gradient) <= allowed


def _norm(gradient: Tensor) -> float:
    """Of the finite entries."""
    square = _square(gradient)
    return math.sqrt(square) if _LOST < square < math.inf else _exact_norm(gradient)


def _exact_norm(gradient: Tensor) -> float:
    """Of the finite entries, in float64: for what is too large or too small to be squared in its own dtype."""
    return float(torch.linalg.vector_norm(torch.nan_to_num(gradient.double(), 0, 0, 0)))


def _square(tensor: Tensor, minus: Tensor | None = None) -> float:
    """The squared norm of a tensor, or of a difference; not finite where an entry is not, or a square is too large.

    Summed in the entries' own dtype over pieces that stay in the cache, and over these in float64.
    """
    sides = [side.reshape(-1).split(_CACHED) for side in ((tensor,) if minus is None else (tensor, minus))]
    pieces = sides[0] if minus is None else map(torch.sub, *sides)
    return sum(float(torch.dot(piece, piece)) for piece in pieces)
