"""The steps of the Triton kernels, each on a tile of (R, B) = (rows, columns) entries, one tile at a time.

The target's are in `triton_target`, those that follow from it in `triton_sweep`. Every loss, label function and option
is one formula: a target, an entry's part of its row's sums, an entry's gradient. A one-hot costs two comparisons in
registers, so a sparse target needs no path of its own.
Switches are compile-time constants and cost nothing where they are off.
"""

import triton
import triton.language as tl

from sdfast.ops.self_distillation.description import LABEL_FUNCTIONS, LOSSES

SOFTMAX = tl.constexpr(LABEL_FUNCTIONS["softmax"])
HARDMAX = tl.constexpr(LABEL_FUNCTIONS["hardmax"])
CLIP = tl.constexpr(LABEL_FUNCTIONS["clip"])
NO_LABEL_FUNCTION = tl.constexpr(-1)  # alpha is the number 1: the source is not even looked at
KL = tl.constexpr(LOSSES["kl"])
MSE = tl.constexpr(LOSSES["mse"])
BRIER = tl.constexpr(LOSSES["brier"])


@triton.jit
def load_tile(
    row_pointers,  # (R,)
    columns,  # (B,)
    column_stride,
    inside,  # (R, B)
    fill,
    REAL: tl.constexpr,
):
    offsets = columns.to(tl.int64)[None, :] * column_stride
    return tl.load(row_pointers[:, None] + offsets, mask=inside, other=fill).to(REAL)


@triton.jit
def index_labels(
    label_pointers,  # (R,) int64
    exists,  # (R,)
    classes,
    ignore_index,
):
    """(which rows count, which of them have a label that is no class, the labels of the others) of each row."""
    given = tl.load(label_pointers, mask=exists, other=0)
    kept = exists & (given != ignore_index)
    bad = kept & ((given < 0) | (given >= classes))
    return kept, bad, tl.where(kept & ~bad, given, 0).to(tl.int32)


@triton.jit
def store_gradient(
    row_pointers,  # (R,) of contiguous rows
    columns,  # (B,)
    stored,  # (R,)
    classes,
    values,  # (R, B)
):
    # Nobody reads the gradient here again: it should not push the logits out of the cache.
    inside = stored[:, None] & (columns < classes)[None, :]
    values = values.to(row_pointers.dtype.element_ty)
    tl.store(row_pointers[:, None] + columns[None, :], values, mask=inside, eviction_policy="evict_first")


@triton.jit
def first_peak(
    values,  # (R, B), NaN passed over
    indices,  # (R, B)
    nan,  # (R, B)
    classes,
):
    """(largest entry, its first index, whether an entry is NaN) of each row; the first index as argmax takes it."""
    peak = tl.max(values, 1)
    index = tl.min(tl.where(values == peak[:, None], indices, classes), 1)
    return peak, index, tl.max(nan.to(tl.int32), 1) != 0


@triton.jit
def row_statistics(
    row_pointers,  # (R,)
    column_stride,
    kept,  # (R,)
    classes,
    rate,  # 1 / temperature
    PEAK: tl.constexpr,
    SUM: tl.constexpr,
    RATED_SUM: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    ONE_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    REAL: tl.constexpr,
):
    """(max, its first index, any NaN, sum exp(x - max), sum exp(rate (x - max))) of each row, in one sweep.

    Rows of many tiles keep all five per lane: no reduction, and so no barrier, until the sweep has ended. A lane costs
    one exponential an entry, exp(-|x - max so far|), which rescales either the old sum or the new entry.
    A row of -inf or with +inf has NaN sums, as softmax has.
    """
    lanes = tl.arange(0, B)
    lowest = float("-inf")
    if ONE_TILE:
        x = load_tile(row_pointers, lanes, column_stride, kept[:, None] & (lanes < classes)[None, :], lowest, REAL)
        values = tl.where(x == x, x, lowest)
        high, index, nan = first_peak(values, lanes[None, :] + tl.zeros([R, B], tl.int32), x != x, classes)
        total = tl.zeros([R], REAL)
        rated = tl.zeros([R], REAL)
        if SUM:
            total = tl.sum(tl.exp(x - high[:, None]), 1)
        if RATED_SUM:
            rated = tl.sum(tl.exp((x - high[:, None]) * rate), 1)
        return high, index, nan, total, rated

    peaks = tl.full([R, B], lowest, REAL)
    firsts = lanes[None, :] + tl.zeros([R, B], tl.int32)
    nans = tl.zeros([R, B], tl.int1)
    totals = tl.zeros([R, B], REAL)
    rateds = tl.zeros([R, B], REAL)
    for start in tl.range(0, classes, B, num_stages=STAGES):
        columns = start + lanes
        x = load_tile(row_pointers, columns, column_stride, kept[:, None] & (columns < classes)[None, :], lowest, REAL)
        above = x > peaks
        distance = tl.where(x == peaks, 0.0, tl.abs(x - peaks))  # equal infinities are no distance apart
        if RATED_SUM:
            rated_term = tl.exp(-distance * rate)
            rateds = tl.where(above, rateds * rated_term + 1.0, rateds + rated_term)
        if SUM:
            term = tl.exp(-distance)
            totals = tl.where(above, totals * term + 1.0, totals + term)
        else:
            nans = nans | (x != x)
        if PEAK:
            firsts = tl.where(above, columns[None, :], firsts)
        peaks = tl.where(above, x, peaks)
    if SUM:
        nans = totals != totals  # only a NaN entry does that to its lane; registers are dear here
    peak, index, nan = first_peak(peaks, firsts, nans, classes)
    total = tl.sum(totals * tl.exp(peaks - peak[:, None]), 1)
    rated = tl.sum(rateds * tl.exp((peaks - peak[:, None]) * rate), 1)
    return peak, index, nan, total, rated
