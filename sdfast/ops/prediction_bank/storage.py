"""How rows of probabilities lie in a bank: dense, or as the k largest of them with the rest's mass spread evenly."""

from typing import NamedTuple

import torch
from torch import Tensor


class Storage(NamedTuple):
    """The tensors of a bank as the operation takes them.

    Attributes:
        predictions: (N, C) probabilities; with top-k (N, k + 1), the last column being the mass of all other classes.
        classes: (N, k) int32, the classes of the k largest probabilities; (0, 0) where the storage is dense.
        seen: (N,) int32, how many predictions each row is the mean of.
        claims: (N, 2) int32, zero between calls: where a GPU settles which row of a batch writes.
    """

    predictions: Tensor
    classes: Tensor
    seen: Tensor
    claims: Tensor

    @property
    def sparse(self) -> bool:
        """Whether only the k largest probabilities are kept."""
        return self.classes.numel() > 0


def read_rows(predictions: Tensor, classes: Tensor | None, num_classes: int, dtype: torch.dtype) -> Tensor:
    """(n, C) probabilities of stored rows: (n, C), or (n, k + 1) with their (n, k) classes."""
    if classes is None:
        return predictions.to(dtype)
    k = classes.shape[-1]
    values = predictions.to(dtype)
    spread = values[:, k:] / max(1, num_classes - k)
    return spread.repeat(1, num_classes).scatter_(-1, classes.long(), values[:, :k])


def sparse_rows(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """((n, k + 1) values, (n, k) int32 classes) of (n, C) probabilities; equal ones go to the first class."""
    values, classes = rows.sort(stable=True, dim=-1, descending=True)
    return torch.cat([values[:, :k], values[:, k:].sum(-1, keepdim=True)], -1), classes[:, :k].to(torch.int32)
