"""Products with a layer's gradients given as factors: of sample i and output c it is Σ_t b_cit ⊗ a_it.

A is (n, T, d), or (n, T) integers that stand for one-hot rows (negative: none); B is (outputs, n, T, p).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_BYTES = 2**28  # of what a product holds beside the factors


def column_chunks(columns: int, b: Tensor) -> Iterator[slice]:
    """Columns that are multiplied together."""
    width = max(1, _BYTES // max(1, b[0].numel() * b.element_size()))
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


def backward_factors(a: Tensor, b: Tensor, columns: Tensor, height: int) -> Tensor:
    """Σ_ci v_ci Σ_t b_cit ⊗ a_it: Jᵀ v of one layer.

    Args:
        a: A.
        b: B.
        columns: (outputs, n, k).
        height: Rows of an embedding.

    Returns:
        (k, p, d), of an embedding (k, rows, p).
    """
    spread = torch.einsum("cntp,cnk->kntp", b, columns).flatten(1, 2)  # (k, nT, p)
    if a.is_floating_point():
        return spread.mT @ a.flatten(0, 1)
    tokens = a.flatten()
    pulled = spread.new_zeros(len(spread), height, spread.shape[-1])
    return pulled.index_add_(1, tokens.clamp_min(0), spread * (tokens >= 0)[:, None])


def forward_factors(a: Tensor, b: Tensor, pulled: Tensor) -> Tensor:
    """Σ_t b_citᵀ G a_it: J G of one layer.

    Args:
        a: A.
        b: B.
        pulled: G, as `backward_factors` gives it.

    Returns:
        (outputs, n, k).
    """
    if a.is_floating_point():
        image = a.flatten(0, 1) @ pulled.mT  # (k, nT, p)
    else:
        tokens = a.flatten()
        image = pulled[:, tokens.clamp_min(0)] * (tokens >= 0)[:, None]
    return torch.einsum("cntp,kntp->cnk", b, image.unflatten(1, a.shape[:2]))


def squared_norms(a: Tensor, b: Tensor) -> Tensor:
    """‖Σ_t b_cit ⊗ a_it‖² = Σ_ts (a_it · a_is)(b_cit · b_cis): the layer's part of the diagonal.

    Args:
        a: A.
        b: B.

    Returns:
        (outputs, n).
    """
    norms = b.new_empty(b.shape[:2])
    rows = max(1, _BYTES // (b.element_size() * (len(b) + 1) * a.shape[1] ** 2))
    for start in range(0, len(a), rows):
        part = slice(start, start + rows)
        few = a[part]
        same = few @ few.mT if a.is_floating_point() else (few[:, :, None] == few[:, None]) & (few >= 0)[:, None]
        norms[:, part] = (same * (b[:, part] @ b[:, part].mT)).sum((-1, -2))
    return norms
