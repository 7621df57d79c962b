"""The steps of the Triton kernels of a prediction bank, each on a tile of (R, B) = (rows, columns) entries."""

import triton
import triton.language as tl

from sdfast.ops.self_distillation.triton_steps import HARDMAX, SOFTMAX, first_peak, load_tile
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
    bank,  # (R,) of the bank's rows each: probabilities, with K their classes; over how many the rest is spread
    columns,  # (B,)
    inside,  # (R, B)
    K: tl.constexpr,
    REAL: tl.constexpr,
):
    """The bank's entries, 0 outside. bfloat16 and float64 meet in float32: the interpreter has no way between them."""
    values, listed, others = bank
    if K:
        rest = in_float(tl.load(values + K), REAL) / others
        tile = rest[:, None] + tl.zeros(inside.shape, REAL)
        for j in range(K):
            at = columns[None, :] == tl.load(listed + j)[:, None]
            tile = tl.where(at, in_float(tl.load(values + j), REAL)[:, None], tile)
        return tl.where(inside, tile, 0.0)
    return in_float(tl.load(values[:, None] + columns[None, :], mask=inside, other=0.0), REAL)


@triton.jit
def in_float(
    values,
    REAL: tl.constexpr,
):
    if values.dtype == tl.float64:
        return values.to(REAL)
    return values.to(tl.float32).to(REAL)


@triton.jit
def fresh_tile(
    columns,  # (B,)
    inside,  # (R, B)
    logits,  # (R,) pointers of the rows that are written
    column_stride,
    bank,  # as bank_tile takes it
    row,  # (R,) each: high, total, weight, normalizer
    clamp,
    CLAMP: tl.constexpr,
    K: tl.constexpr,
    REAL: tl.constexpr,
):
    """(R, B) entries of the rows that the bank is to hold."""
    high, total, weight, normalizer = row
    x = load_tile(logits, columns, column_stride, inside, float("-inf"), REAL)
    p = tl.exp(x - high[:, None]) / total[:, None]
    return blended(bank_tile(bank, columns, inside, K, REAL), p, clamp, normalizer, weight, CLAMP)


@triton.jit
def store_row(
    pointers,  # (R, B) or (R, K) of the bank
    values,
    mask,
):
    if pointers.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def store_largest(
    writes,  # (R,)
    classes,
    logits,  # as fresh_tile takes them
    column_stride,
    bank,
    row,
    clamp,
    CLAMP: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,  # a power of two above K
    R: tl.constexpr,
    B: tl.constexpr,
    REAL: tl.constexpr,
):
    """Writes the K largest entries of the fresh rows, equal ones by their class, and the mass of all others.

    One sweep for each: the next after (value, class) of the one before. Nothing is stored before all has been read.
    """
    lanes = tl.arange(0, LANES)
    chosen = tl.zeros([R, LANES], REAL)
    chosen_classes = tl.zeros([R, LANES], tl.int32)
    value = tl.full([R], float("inf"), REAL)
    place = tl.full([R], -1, tl.int32)
    for j in range(K + 1):
        peaks = tl.full([R, B], -1.0, REAL)
        firsts = tl.arange(0, B)[None, :] + tl.zeros([R, B], tl.int32)
        sums = tl.zeros([R, B], REAL)
        for start in range(0, classes, B):
            columns = start + tl.arange(0, B)
            inside = writes[:, None] & (columns < classes)[None, :]
            fresh = fresh_tile(columns, inside, logits, column_stride, bank, row, clamp, CLAMP, K, REAL)
            after = (fresh < value[:, None]) | ((fresh == value[:, None]) & (columns[None, :] > place[:, None]))
            after = after & inside
            sums += tl.where(after, fresh, 0.0)
            above = after & (fresh > peaks)
            firsts = tl.where(above, columns[None, :], firsts)
            peaks = tl.where(above, fresh, peaks)
        value, place, _ = first_peak(peaks, firsts, peaks != peaks, classes)
        found = tl.where(lanes[None, :] == K, tl.sum(sums, 1)[:, None], value[:, None])
        chosen = tl.where(lanes[None, :] == j, found, chosen)
        chosen_classes = tl.where(lanes[None, :] == j, place[:, None], chosen_classes)
    tl.debug_barrier()
    values, listed, _ = bank
    store_row(values[:, None] + lanes[None, :], chosen, writes[:, None] & (lanes <= K)[None, :])
    tl.store(listed[:, None] + lanes[None, :], chosen_classes, mask=writes[:, None] & (lanes < K)[None, :])


@triton.jit
def believed_tile(
    columns,  # (B,)
    classes,
    pointers,  # (R,) logits, and the bank as bank_tile takes it
    column_stride,
    row,  # (R,) each: kept, high, total, takes (whether the prediction is in what is read), weight, normalizer
    clamp,
    WRITE_FIRST: tl.constexpr,
    CLAMP: tl.constexpr,
    K: tl.constexpr,
    REAL: tl.constexpr,
):
    """(x, p, believed, inside) of one tile, (R, B) each; what is believed is 0 outside."""
    logits, bank = pointers
    kept, high, total, takes, weight, normalizer = row
    inside = kept[:, None] & (columns < classes)[None, :]
    x = load_tile(logits, columns, column_stride, inside, float("-inf"), REAL)
    p = tl.exp(x - high[:, None]) / total[:, None]
    t = bank_tile(bank, columns, inside, K, REAL)
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
