"""The two Triton kernels of the self-distillation loss, and the steps they are made of.

Every loss, label function and option is one formula on a tile of (ROWS, BLOCK) logits: a target tile, an element's
part of the row's sums, an element's gradient. A one-hot costs two comparisons in registers, so a sparse target needs no
path of its own. Switches are compile-time constants, and so is the absence of a tensor (``None``).

Within a function the suffixes of shapes are: R rows of a tile, B columns of a tile.
"""

import triton
import triton.language as tl

from sdfast.ops.self_distillation.op import LABEL_FUNCTIONS, LOSSES, REDUCTIONS

SOFTMAX = tl.constexpr(LABEL_FUNCTIONS["softmax"])
HARDMAX = tl.constexpr(LABEL_FUNCTIONS["hardmax"])
CLIP = tl.constexpr(LABEL_FUNCTIONS["clip"])
NO_LABEL_FUNCTION = tl.constexpr(-1)  # alpha is the number 1: the source is not even looked at
KL = tl.constexpr(LOSSES["kl"])
MSE = tl.constexpr(LOSSES["mse"])
BRIER = tl.constexpr(LOSSES["brier"])
NONE = tl.constexpr(REDUCTIONS["none"])
MEAN = tl.constexpr(REDUCTIONS["mean"])

MAX_COUNT_BLOCKS = tl.constexpr(1024)  # programs of the counting kernel, so that one tile reads what they found
SUM_BLOCK = tl.constexpr(1024)
STAGES = tl.constexpr(3)  # column tiles in flight, where a row takes more than one


