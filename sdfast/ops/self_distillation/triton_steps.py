"""The steps of the Triton kernels, each on a tile of (R, B) = (rows, columns) entries, one tile at a time.

Every loss, label function and option is one formula here: a target, an entry's part of its row's sums, an entry's
gradient. A one-hot costs two comparisons in registers, so a sparse target needs no path of its own.
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


@triton.jit
def target_tile(
    columns,  # (B,)
    classes,
    pointers,  # of the tile's rows: logits, labels, source (R,), class weights
    strides,  # between columns: logits, labels, source
    row,  # what a row fixes, (R,) each
    parameter,  # 1 / temperature, or the clip's slope
    LOSS: tl.constexpr,
    LABEL_FN: tl.constexpr,
    SOFT_LABELS: tl.constexpr,
    OWN_SOURCE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHARE_EXP: tl.constexpr,
    REAL: tl.constexpr,
):
    """(x, p, target, weighted target), (R, B) each, and which entries are inside; the targets are 0 outside."""
    logits, labels, source, class_weight = pointers
    stride, label_stride, source_stride = strides
    kept, label, uniform, at_label, at_source, high, total, hard, source_high, source_total = row
    inside = kept[:, None] & (columns < classes)[None, :]
    x = load_tile(logits, columns, stride, inside, float("-inf"), REAL)
    p = x
    if LOSS != MSE:
        p = tl.exp(x - high[:, None]) / total[:, None]

    if SOFT_LABELS:
        target = uniform[:, None] + at_label[:, None] * load_tile(labels, columns, label_stride, inside, 0.0, REAL)
    else:
        target = uniform[:, None] + tl.where(columns[None, :] == label[:, None], at_label[:, None], 0.0)
    if LABEL_FN == HARDMAX:
        target += tl.where(columns[None, :] == hard[:, None], at_source[:, None], 0.0)
    elif LABEL_FN != NO_LABEL_FUNCTION:
        if OWN_SOURCE:
            believed = x
        else:
            believed = load_tile(source, columns, source_stride, inside, float("-inf"), REAL)
        if LABEL_FN == SOFTMAX:
            if SHARE_EXP:
                believed = p
            else:
                believed = tl.exp((believed - source_high[:, None]) * parameter) / source_total[:, None]
        elif LABEL_FN == CLIP:
            believed = believed * parameter  # not minimum and maximum: a NaN stays
            believed = tl.where(believed < -1.0, -1.0, tl.where(believed > 1.0, 1.0, believed))
        target += tl.where(at_source[:, None] == 0, 0.0, at_source[:, None] * believed)  # alpha = 1 hides any source
    target = tl.where(inside, target, 0.0)
    weighted = target
    if WEIGHTED:
        weighted *= tl.load(class_weight + columns, mask=columns < classes, other=0.0)[None, :]
    return x, p, target, weighted, inside


@triton.jit
def row_terms(
    x,  # (R, B)
    p,  # (R, B)
    target,  # (R, B)
    weighted,  # (R, B)
    inside,  # (R, B)
    high,  # (R,)
    log_total,  # (R,)
    LOSS: tl.constexpr,
):
    """An element's part of the loss, and of the sum its row's gradient needs: the mass, or Brier's inner product."""
    if LOSS == MSE:
        difference = tl.where(inside, x - target, 0.0)
        return difference * difference, weighted
    if LOSS == BRIER:
        difference = tl.where(inside, p - target, 0.0)
        return difference * difference, tl.where(inside, p * difference, 0.0)
    # (x - max) - log(sum): a common offset of the logits costs no digit.
    term = log_total[:, None] - (x - high[:, None])
    if LOSS == KL:
        term += tl.log(tl.where(target == 0, 1.0, target))
    return tl.where(weighted == 0, 0.0, weighted * term), weighted  # no mass, no loss, though the logit be -inf


@triton.jit
def entropy_terms(
    target,  # (R, B)
):
    """An entry's part of the target's entropy, NaN where it is negative."""
    return -tl.where(target == 0, 0.0, target * tl.log(tl.where(target == 0, 1.0, target)))


@triton.jit
def gradient_tile(
    x,  # (R, B)
    p,  # (R, B)
    target,  # (R, B)
    weighted,  # (R, B)
    sums,  # (R,) of the second of row_terms
    factor,  # (R,)
    kept,  # (R,)
    classes,
    LOSS: tl.constexpr,
):
    """The row's factor times the loss's gradient with respect to the logits."""
    if LOSS == MSE:
        gradient = (x - target) * (2.0 / classes.to(factor.dtype))
    elif LOSS == BRIER:
        gradient = p * (p - target - sums[:, None]) * 2.0
    else:
        gradient = p * sums[:, None] - weighted
    return tl.where(kept[:, None], gradient * factor[:, None], 0.0)


