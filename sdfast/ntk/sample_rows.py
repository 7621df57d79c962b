"""Which part of a tensor belongs to which sample: found by what changes with their number, and with one of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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


def choose(candidates: Sequence[SampleAxis], base: Tensor, perturbed: Sequence[Tensor]) -> list[SampleAxis]:
    """The candidates, both orders of each, that agree with what changed when one sample was perturbed."""
    changed = [differs(base, other) for other in perturbed]
    fitting = []
    for candidate in candidates:
        other_axes = [axis for axis in range(base.dim()) if axis != candidate.axis]
        along = [part.any(other_axes) if other_axes else part for part in changed]  # per sample: (3·T,)
        for samples_first in (True, False) if candidate.positions > 1 else (True,):
            axis = candidate._replace(samples_first=samples_first)
            owned = [SampleAxis(0, axis.positions, samples_first).split(part, 3) for part in along]  # (3, T) each
            if all(not part[other].any() for sample, part in enumerate(owned) for other in range(3) if other != sample):
                fitting.append(axis)
    return fitting
