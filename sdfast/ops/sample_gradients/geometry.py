"""The geometry of a convolution in one form for one to three dimensions, and the checks of what a caller gives."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdfast import _checks

UNSERVED = ("cuda",)  # the GPU kernels are Triton's

Size = int | Sequence[int]
Three = tuple[int, int, int]


class Geometry(NamedTuple):
    """Kernel, stride, padding in front, and dilation along depth, height and width; ones (and no padding) in front."""

    kernel: Three
    stride: Three
    padding: Three
    dilation: Three
    groups: int

    def extent(self, axis: int, out: Sequence[int]) -> int:
        """Padded positions that the kernel touches along an axis."""
        return (out[axis] - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1

    def taps(self) -> Iterator[tuple[int, ...]]:
        """Kernel positions in the order of the weight."""
        return itertools.product(*map(range, self.kernel))

    def width(self, input: Tensor, gradient: Tensor) -> int:
        """Entries of the weight, for canonical (n, r, C, D, H, W)."""
        return gradient.shape[2] * (input.shape[2] // self.groups) * math.prod(self.kernel)


def _sizes(name: str, value: Size, dimensions: int, least: int, filling: int) -> Three:
    if not isinstance(value, int | Sequence) or isinstance(value, str):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted integers")
    sizes = (value,) * dimensions if isinstance(value, int) else tuple(value)
    if len(sizes) != dimensions:
        raise ValueError(f"{name}: got {len(sizes)} numbers, wanted one or {dimensions}, as kernel_size has")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: got {type(size).__name__}, wanted integers")
        if size < least:
            raise ValueError(f"{name}: got {size}, wanted at least {least}")
    return (filling,) * (3 - dimensions) + sizes  # type: ignore[return-value]


def geometry_of(kernel_size: Sequence[int], stride: Size, padding: Size, dilation: Size, groups: int) -> Geometry:
    """The geometry, checked.

    Args:
        kernel_size: One to three numbers.
        stride: One number, or one an axis.
        padding: In front; likewise.
        dilation: Likewise.
        groups: Of the channels.

    Returns:
        The geometry in three dimensions.

    Raises:
        TypeError: A size is no integer.
        ValueError: A size is too small, or their numbers differ.
    """
    kernel = tuple(kernel_size)
    if not 1 <= len(kernel) <= 3:
        raise ValueError(f"kernel_size: got {len(kernel)} numbers, wanted one to three")
    dimensions = len(kernel)
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups: got {type(groups).__name__}, wanted an integer")
    if groups < 1:
        raise ValueError(f"groups: got {groups}, wanted at least 1")
    return Geometry(
        _sizes("kernel_size", kernel, dimensions, 1, 1),
        _sizes("stride", stride, dimensions, 1, 1),
        _sizes("padding", padding, dimensions, 0, 0),
        _sizes("dilation", dilation, dimensions, 1, 1),
        groups,
    )


def canonical(name: str, value: Tensor, dimensions: int) -> Tensor:
    """A view (n, r, C, D, H, W) of (n, C, *space) or (n, r, C, *space), whose strides it keeps.

    Args:
        name: Of the argument.
        value: The tensor.
        dimensions: Of its space.

    Returns:
        The view.

    Raises:
        TypeError: Its dtype is neither float32 nor float64.
        ValueError: It has another number of axes.
    """
    _checks.check_full_precision(name, value)
    if value.dim() not in (dimensions + 2, dimensions + 3):
        raise ValueError(
            f"{name}: got shape {_checks.shape_text(value)}, wanted (samples, channels, *space) or (samples, rows, "
            f"channels, *space) with {dimensions} axes of space"
        )
    value = value.detach()
    if value.dim() == dimensions + 2:
        value = value.unsqueeze(1)
    for _ in range(3 - dimensions):
        value = value.unsqueeze(3)
    return value


def check_like(name: str, value: Tensor, gradient: Tensor) -> None:
    """Refuses what differs from the gradient in dtype, device or shape."""
    _checks.check_tensor(name, value)
    if value.dtype != gradient.dtype:
        raise TypeError(
            f"{name}: got {_checks.dtype_name(value)}, wanted {_checks.dtype_name(gradient)} as gradient has"
        )
    if value.device != gradient.device:
        raise ValueError(f"{name}: is on {value.device}, wanted {gradient.device} as gradient")
    if value.shape != gradient.shape:
        raise ValueError(
            f"{name}: got shape {_checks.shape_text(value)}, wanted {_checks.shape_text(gradient)} as gradient has"
        )


def check_pair(input: Tensor, gradient: Tensor, geometry: Geometry) -> None:
    """Refuses an input and a gradient that do not belong to one convolution.

    Args:
        input: Canonical.
        gradient: Canonical.
        geometry: Of the convolution.

    Raises:
        TypeError: Their dtypes differ.
        ValueError: Devices, samples, channels or sizes do not fit.
    """
    if gradient.dtype != input.dtype:
        raise TypeError(
            f"gradient: got {_checks.dtype_name(gradient)}, wanted {_checks.dtype_name(input)} as input has"
        )
    if gradient.device != input.device:
        raise ValueError(f"gradient: is on {gradient.device}, wanted {input.device} as input")
    if gradient.shape[:2] != input.shape[:2]:
        raise ValueError(
            f"gradient: got {gradient.shape[0]} samples of {gradient.shape[1]} rows, wanted {input.shape[0]} of "
            f"{input.shape[1]} as input has"
        )
    for name, value in (("input", input), ("gradient", gradient)):
        if value.shape[2] % geometry.groups:
            raise ValueError(f"{name}: got {value.shape[2]} channels, wanted a multiple of groups={geometry.groups}")
    for axis in range(3):
        size, padding = input.shape[3 + axis], geometry.padding[axis]
        reach = size + 2 * padding - geometry.dilation[axis] * (geometry.kernel[axis] - 1) - 1
        most = reach // geometry.stride[axis] + 1
        if gradient.shape[3 + axis] > max(most, 0):
            raise ValueError(
                f"gradient: got {gradient.shape[3 + axis]} positions along an axis where an input of {size} gives "
                f"{max(most, 0)} (kernel {geometry.kernel[axis]}, stride {geometry.stride[axis]}, padding {padding}, "
                f"dilation {geometry.dilation[axis]})"
            )


def rows_for(name: str, out: Tensor | None, accumulate: bool, samples: int, width: int, like: Tensor) -> Tensor:
    """`out` once it has been seen to fit, or new rows.

    Args:
        name: Of the argument.
        out: (samples, width), entries of a row side by side, or ``None``.
        accumulate: Whether to add to what is there.
        samples: Rows wanted.
        width: Columns wanted.
        like: Of the wanted dtype and device.

    Returns:
        The rows.

    Raises:
        TypeError: Its dtype is another.
        ValueError: Shape, strides or device do not fit, or there is nothing to add to.
    """
    if out is None:
        if accumulate:
            raise ValueError(f"{name}: got None, wanted the rows to add to (accumulate=True)")
        return like.new_empty(samples, width)
    _checks.check_tensor(name, out)
    if out.dtype != like.dtype:
        raise TypeError(f"{name}: got {_checks.dtype_name(out)}, wanted {_checks.dtype_name(like)}")
    if out.device != like.device:
        raise ValueError(f"{name}: is on {out.device}, wanted {like.device}")
    if tuple(out.shape) != (samples, width):
        raise ValueError(f"{name}: got shape {_checks.shape_text(out)}, wanted {(samples, width)}")
    if (width > 1 and out.stride(1) != 1) or (samples > 1 and out.stride(0) < width):
        raise ValueError(
            f"{name}: got strides {out.stride()}, wanted rows that do not overlap, with entries side by side"
        )
    if out.requires_grad:
        raise ValueError(f"{name}: requires grad, but it is written in place; pass {name}.detach()")
    return out


def placed(out: Tensor | None, result: Tensor, accumulate: bool) -> Tensor:
    """The result, or `out` with it written or added."""
    if out is None:
        return result
    with torch.no_grad():
        return out.add_(result) if accumulate else out.copy_(result)