@triton.jit
def _load(
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
def _store_last(
    row_pointers,  # (R,)
    columns,  # (B,)
    column_stride,
    inside,  # (R, B)
    values,  # (R, B)
):
    # Nobody reads the gradient here again: it should not push the logits out of the cache.
    pointers = row_pointers[:, None] + columns.to(tl.int64)[None, :] * column_stride
    tl.store(pointers, values.to(row_pointers.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit
def _first_peak(
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
def _statistics(
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
        x = _load(row_pointers, lanes, column_stride, kept[:, None] & (lanes < classes)[None, :], lowest, REAL)
        values = tl.where(x == x, x, lowest)
        high, index, nan = _first_peak(values, lanes[None, :] + tl.zeros([R, B], tl.int32), x != x, classes)
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
        x = _load(row_pointers, columns, column_stride, kept[:, None] & (columns < classes)[None, :], lowest, REAL)
        above = x > peaks
        distance = tl.where(x == peaks, 0.0, tl.abs(x - peaks))  # equal infinities are no distance apart
        if SUM:
            term = tl.exp(-distance)
            totals = tl.where(above, totals * term + 1.0, totals + term)
        if RATED_SUM:
            rated_term = tl.exp(-distance * rate)
            rateds = tl.where(above, rateds * rated_term + 1.0, rateds + rated_term)
        if PEAK:
            firsts = tl.where(above, columns[None, :], firsts)
            nans = nans | (x != x)
        peaks = tl.where(above, x, peaks)
    peak, index, nan = _first_peak(peaks, firsts, nans, classes)
    total = tl.sum(totals * tl.exp(peaks - peak[:, None]), 1)
    rated = tl.sum(rateds * tl.exp((peaks - peak[:, None]) * rate), 1)
    return peak, index, nan, total, rated


@triton.jit
def _count_labels(
    labels,  # (N,) int64
    label_stride,
    class_weight,  # (C,) or None
    begin,
    end,
    classes,
    ignore_index,
    REAL: tl.constexpr,
):
    """(kept rows, their class weights' sum) among rows begin .. end, in an order that depends on nothing else."""
    kept = tl.zeros([SUM_BLOCK], tl.int32)
    weight = tl.zeros([SUM_BLOCK], REAL)
    for start in range(begin, end, SUM_BLOCK):
        rows = start + tl.arange(0, SUM_BLOCK).to(tl.int64)
        label = tl.load(labels + rows * label_stride, mask=rows < end, other=0)
        counts = (rows < end) & (label != ignore_index)
        kept += counts.to(tl.int32)
        if class_weight is not None:
            index = tl.minimum(tl.maximum(label, 0), classes - 1)
            weight += tl.load(class_weight + index, mask=counts, other=0.0)
    return tl.sum(kept, 0), tl.sum(weight, 0)


@triton.jit
def _is_correct(
    high,  # (R,) the largest logit
    index,  # (R,) where it is first
    nan,  # (R,)
    label,  # (R,) given label
    label_pointers,  # (R,) of probability rows
    label_stride,
    kept,  # (R,)
    SIGNS: tl.constexpr,
):
    """Whether a row's largest logit is its label's; for one column of +-1 labels, whether the signs agree."""
    if SIGNS:
        y = tl.load(label_pointers, mask=kept, other=0.0)
        return kept & ~nan & ((high > 0) == (y > 0))
    return kept & ~nan & (index == label)


@triton.jit
def count_kernel(
    logits,  # (N, C), adaptive only
    labels,  # (N,) int64, or (N, C)
    class_weight,  # (C,) or None
    correct,  # (programs,) int32 out, adaptive only
    kept,  # (programs,) int32 out
    weights,  # (programs,) out, or None
    row_stride,
    column_stride,
    label_row_stride,
    label_column_stride,
    rows,
    classes,
    chunk,  # rows of one program
    ignore_index,
    ADAPTIVE: tl.constexpr,
    SOFT_LABELS: tl.constexpr,
    SIGNS: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    ONE_TILE: tl.constexpr,
    REAL: tl.constexpr,
):
    # Computed: how many rows are kept, their class weights' sum, and how many have their largest logit at the label.
    # Fused: argmax of the logits, argmax of probability labels, comparison and count.
    # Never materialised: an argmax per row; a program writes three numbers.
    program = tl.program_id(0)
    begin = program.to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, rows)
    if ADAPTIVE:
        hits = tl.zeros([R], tl.int32)
        for start in range(begin, end, R):
            row = start + tl.arange(0, R).to(tl.int64)  # (R,)
            wanted = row < end
            label = tl.zeros([R], tl.int64)
            if not SOFT_LABELS:
                label = tl.load(labels + row * label_row_stride, mask=wanted, other=0)
                wanted = wanted & (label != ignore_index)
            label_pointers = labels + row * label_row_stride
            if SOFT_LABELS and not SIGNS:
                _, likeliest, _, _, _ = _statistics(
                    label_pointers, label_column_stride, wanted, classes, 1.0, True, False, False, R, B, ONE_TILE, REAL
                )
                label = likeliest.to(tl.int64)
            high, index, nan, _, _ = _statistics(
                logits + row * row_stride, column_stride, wanted, classes, 1.0, True, False, False, R, B, ONE_TILE, REAL
            )
            hits += _is_correct(high, index, nan, label, label_pointers, label_column_stride, wanted, SIGNS).to(tl.int32)
        tl.store(correct + program, tl.sum(hits, 0))
    if not SOFT_LABELS:
        count, weight = _count_labels(labels, label_row_stride, class_weight, begin, end, classes, ignore_index, REAL)
        tl.store(kept + program, count)
        if class_weight is not None:
            tl.store(weights + program, weight)


@triton.jit
def _sum_counts(
    values,  # (count_blocks,)
    count_blocks,
):
    lanes = tl.arange(0, MAX_COUNT_BLOCKS)
    return tl.sum(tl.load(values + lanes, mask=lanes < count_blocks, other=0), 0)


@triton.jit
def _sum_partials(
    values,  # (programs,)
    programs,
    REAL: tl.constexpr,
):
    """Their sum in a fixed order. Past the first-level cache, where another program's value could be stale."""
    lanes = tl.arange(0, SUM_BLOCK)
    total = tl.zeros([SUM_BLOCK], REAL)
    for start in range(0, programs, SUM_BLOCK):
        total += tl.load(values + start + lanes, mask=start + lanes < programs, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def _tile(
    columns,  # (B,)
    classes,
    pointers,  # of the tile's rows: logits, labels, source (R,), class weights
    strides,  # between columns: logits, labels, source
    row,  # what a row fixes, (R,) each: see rows_kernel
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
    x = _load(logits, columns, stride, inside, float("-inf"), REAL)
    p = x
    if LOSS != MSE:
        p = tl.exp(x - high[:, None]) / total[:, None]

    if SOFT_LABELS:
        target = uniform[:, None] + at_label[:, None] * _load(labels, columns, label_stride, inside, 0.0, REAL)
    else:
        target = uniform[:, None] + tl.where(columns[None, :] == label[:, None], at_label[:, None], 0.0)
    if LABEL_FN == HARDMAX:
        target += tl.where(columns[None, :] == hard[:, None], at_source[:, None], 0.0)
    elif LABEL_FN != NO_LABEL_FUNCTION:
        if OWN_SOURCE:
            believed = x
        else:
            believed = _load(source, columns, source_stride, inside, float("-inf"), REAL)
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
def _row_terms(
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
def _entropy_terms(
    target,  # (R, B)
):
    return -tl.where(target == 0, 0.0, target * tl.log(tl.where(target == 0, 1.0, target)))


@triton.jit
def _gradient(
    x,  # (R, B)
    p,  # (R, B)
    target,  # (R, B)
    weighted,  # (R, B)
    sums,  # (R,) of the second of _row_terms
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


@triton.jit(do_not_specialize=["rows", "count_blocks", "ignore_index"])
def rows_kernel(
    logits,  # (N, C)
    labels,  # (N,) int64, or (N, C) probabilities or real targets
    alpha,  # () or (N,), or None
    source,  # (N, C), or None: the logits themselves
    class_weight,  # (C,) or None
    row_weight,  # (N,) or None
    correct,  # (count_blocks,) int32 from count_kernel, or None
    kept_counts,  # (count_blocks,) int32 from count_kernel, or None
    weight_sums,  # (count_blocks,) from count_kernel, or None
    upstream,  # () or (N,), in the backward
    state,  # (5,): read in the backward, else written; or None
    gradient,  # (N, C) out, or None
    loss,  # () or (N,) out; None in the backward
    partials,  # (6, programs) scratch, or None where nothing is summed over rows
    arrivals,  # (1,) int32, zero before and after, or None
    row_stride,
    column_stride,
    label_row_stride,
    label_column_stride,
    source_row_stride,
    source_column_stride,
    upstream_stride,
    alpha_value: tl.float64,
    label_parameter: tl.float64,
    label_smoothing: tl.float64,
    rows,
    classes,
    count_blocks,
    ignore_index,
    LOSS: tl.constexpr,
    LABEL_FN: tl.constexpr,
    REDUCTION: tl.constexpr,
    SOFT_LABELS: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ALPHA_PER_ROW: tl.constexpr,
    SHARE_EXP: tl.constexpr,
    BACKWARD: tl.constexpr,
    STATS: tl.constexpr,
    SIGNS: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    ONE_TILE: tl.constexpr,
    REAL: tl.constexpr,
):
    # Computed: the self-distillation loss of R rows, its gradient with respect to the logits, batch sums and statistics.
    # Fused: denominator, alpha, label function, target, loss, gradient, and (by the last program) the sum over all rows.
    # Never materialised: a (rows, classes) target or probability; a row of one tile is read once and stays in registers.
    OWN_SOURCE: tl.constexpr = source is None
    WEIGHTED: tl.constexpr = class_weight is not None
    program = tl.program_id(0)
    row = program.to(tl.int64) * R + tl.arange(0, R)  # (R,), 64 bits before any stride multiplies it
    kept = row < rows
    bad = tl.zeros([R], tl.int1)
    label = tl.zeros([R], tl.int32)
    if not SOFT_LABELS:
        given = tl.load(labels + row * label_row_stride, mask=kept, other=0)
        kept = kept & (given != ignore_index)
        bad = kept & ((given < 0) | (given >= classes))
        label = tl.where(bad | ~kept, 0, given).to(tl.int32)

    # What the batch fixes: the denominator and alpha.
    denominator = tl.full([R], 1.0, REAL)
    if BACKWARD:
        denominator *= tl.load(state + 1)
    elif REDUCTION == MEAN:
        if SOFT_LABELS:
            denominator *= tl.maximum(rows, 1)
        else:
            if kept_counts is None:
                count, weight = _count_labels(
                    labels, label_row_stride, class_weight, 0, rows, classes, ignore_index, REAL
                )
            else:
                count = _sum_counts(kept_counts, count_blocks)
                weight = count.to(REAL)
                if WEIGHTED:
                    weight = _sum_counts(weight_sums, count_blocks)
            if WEIGHTED:
                denominator = tl.where(count == 0, 1.0, denominator * weight)  # no row kept: 0, not 0 / 0
            else:
                denominator *= tl.maximum(count, 1)
    a = tl.full([R], alpha_value, REAL)
    if ADAPTIVE:
        if SOFT_LABELS:
            kept_rows = rows
        else:
            kept_rows = _sum_counts(kept_counts, count_blocks)
        accuracy = tl.full([R], 1.0, REAL) * _sum_counts(correct, count_blocks) / tl.maximum(kept_rows, 1)
        a = 1.0 - tl.minimum(a * accuracy, 1.0)
    elif alpha is not None:
        if ALPHA_PER_ROW:
            a = tl.load(alpha + row, mask=row < rows, other=1.0)
        else:
            a = tl.full([R], 1.0, REAL) * tl.load(alpha)

    # target = uniform + at_label y + at_source h
    smoothing = tl.full([R], label_smoothing, REAL)
    at_label = a * (1.0 - smoothing)
    uniform = tl.where(bad, float("nan"), a * smoothing / classes)
    at_source = 1.0 - a
    factor = 1.0 / denominator
    if BACKWARD:
        factor = tl.load(upstream + row * upstream_stride, mask=kept, other=0.0) / denominator
    row_factor = tl.full([R], 1.0, REAL)
    if row_weight is not None:
        row_factor = tl.load(row_weight + row, mask=kept, other=0.0)
        factor *= row_factor

    # What a row's own numbers fix: peaks and sums of the logits and of the source.
    rate = tl.full([R, 1], label_parameter, REAL)
    if LABEL_FN == CLIP:
        rate = 4.0 / (1.0 - 2.0 * rate)
    else:
        rate = 1.0 / rate
    row_pointers = logits + row * row_stride
    label_pointers = labels + row * label_row_stride
    source_pointers = row_pointers
    source_stride = column_stride
    if not OWN_SOURCE:
        source_pointers = source + row * source_row_stride
        source_stride = source_column_stride
    OWN_HARDMAX: tl.constexpr = OWN_SOURCE and LABEL_FN == HARDMAX
    OWN_SOFTMAX: tl.constexpr = OWN_SOURCE and LABEL_FN == SOFTMAX and not SHARE_EXP
    LOOK: tl.constexpr = LOSS != MSE or STATS or OWN_HARDMAX or OWN_SOFTMAX
    high = tl.zeros([R], REAL)
    total = tl.full([R], 1.0, REAL)
    hard = tl.zeros([R], tl.int32)
    nan = tl.zeros([R], tl.int1)
    own_rated = total
    if LOOK:
        high, hard, nan, total, own_rated = _statistics(
            row_pointers, column_stride, kept, classes, rate, OWN_HARDMAX or STATS, LOSS != MSE, OWN_SOFTMAX,
            R, B, ONE_TILE, REAL,
        )  # fmt: skip
    index = hard
    source_nan = nan
    source_high = high
    source_total = own_rated
    if not OWN_SOURCE and (LABEL_FN == HARDMAX or LABEL_FN == SOFTMAX):
        source_high, hard, source_nan, _, source_total = _statistics(
            source_pointers, source_stride, kept & (at_source != 0), classes, rate, LABEL_FN == HARDMAX, False,
            LABEL_FN == SOFTMAX, R, B, ONE_TILE, REAL,
        )  # fmt: skip
    if LABEL_FN == HARDMAX:
        uniform = tl.where(source_nan & (at_source != 0), float("nan"), uniform)

    # The sweep over the columns. The last tiles of the sweep above are the likeliest in the cache, so it goes backwards.
    pointers = (row_pointers, label_pointers, source_pointers, class_weight if WEIGHTED else row_pointers)
    strides = (column_stride, label_column_stride, source_stride)
    fixed = (kept, label, uniform, at_label, at_source, high, total, hard, source_high, source_total)
    out_pointers = row_pointers
    if gradient is not None:
        out_pointers = gradient + row * classes
    log_total = tl.log(total)
    lanes = tl.arange(0, B)
    # Index labels and any h sum to 1 - alpha + alpha: the gradient needs no sweep of its own to know the mass.
    KNOWN_MASS: tl.constexpr = LOSS != BRIER and not SOFT_LABELS and not WEIGHTED
    sums = at_label + uniform * classes + at_source
    entropy = tl.zeros([R], REAL)
    best = hard
    target_nan = nan
    if ONE_TILE:
        x, p, target, weighted, inside = _tile(
            lanes, classes, pointers, strides, fixed, rate, LOSS, LABEL_FN, SOFT_LABELS, OWN_SOURCE, WEIGHTED, SHARE_EXP,
            REAL,
        )  # fmt: skip
        terms, parts = _row_terms(x, p, target, weighted, inside, high, log_total, LOSS)
        row_loss = tl.sum(terms, 1)
        if not KNOWN_MASS:
            sums = tl.sum(parts, 1)
        if STATS:
            entropy = tl.sum(_entropy_terms(target), 1)
            ranked = tl.where(inside & (target == target), target, float("-inf"))
            _, best, target_nan = _first_peak(ranked, lanes[None, :] + tl.zeros([R, B], tl.int32), target != target, classes)
        if gradient is not None:
            values = _gradient(x, p, target, weighted, sums, factor, kept, classes, LOSS)
            _store_last(out_pointers, lanes, 1, (row < rows)[:, None] & (lanes < classes)[None, :], values)
    else:
        losses = tl.zeros([R, B], REAL)
        part_sums = tl.zeros([R, B], REAL)
        entropies = tl.zeros([R, B], REAL)
        peaks = tl.full([R, B], float("-inf"), REAL)
        firsts = lanes[None, :] + tl.zeros([R, B], tl.int32)
        nans = tl.zeros([R, B], tl.int1)
        last = (classes - 1) // B * B
        for step in tl.range(0, classes, B, num_stages=STAGES):
            columns = last - step + lanes
            x, p, target, weighted, inside = _tile(
                columns, classes, pointers, strides, fixed, rate, LOSS, LABEL_FN, SOFT_LABELS, OWN_SOURCE, WEIGHTED,
                SHARE_EXP, REAL,
            )  # fmt: skip
            terms, parts = _row_terms(x, p, target, weighted, inside, high, log_total, LOSS)
            losses += terms
            if not KNOWN_MASS:
                part_sums += parts
            if STATS:
                entropies += _entropy_terms(target)
                higher = inside & (target >= peaks)  # backwards: an equal entry that comes later stands first
                firsts = tl.where(higher, columns[None, :], firsts)
                peaks = tl.where(higher, target, peaks)
                nans = nans | (target != target)
            if gradient is not None and (KNOWN_MASS or LOSS == MSE):
                values = _gradient(x, p, target, weighted, sums, factor, kept, classes, LOSS)
                _store_last(out_pointers, columns, 1, (row < rows)[:, None] & (columns < classes)[None, :], values)
        row_loss = tl.sum(losses, 1)
        if not KNOWN_MASS:
            sums = tl.sum(part_sums, 1)
        if STATS:
            entropy = tl.sum(entropies, 1)
            _, best, target_nan = _first_peak(peaks, firsts, nans, classes)
        if gradient is not None and not KNOWN_MASS and LOSS != MSE:
            for start in tl.range(0, classes, B, num_stages=STAGES):
                columns = start + lanes
                x, p, target, weighted, inside = _tile(
                    columns, classes, pointers, strides, fixed, rate, LOSS, LABEL_FN, SOFT_LABELS, OWN_SOURCE, WEIGHTED,
                    SHARE_EXP, REAL,
                )  # fmt: skip
                values = _gradient(x, p, target, weighted, sums, factor, kept, classes, LOSS)
                _store_last(out_pointers, columns, 1, (row < rows)[:, None] & (columns < classes)[None, :], values)

    if not BACKWARD:
        if LOSS == MSE:
            row_loss = row_loss / classes
        elif LOSS != BRIER:
            row_loss = tl.where(total == total, row_loss, float("nan"))  # though no class has any mass
        row_loss = tl.where(kept, row_loss * row_factor, 0.0)
        if REDUCTION == NONE:
            tl.store(loss + row, row_loss, mask=row < rows)
        # One value a program, in shape (1,), from R equal ones.
        divisor = tl.max(denominator, 0)
        if STATS:
            if SOFT_LABELS and not SIGNS:
                _, likeliest, _, _, _ = _statistics(
                    label_pointers, label_column_stride, kept, classes, 1.0, True, False, False, R, B, ONE_TILE, REAL
                )
                label = likeliest
            hits = ~bad & _is_correct(high, index, nan, label, label_pointers, label_column_stride, kept, SIGNS)
            if SIGNS:
                y = tl.load(label_pointers, mask=kept, other=0.0)
                sign = tl.sum(tl.where(lanes[None, :] == 0, target, 0.0), 1) > 0
                agrees = kept & (sign == (y > 0))
            else:
                agrees = kept & ~target_nan & ~bad & (best == label)
            programs = tl.num_programs(0)
            tl.store(partials + programs + program, tl.sum(kept.to(REAL), 0))
            tl.store(partials + 2 * programs + program, tl.sum(tl.where(kept, a, 0.0), 0))
            tl.store(partials + 3 * programs + program, tl.sum(hits.to(REAL), 0))
            tl.store(partials + 4 * programs + program, tl.sum(tl.where(kept, entropy, 0.0), 0))
            tl.store(partials + 5 * programs + program, tl.sum(agrees.to(REAL), 0))
        elif state is not None:
            if program == 0:  # for the backward, which reads only these two
                tl.store(state, tl.max(a, 0))
                tl.store(state + 1, divisor)
        if partials is not None:
            if REDUCTION != NONE:
                tl.store(partials + program, tl.sum(row_loss, 0))
            # The last program to arrive sums what all have written, in the order of the programs: no float is added
            # atomically. The barriers put every thread's stores before the arrival, and its loads after.
            programs = tl.num_programs(0)
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")
            if arrived == programs - 1:
                tl.debug_barrier()
                if REDUCTION != NONE:
                    tl.store(loss, _sum_partials(partials, programs, REAL) / divisor)
                if STATS:
                    kept_sum = tl.maximum(_sum_partials(partials + programs, programs, REAL), 1.0)
                    mean_alpha = _sum_partials(partials + 2 * programs, programs, REAL) / kept_sum
                    if not ALPHA_PER_ROW:
                        mean_alpha = tl.max(a, 0)
                    tl.store(state, mean_alpha)
                    tl.store(state + 1, divisor)
                    tl.store(state + 2, _sum_partials(partials + 3 * programs, programs, REAL) / kept_sum)
                    tl.store(state + 3, _sum_partials(partials + 4 * programs, programs, REAL) / kept_sum)
                    tl.store(state + 4, _sum_partials(partials + 5 * programs, programs, REAL) / kept_sum)
                tl.store(arrivals, 0)