@triton.jit
def sweep(
    classes,
    pointers,  # as target_tile takes them
    strides,
    row,
    parameter,
    mass,  # (R,) of the weighted target; used where it is known beforehand
    factor,  # (R,)
    out_pointers,  # (R,) of gradient rows
    stored,  # (R,) which rows of the gradient exist
    LOSS: tl.constexpr,
    LABEL_FN: tl.constexpr,
    SOFT_LABELS: tl.constexpr,
    OWN_SOURCE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHARE_EXP: tl.constexpr,
    KNOWN_MASS: tl.constexpr,
    GRADIENT: tl.constexpr,
    STATS: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    ONE_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    REAL: tl.constexpr,
):
    """(loss sum, target entropy, target's peak, its first index, any NaN in it) of each row; writes the gradient."""
    kept = row[0]
    high = row[5]
    log_total = tl.log(row[6])
    lanes = tl.arange(0, B)
    none = lanes[None, :] + tl.zeros([R, B], tl.int32)
    lowest = float("-inf")
    if ONE_TILE:
        x, p, target, weighted, inside = target_tile(
            lanes,
            classes,
            pointers,
            strides,
            row,
            parameter,
            LOSS,
            LABEL_FN,
            SOFT_LABELS,
            OWN_SOURCE,
            WEIGHTED,
            SHARE_EXP,
            REAL,
        )
        terms, parts = row_terms(x, p, target, weighted, inside, high, log_total, LOSS)
        entropy = tl.zeros([R], REAL)
        peak = tl.zeros([R], REAL)
        best = tl.zeros([R], tl.int32)
        nan = tl.zeros([R], tl.int1)
        if STATS:
            entropy = tl.sum(entropy_terms(target), 1)
            ranked = tl.where(inside & (target == target), target, lowest)
            peak, best, nan = first_peak(ranked, none, target != target, classes)
        if GRADIENT:
            if not KNOWN_MASS:
                mass = tl.sum(parts, 1)
            values = gradient_tile(x, p, target, weighted, mass, factor, kept, classes, LOSS)
            store_gradient(out_pointers, lanes, stored, classes, values)
        return tl.sum(terms, 1), entropy, peak, best, nan

    losses = tl.zeros([R, B], REAL)
    part_sums = tl.zeros([R, B], REAL)
    entropies = tl.zeros([R, B], REAL)
    peaks = tl.full([R, B], lowest, REAL)
    firsts = none
    nans = tl.zeros([R, B], tl.int1)
    last = (classes - 1) // B * B
    # The tiles that the statistics' sweep saw last are the likeliest in the cache, so this one goes backwards.
    for step in tl.range(0, classes, B, num_stages=STAGES):
        columns = last - step + lanes
        x, p, target, weighted, inside = target_tile(
            columns,
            classes,
            pointers,
            strides,
            row,
            parameter,
            LOSS,
            LABEL_FN,
            SOFT_LABELS,
            OWN_SOURCE,
            WEIGHTED,
            SHARE_EXP,
            REAL,
        )
        terms, parts = row_terms(x, p, target, weighted, inside, high, log_total, LOSS)
        losses += terms
        if not KNOWN_MASS:
            part_sums += parts
        if STATS:
            entropies += entropy_terms(target)
            higher = inside & (target >= peaks)  # an equal entry that comes later stands before
            firsts = tl.where(higher, columns[None, :], firsts)
            peaks = tl.where(higher, target, peaks)
            nans = nans | (target != target)
        if GRADIENT and KNOWN_MASS:
            values = gradient_tile(x, p, target, weighted, mass, factor, kept, classes, LOSS)
            store_gradient(out_pointers, columns, stored, classes, values)
    if GRADIENT and not KNOWN_MASS:
        mass = tl.sum(part_sums, 1)
        for start in tl.range(0, classes, B, num_stages=STAGES):
            columns = start + lanes
            x, p, target, weighted, inside = target_tile(
                columns,
                classes,
                pointers,
                strides,
                row,
                parameter,
                LOSS,
                LABEL_FN,
                SOFT_LABELS,
                OWN_SOURCE,
                WEIGHTED,
                SHARE_EXP,
                REAL,
            )
            values = gradient_tile(x, p, target, weighted, mass, factor, kept, classes, LOSS)
            store_gradient(out_pointers, columns, stored, classes, values)
    peak, best, nan = first_peak(peaks, firsts, nans, classes)
    return tl.sum(losses, 1), tl.sum(entropies, 1), peak, best, nan
