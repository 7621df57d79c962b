"""Gradients per sample of scale and shift: of channels with given statistics, and of positions with their own."""

from torch import Tensor

from sdfast import _checks, _dispatch
from sdfast.ops.sample_gradients.geometry import UNSERVED, check_like, placed, rows_for
from sdfast.ops.sample_gradients.op import OPERATIONS
from sdfast.ops.sample_gradients.reference import channels_reference, positions_reference


def channel_sample_gradients(
    input: Tensor | None,
    gradient: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    *,
    weight_out: Tensor | None = None,
    bias_out: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Each sample's own gradients of γ and β of ``γ_c (x − mean) rstd + β_c``, the statistics being constants to them.

    Equals ``weight[i, c] = Σ_{r,t} gradient · (input − mean) · rstd`` and ``bias[i, c] = Σ_{r,t} gradient``: batch
    norm with running statistics (mean and rstd of a channel), group and instance norm (of a row and channel). Without
    an input it is the gradient of a convolution's bias. γ is nowhere divided by, so it may be zero.

    Args:
        input: (n, r, C, *space), r rows of the batch belonging to one sample; float32 or float64. ``None``: no weight.
        gradient: Of a scalar by the layer's output; likewise. No gradient flows back.
        mean: Broadcast to (n, r, C).
        rstd: 1 / standard deviation; likewise.
        weight_out: Where to write, (n, C) with rows at any distance.
        bias_out: Likewise.
        accumulate: Add to what is there.
        backend: ``None`` for the best one available, or ``"cpu"``, ``"triton"``, ``"reference"``.

    Returns:
        (weight, bias), each (n, C); weight is ``None`` without an input.

    Raises:
        TypeError: A dtype cannot be used.
        ValueError: Shapes, strides or devices do not fit; the message names the argument.
        NotImplementedError: The backend asked for cannot serve the call; the message says why.
    """
    _checks.check_full_precision("gradient", gradient)
    if gradient.dim() < 3:
        raise ValueError(
            f"gradient: got shape {_checks.shape_text(gradient)}, wanted (samples, rows, channels, *space)"
        )
    if input is not None:
        check_like("input", input, gradient)
        if mean is None or rstd is None:
            raise ValueError("mean, rstd: got None beside an input, wanted its statistics")
    elif not (mean is None and rstd is None and weight_out is None):
        raise ValueError("input: got None, wanted the layer's input beside mean, rstd or weight_out")
    statistics = [_statistics(*pair, gradient) for pair in (("mean", mean), ("rstd", rstd))]
    flat = [None if t is None else t.detach().flatten(3) if t.dim() > 3 else t.detach()[..., None]
            for t in (input, gradient)]  # fmt: skip
    samples, channels = gradient.shape[0], gradient.shape[2]
    chosen = _dispatch.choose(backend, gradient.device.type, UNSERVED)
    weight = None if input is None else rows_for("weight_out", weight_out, accumulate, samples, channels, gradient)
    bias = rows_for("bias_out", bias_out, accumulate, samples, channels, gradient)
    if chosen != "reference":
        OPERATIONS[chosen].channels(*flat, *statistics, weight, bias, accumulate)
        return weight, bias
    results = channels_reference(flat[0], flat[1], *statistics)  # type: ignore[arg-type]
    weight = None if results[0] is None else placed(weight_out, results[0], accumulate)
    return weight, placed(bias_out, results[1], accumulate)


def position_sample_gradients(
    input: Tensor,
    gradient: Tensor,
    *,
    eps: float,
    centered: bool = True,
    weight_out: Tensor | None = None,
    bias_out: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Each sample's own gradients of γ and β of a layer norm, or of γ of an RMS norm.

    Equals ``weight[i, c] = Σ_t gradient · x̂`` and ``bias[i, c] = Σ_t gradient`` with
    ``x̂ = (x − m) / sqrt(mean((x − m)²) + eps)`` over the channels of a position, m their mean (0 without `centered`).

    Args:
        input: (n, *positions, C), normalised over C; float32 or float64.
        gradient: Of a scalar by the layer's output; likewise. No gradient flows back.
        eps: Of the layer.
        centered: Whether the mean is taken off, as in layer norm.
        weight_out: Where to write, (n, C) with rows at any distance.
        bias_out: Likewise.
        accumulate: Add to what is there.
        backend: ``None`` for the best one available, or ``"cpu"``, ``"triton"``, ``"reference"``.

    Returns:
        (weight, bias), each (n, C).

    Raises:
        TypeError: A dtype cannot be used.
        ValueError: Shapes, strides or devices do not fit; the message names the argument.
        NotImplementedError: The backend asked for cannot serve the call; the message says why.
    """
    _checks.check_full_precision("gradient", gradient)
    if gradient.dim() < 2:
        raise ValueError(f"gradient: got shape {_checks.shape_text(gradient)}, wanted (samples, *positions, channels)")
    check_like("input", input, gradient)
    if not _checks.is_number(eps) or eps < 0:
        raise ValueError(f"eps: got {eps!r}, wanted a number of at least 0")
    samples, channels = gradient.shape[0], gradient.shape[-1]
    flat = []
    for tensor in (input.detach(), gradient.detach()):
        tensor = tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)
        flat.append(tensor if tensor.stride(-1) == 1 else tensor.contiguous())
    chosen = _dispatch.choose(backend, gradient.device.type, UNSERVED)
    weight = rows_for("weight_out", weight_out, accumulate, samples, channels, gradient)
    bias = rows_for("bias_out", bias_out, accumulate, samples, channels, gradient)
    if chosen != "reference":
        OPERATIONS[chosen].positions(flat[0], flat[1], centered, float(eps), weight, bias, accumulate)
        return weight, bias
    results = positions_reference(flat[0], flat[1], centered, float(eps))
    return placed(weight_out, results[0], accumulate), placed(bias_out, results[1], accumulate)


def _statistics(name: str, value: Tensor | None, gradient: Tensor) -> Tensor | None:
    if value is None:
        return None
    _checks.check_tensor(name, value)
    if value.dtype != gradient.dtype or value.device != gradient.device:
        raise TypeError(
            f"{name}: got {_checks.dtype_name(value)} on {value.device}, wanted {_checks.dtype_name(gradient)} on "
            f"{gradient.device} as gradient"
        )
    shape = gradient.shape[:3]
    try:
        return value.detach().expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: got shape {_checks.shape_text(value)}, wanted one that broadcasts to {tuple(shape)} (samples, "
            "rows, channels)"
        ) from error
