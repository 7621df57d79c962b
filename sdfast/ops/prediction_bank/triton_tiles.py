"""The steps of the Triton kernels of a prediction bank, each on a tile of (R, B) = (rows, columns) entries."""

import triton
import triton.language as tl

from sdfast.ops.self_distillation.triton_steps import HARDMAX, SOFTMAX, load_tile
from sdfast.ops.self_distillation.triton_target import logarithm


@triton.jit
def cut(
    p,  # (R, B)
    clamp,
    CLAMP: tl.constexpr,
):
    """Probabilities cut off to [clamp, 1 - clamp]; NaN stays."""
    if CLAMP:
        p = tl.where(p < clamp, clamp, tl.where(p > 1.0 - clamp, 1.0 - clamp, p))
    return p


@triton.jit
def cut_sums(
    row_pointers,  # (R,) of logits
    column_stride,
    kept,  # (R,)
    classes,
    high,  # (R,)
    total,  # (R,)
    clamp,
    R: tl.constexpr,
    B: tl.constexpr,
    REAL: tl.constexpr,
):
    """(R,) sums of each row's cut off probabilities."""
    sums = tl.zeros([R, B], REAL)
    for start in range(0, classes, B):
        columns = start + tl.arange(0, B)
        inside = kept[:, None] & (columns < classes)[None, :]
        x = load_tile(row_pointers, columns, column_stride, inside, float("-inf"), REAL)
        sums += tl.where(inside, cut(tl.exp(x - high[:, None]) / total[:, None], clamp, True), 0.0)
    return tl.sum(sums, 1)


@triton.jit
def blended(
    old,  # (R, B)
    p,  # (R, B)
    clamp,
    normalizer,  # (R,)
    weight,  # (R,)
    CLAMP: tl.constexpr,
):
    """The bank's rows with this batch's prediction in them."""
    observed = cut(p, clamp, CLAMP) * normalizer[:, None]
    return tl.where(weight[:, None] == 1, observed, old + weight[:, None] * (observed - old))


@triton.jit
def bank_tile(
    row_pointers,  # (R,) of the bank's rows
    columns,  # (B,)
    inside,  # (R, B)
    REAL: tl.constexpr,
):
    """The bank's entries, 0 outside. bfloat16 and float64 meet in float32: the interpreter has no way between them."""
    if row_pointers.dtype.element_ty == tl.float64:
        return load_tile(row_pointers, columns, 1, inside, 0.0, REAL)
    return load_tile(row_pointers, columns, 1, inside, 0.0, tl.float32).to(REAL)


@triton.jit
def believed_tile(
    columns,  # (B,)
    classes,
    pointers,  # (R,) each: logits, bank
    column_stride,
    row,  # (R,) each: kept, high, total, takes (whether the prediction is in what is read), weight, normalizer
    clamp,
    WRITE_FIRST: tl.constexpr,
    CLAMP: tl.constexpr,
    REAL: tl.constexpr,
):
    """(x, p, believed, inside) of one tile, (R, B) each; what is believed is 0 outside."""
    logits, bank = pointers
    kept, high, total, takes, weight, normalizer = row
    inside = kept[:, None] & (columns < classes)[None, :]
    x = load_tile(logits, columns, column_stride, inside, float("-inf"), REAL)
    p = tl.exp(x - high[:, None]) / total[:, None]
    t = bank_tile(bank, columns, inside, REAL)
    if WRITE_FIRST:
        t = tl.where(takes[:, None], blended(t, p, clamp, normalizer, weight, CLAMP), t)
    return x, p, tl.where(inside, t, 0.0), inside


@triton.jit
def mixed_tile(
    believed,  # (R, B)
    columns,  # (B,)
    inside,  # (R, B)
    label_pointers,  # (R,) of probability rows
    label_column_stride,
    row,  # (R,) each: label, uniform, at_label, at_source, hard, log of the largest believed, their sum
    shape,  # alpha, smoothing (R,), classes
    rate,  # 1 / temperature
    LABEL_FN: tl.constexpr,
    GEOMETRIC: tl.constexpr,
    SHARPENED: tl.constexpr,
    SOFT_LABELS: tl.constexpr,
    RATED: tl.constexpr,
    REAL: tl.constexpr,
):
    """The (R, B) arithmetic mean, 0 outside, and the logarithm of the target to be reshaped but for a constant."""
    label, uniform, at_label, at_source, hard, log_high, total = row
    if SOFT_LABELS:
        y = load_tile(label_pointers, columns, label_column_stride, inside, 0.0, REAL)
        target = uniform[:, None] + at_label[:, None] * y
    else:
        y = tl.where(columns[None, :] == label[:, None], 1.0, 0.0).to(REAL)
        target = uniform[:, None] + tl.where(columns[None, :] == label[:, None], at_label[:, None], 0.0)
    if LABEL_FN == HARDMAX:
        target += tl.where(columns[None, :] == hard[:, None], at_source[:, None], 0.0)
    elif LABEL_FN == SOFTMAX:
        h = believed
        if RATED:
            h = tl.exp((tl.log(believed) - log_high[:, None]) * rate)
        target += tl.where(at_source[:, None] == 0, 0.0, at_source[:, None] * (h / total[:, None]))
    logarithms = target
    if GEOMETRIC or SHARPENED:
        logarithms = logarithm(target)
        if GEOMETRIC:
            alpha = shape[0][:, None]
            smoothing = shape[1][:, None]
            both = (logarithm(believed) - log_high[:, None]) * rate * at_source[:, None]
            both += tl.where(alpha == 0, 0.0, alpha * logarithm(smoothing / shape[2] + (1.0 - smoothing) * y))
            both = tl.where(uniform[:, None] == uniform[:, None], both, float("nan"))
            logarithms = tl.where(at_source[:, None] == 0, logarithms, both)
        logarithms = tl.where(inside, logarithms, float("-inf"))
    return tl.where(inside, target, 0.0), logarithms


@triton.jit
def reshaped(
    target,  # (R, B)
    logarithms,  # (R, B)
    inside,  # (R, B)
    at_source,  # (R,)
    power,  # (R, 1)
    high,  # (R,) of the row's logarithms
    total,  # (R,) of exp(power (logarithms - high))
    GEOMETRIC: tl.constexpr,
    SHARPENED: tl.constexpr,
):
    """The target to its power, or the geometric mean; the arithmetic mean where it is neither."""
    if GEOMETRIC or SHARPENED:
        values = tl.exp((logarithms - high[:, None]) * power) / total[:, None]
        if not SHARPENED:
            values = tl.where(at_source[:, None] == 0, target, values)  # alpha = 1: the label itself
        target = tl.where(inside, values, 0.0)
    return target
