"""Captured gradients against autograd's: alike but by rounding, with NaN and infinity in the same places."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sdfast.ntk.factors import backward_factors

_CACHED = 2**16  # entries
_LARGEST_SHARE = 1e6  # of a sample in a sum, over the smallest
_LOST = 1e-24  # a sum of squares below it may have lost those that its dtype cannot hold
UNSEEN = "used where no torch function shows it: in a scripted module, or a custom autograd.Function"


def loop_what_differs(
    exact: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    shares: Tensor,
    looped: dict[str, str],
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Notes the parameters whose captured gradients, or what their captured factors stand for, are not autograd's.

    Of all samples at once: a sum over them with a share of its own for each differs if one sample's gradient is wrong,
    or another sample's.

    Args:
        exact: By parameter: the gradient of Σ_i shares_i s_i by autograd alone.
        rows: Captured gradients of each s_i (samples, *shape); missing ones count as zero.
        shares: (samples,) of no pattern, by `shares_of`.
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
            seen, alike = "factors", _factors_alike(factors[name], shares, gradient, allowed)
        else:
            captured = rows[name] if name in rows else torch.zeros_like(gradient).expand(len(shares), *gradient.shape)
            seen, alike = "gradient" if name in rows else "", _alike(captured, shares, gradient, allowed)
        if not alike:
            looped.setdefault(name, f"its captured {seen} differs from autograd's" if seen else UNSEEN)


def lie_apart(left: Mapping[str, Tensor], right: Mapping[str, Tensor], share: float) -> bool:
    """Whether two computations of the same numbers differ by more than that share of their norm.

    Args:
        left: By name.
        right: Likewise.
        share: Allowed.

    Returns:
        Whether; of all together.
    """
    apart = math.hypot(*(_exact_norm(gradient.double() - right[name].double()) for name, gradient in left.items()))
    total = math.hypot(*(_exact_norm(gradient) for gradient in left.values()))
    same_places = all(torch.equal(gradient.isfinite(), right[name].isfinite()) for name, gradient in left.items())
    return apart > share * total or not same_places


def shares_of(rows: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    """Random factors for the samples of a sum, larger for those of small gradients, so that none hides behind another.

    Args:
        rows: Gradients (samples, *shape).
        like: (samples, ...), of the dtype and device wanted.
        generator: Of the random numbers.

    Returns:
        (samples,).
    """
    drawn = 0.5 + torch.rand(len(like), generator=generator, dtype=torch.float64, device="cpu")
    if rows:
        norms = [torch.linalg.vector_norm(_flat(row), dim=1) for row in rows.values()]
        sizes = torch.stack(norms).nan_to_num(0, 0, 0).double()
        size = torch.linalg.vector_norm(sizes, dim=0).cpu()
        drawn *= (size.max() / size.clamp_min(size.max() / _LARGEST_SHARE)).nan_to_num(1, 1, 1)
    return drawn.to(like)


def _flat(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), rows[0].numel())


def _factors_alike(factors: tuple[Tensor, Tensor], shares: Tensor, gradient: Tensor, allowed: float) -> bool:
    """Whether what the factors stand for, summed over the samples, is the gradient, as in `_alike`.

    A gradient's products are those of its transpose, and a rule's factors may stand for either.
    """
    a, b = factors
    if not a.is_floating_point():
        product = backward_factors(a, b[None], shares.view(1, -1, 1), len(gradient))
        return any(_alike(side, shares.new_ones(1), gradient, allowed) for side in (product, product.mT))
    left, right = (b * shares.view(-1, 1, 1)).flatten(0, 1), a.flatten(0, 1)
    exact = gradient.reshape(len(gradient), -1) if gradient.dim() else gradient.view(1, 1)
    return any(
        _sum_of_outer_products_alike(*sides, exact, allowed)
        for sides in ((left, right), (right, left))
        if (sides[0].shape[1], sides[1].shape[1]) == exact.shape
    )


def _sum_of_outer_products_alike(left: Tensor, right: Tensor, exact: Tensor, allowed: float) -> bool:
    """Whether left.T @ right is that: some rows at a time, which stay in the cache."""
    square = 0.0
    step = max(1, _CACHED // exact.shape[1])
    for start in range(0, len(exact), step):
        part = slice(start, start + step)
        piece = torch.addmm(exact[part], left[:, part].T, right, beta=-1).flatten()
        square += float(torch.dot(piece, piece))
    return _is_small(square, allowed) or _alike((left.T @ right)[None], left.new_ones(1), exact, allowed)


def _alike(rows: Tensor, shares: Tensor, gradient: Tensor, allowed: float) -> bool:
    """Whether the sum of the rows is no further from the gradient than that, and finite in the same places."""
    flat, exact = _flat(rows), gradient.reshape(-1)
    square = 0.0
    for start in range(0, len(exact), _CACHED):
        part = slice(start, start + _CACHED)
        piece = torch.addmv(exact[part], flat[:, part].T, shares, beta=-1)
        square += float(torch.dot(piece, piece))
    if _is_small(square, allowed):
        return True
    captured = shares.double() @ flat.double()
    if not torch.equal(captured.isfinite(), exact.isfinite()):
        return False
    return _exact_norm(captured - exact) <= allowed


def _is_small(square: float, allowed: float) -> bool:
    """Whether a finite sum of squared differences is: then both sides are finite throughout."""
    return square < math.inf and max(square, _LOST) <= allowed**2


def _norm(gradient: Tensor) -> float:
    """Of the finite entries."""
    square = _square(gradient)
    return math.sqrt(square) if _LOST < square < math.inf else _exact_norm(gradient)


def _exact_norm(gradient: Tensor) -> float:
    """Of the finite entries, in float64: for what is too large or too small to be squared in its own dtype."""
    return float(torch.linalg.vector_norm(torch.nan_to_num(gradient.double(), 0, 0, 0)))


def _square(tensor: Tensor) -> float:
    """The squared norm; not finite where an entry is not, or a square is too large.

    Summed in the entries' own dtype over pieces that stay in the cache, and over these in float64.
    """
    return sum(float(torch.dot(piece, piece)) for piece in tensor.reshape(-1).split(_CACHED))
