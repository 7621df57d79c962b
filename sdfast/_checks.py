"""Argument errors: one line that names the argument, what came and what is wanted."""

import sys
from numbers import Real

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGRAL = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


LARGEST = sys.float_info.max


def is_number(value: object) -> bool:
    """Whether `value` is a real number, NumPy's scalars included."""
    return type(value) is float or (isinstance(value, Real) and not abs(value) > LARGEST)  # type: ignore[operator]


def dtype_name(tensor: Tensor) -> str:
    """The dtype as the user writes it, without ``torch.``."""
    return str(tensor.dtype).removeprefix("torch.")


def shape_text(tensor: Tensor) -> str:
    """The shape as a plain tuple."""
    return str(tuple(tensor.shape))


def check_tensor(name: str, value: Tensor) -> None:
    """Refuses what is not a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a torch.Tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, wanted a dense tensor (torch.strided)")


def check_floating(name: str, value: Tensor) -> None:
    """Refuses what is not a tensor of float32, float64, bfloat16 or float16."""
    check_tensor(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: got {dtype_name(value)}, wanted float32, float64, bfloat16 or float16")


def check_full_precision(name: str, value: Tensor) -> None:
    """Refuses what is not a float32 or float64 tensor: gradients are taken in full precision."""
    check_floating(name, value)
    if value.element_size() < 4:
        raise TypeError(f"{name}: got {dtype_name(value)}, wanted float32 or float64")


def check_share(name: str, value: object) -> None:
    """Refuses what is no number in [0, 1]."""
    if not is_number(value) or not 0 <= value <= 1:  # type: ignore[operator]
        raise ValueError(f"{name}: got {value!r}, wanted a number in [0, 1]")


def check_least(name: str, value: object, least: int) -> None:
    """Refuses what is no integer of at least that."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, wanted an integer >= {least}")


def check_option(name: str, value: object, options: dict | tuple) -> None:
    """Refuses a name that is none of `options`."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, options))}")


def check_constant(name: str, value: Tensor, device: torch.device) -> None:
    """Refuses a tensor that asks for a gradient it would not get, or lives on another device than the logits."""
    if value.requires_grad:
        raise ValueError(f"{name}: requires grad, but the loss is not differentiated by it; pass {name}.detach()")
    if value.device != device:
        raise ValueError(f"{name}: is on {value.device}, wanted {device} as the logits")


def check_logits(logits: Tensor) -> None:
    """Refuses logits that are no floating tensor of (..., classes)."""
    check_floating("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {shape_text(logits)}, wanted (..., classes) with at least one class")


def check_weight(name: str, value: Tensor, shape: tuple[int, ...], meaning: str, logits: Tensor) -> Tensor:
    """A floating constant of exactly `shape`, in the dtype that sums have and contiguous."""
    check_floating(name, value)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name}: got shape {shape_text(value)}, wanted {tuple(shape)} {meaning} for logits {shape_text(logits)}"
        )
    check_constant(name, value, logits.device)
    return value.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).contiguous()


def rows_beside(name: str, values: Tensor, logits: Tensor) -> Tensor:
    """Floats of the logits' shape and device as (N, C) rows, detached."""
    check_floating(name, values)
    if values.shape != logits.shape:
        raise ValueError(f"{name}: got shape {shape_text(values)}, wanted {shape_text(logits)} as the logits")
    if values.device != logits.device:
        raise ValueError(f"{name}: is on {values.device}, wanted {logits.device} as the logits")
    return values.detach().reshape(-1, logits.shape[-1])


def first_row(bad: Tensor) -> int | None:
    """The first row that is bad, ``None`` where none is; looks at the values."""
    return int(bad.nonzero()[0]) if bad.any() else None


def indices_beside_rows(logits: Tensor, labels: Tensor) -> bool:
    """Whether these are floating (N, C) logits with (N,) int64 labels on one device: nothing needs converting."""
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or labels.dtype is not torch.int64:
        return False
    shape = logits.shape
    return (
        len(shape) == 2
        and shape[:1] == labels.shape
        and shape[1] > 1
        and logits.dtype in FLOATING
        and labels.device == logits.device
        and logits.layout is torch.strided
    )


def check_labels(logits: Tensor, labels: Tensor, regression: bool) -> Tensor:
    """Labels as (N,) int64 or (N, C) floats for logits (..., C).

    `regression` (the mse loss) also admits (...) floats where C is 1.
    """
    check_tensor("labels", labels)
    check_constant("labels", labels, logits.device)
    classes = logits.shape[-1]
    leading = logits.shape[:-1]
    if labels.dtype in INTEGRAL:
        if labels.shape == leading:
            return labels.reshape(-1).to(torch.int64)
    elif labels.dtype in FLOATING:
        if labels.shape == logits.shape:
            return labels.reshape(-1, classes)
        if regression and classes == 1 and labels.shape == leading:
            return labels.reshape(-1, 1)
    else:
        raise TypeError(f"labels: got {dtype_name(labels)}, wanted int64 class indices or floating probabilities")
    raise ValueError(_label_shape_error(logits, labels, regression))


def _label_shape_error(logits: Tensor, labels: Tensor, regression: bool) -> str:
    got = f"labels: got {dtype_name(labels)} of shape {shape_text(labels)}"
    class_first = (*logits.shape[:1], *logits.shape[2:])
    if logits.dim() > 2 and labels.shape == class_first:
        return (
            f"{got} for logits {shape_text(logits)}, which looks class-first: wanted the classes last, as in "
            "logits.movedim(1, -1)"
        )
    if labels.dtype in INTEGRAL:
        wanted = f"{tuple(logits.shape[:-1])} indices, or {shape_text(logits)} probabilities"
    elif regression and logits.shape[-1] == 1:
        wanted = f"{shape_text(logits)} or {tuple(logits.shape[:-1])} targets"
    else:
        wanted = f"{shape_text(logits)} {'targets' if regression else 'probabilities'}, or integers for class indices"
    return f"{got}, wanted {wanted}, for logits {shape_text(logits)}"
