"""Gradients per sample of a layer's parameters, from the layer's input and the gradient of its output."""

from collections.abc import Sequence

from torch import Tensor

from sdfast import _dispatch
from sdfast.ops.sample_gradients.geometry import UNSERVED, Size, canonical, check_pair, geometry_of, placed, rows_for
from sdfast.ops.sample_gradients.normalization import channel_sample_gradients, position_sample_gradients
from sdfast.ops.sample_gradients.op import OPERATIONS
from sdfast.ops.sample_gradients.reference import convolution_reference

__all__ = ["channel_sample_gradients", "convolution_sample_gradients", "position_sample_gradients"]


def convolution_sample_gradients(
    input: Tensor,
    gradient: Tensor,
    kernel_size: Sequence[int],
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    out: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Each sample's own gradient of a convolution's weight, one a row, without an unfolded input.

    Equals, for every sample i, with zeros around the input::

        out[i, o, c, k] = Σ_t gradient[i, o, t] · input[i, c, t · stride + k · dilation − padding]

    The weight of a transposed convolution has the same gradient with the two tensors exchanged:
    ``convolution_sample_gradients(gradient, input, kernel_size, …)``.

    Args:
        input: (n, C, *space), or (n, r, C, *space) where r rows of the batch belong to one sample; float32 or float64,
            one to three axes of space, in any memory format.
        gradient: Of a scalar by the convolution's output, likewise. No gradient flows back to either.
        kernel_size: One to three numbers.
        stride: One number, or one an axis.
        padding: In front of the input; likewise. Behind it there are as many zeros as the gradient's size asks for.
        dilation: Likewise.
        groups: Of the channels.
        out: Where to write, (n, width) with rows at any distance: a column range of a larger matrix, say.
        accumulate: Add to `out`, as for a weight that is used twice.
        backend: ``None`` for the best one available, or ``"cpu"``, ``"triton"``, ``"reference"``.

    Returns:
        `out`, or new rows (n, width) in the order of the weight (outputs, C / groups, *kernel_size).

    Raises:
        TypeError: A dtype or a size cannot be used.
        ValueError: Shapes, strides or devices do not fit; the message names the argument.
        NotImplementedError: The backend asked for cannot serve the call; the message says why.
    """
    geometry = geometry_of(kernel_size, stride, padding, dilation, groups)
    dimensions = len(kernel_size)
    image, given = canonical("input", input, dimensions), canonical("gradient", gradient, dimensions)
    check_pair(image, given, geometry)
    chosen = _dispatch.choose(backend, image.device.type, UNSERVED)
    width = geometry.width(image, given)
    rows = rows_for("out", out, accumulate, len(image), width, image)
    if chosen != "reference":
        OPERATIONS[chosen].convolution(image, given, rows, *geometry[:4], groups, accumulate)
        return rows
    return placed(None if out is None else rows, convolution_reference(image, given, geometry), accumulate)
