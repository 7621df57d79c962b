"""Which part of a tensor belongs to which sample: found by what changes with their number, and with one of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_BESIDE = (slice(1, 3), slice(0, 3, 2), slice(0, 2))  # the other two of three samples


class PathChangedError(RuntimeError):
    """A batch took another way through the model than the probe did."""


class SampleAxis(NamedTuple):
    """The axis along which the samples of a tensor lie.

    Attributes:
        axis: Of size samples × positions.
        positions: Rows of one sample along it; 1 for a plain batch axis.
        samples_first: Whether the axis is (samples, positions) flattened, or (positions, samples).
    """

    axis: int
    positions: int
    samples_first: bool

    def split(self, tensor: Tensor, samples: int) -> Tensor:
        """The tensor as (samples, *shape of one sample), the axis kept with its positions.

        Raises:
            PathChangedError: The axis has another size than the probe found.
        """
        if tensor.dim() <= self.axis or tensor.shape[self.axis] != samples * self.positions:
            raise PathChangedError(
                f"a tensor of shape {tuple(tensor.shape)} came where {samples} samples of {self.positions} rows each "
                f"were to lie along axis {self.axis}"
            )
        if self.axis == 0 and self.positions == 1:  # most often
            return tensor.unsqueeze(1)
        if self.samples_first:
            return tensor.unflatten(self.axis, (samples, self.positions)).movedim(self.axis, 0)
        return tensor.unflatten(self.axis, (self.positions, samples)).movedim(self.axis + 1, 0)


def scaled_axes(shape: Sequence[int], smaller: Sequence[int]) -> list[SampleAxis]:
    """The axes that are 3·T long for three samples and 2·T for two: candidates, in order samples first."""
    if len(shape) != len(smaller):
        return []
    return [
        SampleAxis(axis, size // 3, True)
        for axis, (size, less) in enumerate(zip(shape, smaller, strict=True))
        if size and size % 3 == 0 and less * 3 == size * 2
    ]


def differs(tensor: Tensor, other: Tensor) -> Tensor:
    """Where two tensors differ by more than rounding (bool, of their shape)."""
    if not tensor.is_floating_point():
        return tensor != other
    finite = torch.nan_to_num(tensor, 0, 0, 0)
    scale = finite.abs().max() if finite.numel() else finite.sum()
    distance = (finite - torch.nan_to_num(other, 0, 0, 0)).abs()
    return (distance > 1e3 * torch.finfo(tensor.dtype).eps * scale) | (tensor.isfinite() != other.isfinite())


def both_orders(candidates: Sequence[SampleAxis]) -> list[SampleAxis]:
    """The candidates with the samples in front of their positions, and behind them where there are several."""
    return [
        candidate._replace(samples_first=samples_first)
        for candidate in candidates
        for samples_first in ((True, False) if candidate.positions > 1 else (True,))
    ]


def agreeing(candidates: Sequence[SampleAxis], base: Tensor, perturbed: Tensor, sample: int) -> list[SampleAxis]:
    """The candidates along which the rows of the others stay the same when one of three samples is perturbed."""
    return [candidate for candidate in candidates if _others_stay(candidate, base, perturbed, sample)]


def _others_stay(axis: SampleAxis, base: Tensor, perturbed: Tensor, sample: int) -> bool:
    """Whether they are the same to the bit, or but by rounding."""
    others = _BESIDE[sample]
    if torch.equal(axis.split(base, 3)[others], axis.split(perturbed, 3)[others]):
        return True
    return not axis.split(differs(base, perturbed), 3)[others].any()
