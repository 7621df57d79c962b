"""The two Triton kernels of the self-distillation loss: one counts over the batch, one does everything else.

An absent tensor is ``None``, and its code is not compiled. The steps on a tile are in `triton_steps`.
"""

import triton
import triton.language as tl

from sdfast.ops.self_distillation.op import REDUCTIONS
from sdfast.ops.self_distillation.triton_steps import (
    CLIP,
    BRIER,
    HARDMAX,
    MSE,
    SOFTMAX,
    row_statistics,
    sweep,
)

NONE = tl.constexpr(REDUCTIONS["none"])
MEAN = tl.constexpr(REDUCTIONS["mean"])

MAX_COUNT_BLOCKS = tl.constexpr(1024)  # programs of the counting kernel, so that one tile reads what they found
SUM_BLOCK = tl.constexpr(1024)


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
                _, likeliest, _, _, _ = row_statistics(
                    label_pointers, label_column_stride, wanted, classes, 1.0, True, False, False, R, B, ONE_TILE, REAL
                )
                label = likeliest.to(tl.int64)
            high, index, nan, _, _ = row_statistics(
                logits + row * row_stride, column_stride, wanted, classes, 1.0, True, False, False, R, B, ONE_TILE, REAL
            )
            hits += _is_correct(high, index, nan, label, label_pointers, wanted, SIGNS).to(tl.int32)
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
def _denominator(
    labels,
    label_stride,
    class_weight,
    kept_counts,
    weight_sums,
    rows,
    classes,
    count_blocks,
    ignore_index,
    SOFT_LABELS: tl.constexpr,
    REAL: tl.constexpr,
):
    """What a mean divides by, in shape (1,): kept rows, or with class weights and index labels their labels' weights."""
    denominator = tl.full([1], 1.0, REAL)
    if SOFT_LABELS:
        return denominator * tl.maximum(rows, 1)
    if kept_counts is None:
        count, weight = _count_labels(labels, label_stride, class_weight, 0, rows, classes, ignore_index, REAL)
    else:
        count = _sum_counts(kept_counts, count_blocks)
        weight = count.to(REAL)
        if class_weight is not None:
            weight = _sum_counts(weight_sums, count_blocks)
    if class_weight is None:
        return denominator * tl.maximum(count, 1)
    return tl.where(count == 0, denominator, denominator * weight)  # no row kept: 0, not 0 / 0


@triton.jit
def _alpha(
    alpha,
    alpha_value,
    correct,
    kept_counts,
    count_blocks,
    row,  # (R,)
    rows,
    ADAPTIVE: tl.constexpr,
    PER_ROW: tl.constexpr,
    R: tl.constexpr,
    REAL: tl.constexpr,
):
    """(R,) weights of the given label."""
    a = tl.full([R], alpha_value, REAL)
    if ADAPTIVE:
        kept = rows
        if kept_counts is not None:
            kept = _sum_counts(kept_counts, count_blocks)
        accuracy = tl.full([R], 1.0, REAL) * _sum_counts(correct, count_blocks) / tl.maximum(kept, 1)
        return 1.0 - tl.minimum(a * accuracy, 1.0)
    if alpha is None:
        return a
    if PER_ROW:
        return tl.load(alpha + row, mask=row < rows, other=1.0)
    return tl.full([R], 1.0, REAL) * tl.load(alpha)


@triton.jit
def _store_partial(
    partials,  # (6, programs)
    which: tl.constexpr,
    values,  # (R,)
    kept,  # (R,)
    REAL: tl.constexpr,
):
    total = tl.sum(tl.where(kept, values.to(REAL), 0.0), 0)
    tl.store(partials + which * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit
def _finish(
    loss,  # () out, unless nothing is reduced
    state,  # (5,) out, with STATS
    partials,  # (6, programs)
    arrivals,  # (1,)
    denominator,  # (1,)
    a,  # (R,)
    REDUCED: tl.constexpr,
    STATS: tl.constexpr,
    ALPHA_PER_ROW: tl.constexpr,
    REAL: tl.constexpr,
):
    """The last program to arrive sums what all have written, in the programs' order: no float is added atomically.

    The barriers put every thread's stores before its program's arrival, and the last program's loads after it.
    """
    programs = tl.num_programs(0)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")
    if arrived == programs - 1:
        tl.debug_barrier()
        one = tl.arange(0, 1)
        if REDUCED:
            tl.store(loss + one, _sum_partials(partials, programs, REAL) / denominator)
        if STATS:
            kept = tl.maximum(_sum_partials(partials + programs, programs, REAL), 1.0)
            if ALPHA_PER_ROW:
                tl.store(state, _sum_partials(partials + 2 * programs, programs, REAL) / kept)
            else:
                tl.store(state, tl.max(a, 0))  # R equal values
            tl.store(state + 1 + one, denominator)
            tl.store(state + 2, _sum_partials(partials + 3 * programs, programs, REAL) / kept)
            tl.store(state + 3, _sum_partials(partials + 4 * programs, programs, REAL) / kept)
            tl.store(state + 4, _sum_partials(partials + 5 * programs, programs, REAL) / kept)
        tl.store(arrivals, 0)


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
    program = tl.program_id(0)
    row = program.to(tl.int64) * R + tl.arange(0, R)  # (R,), 64 bits before any stride multiplies it
    kept = row < rows
    bad = tl.zeros([R], tl.int1)
    label = tl.zeros([R], tl.int32)
    if not SOFT_LABELS:
        given = tl.load(labels + row * label_row_stride, mask=kept, other=0)
        kept = kept & (given != ignore_index)
        bad = kept & ((given < 0) | (given >= classes))
        label = tl.where(kept & ~bad, given, 0).to(tl.int32)

    # What the batch fixes: the denominator and alpha. target = uniform + at_label y + at_source h
    denominator = tl.full([1], 1.0, REAL)
    if BACKWARD:
        denominator = tl.load(state + 1 + tl.arange(0, 1))
    elif REDUCTION == MEAN:
        denominator = _denominator(
            labels, label_row_stride, class_weight, kept_counts, weight_sums, rows, classes, count_blocks, ignore_index,
            SOFT_LABELS, REAL,
        )  # fmt: skip
    a = _alpha(alpha, alpha_value, correct, kept_counts, count_blocks, row, rows, ADAPTIVE, ALPHA_PER_ROW, R, REAL)
    smoothing = tl.full([R], label_smoothing, REAL)
    at_label = a * (1.0 - smoothing)
    uniform = tl.where(bad, float("nan"), a * smoothing / classes)
    at_source = 1.0 - a
    row_factor = tl.full([R], 1.0, REAL)
    if row_weight is not None:
        row_factor = tl.load(row_weight + row, mask=kept, other=0.0)
    factor = row_factor / denominator
    if BACKWARD:
        factor *= tl.load(upstream + row * upstream_stride, mask=kept, other=0.0)

    # What a row's own numbers fix: peaks and sums of the logits and of the source.
    OWN_SOURCE: tl.constexpr = source is None
    WEIGHTED: tl.constexpr = class_weight is not None
    OWN_HARDMAX: tl.constexpr = OWN_SOURCE and LABEL_FN == HARDMAX
    OWN_SOFTMAX: tl.constexpr = OWN_SOURCE and LABEL_FN == SOFTMAX and not SHARE_EXP
    parameter = tl.full([R, 1], label_parameter, REAL)
    if LABEL_FN == CLIP:
        parameter = 4.0 / (1.0 - 2.0 * parameter)
    else:
        parameter = 1.0 / parameter
    row_pointers = logits + row * row_stride
    label_pointers = labels + row * label_row_stride
    source_pointers = row_pointers
    source_stride = column_stride
    high = tl.zeros([R], REAL)
    hard = tl.zeros([R], tl.int32)
    nan = tl.zeros([R], tl.int1)
    total = tl.full([R], 1.0, REAL)
    rated = total
    if LOSS != MSE or STATS or OWN_HARDMAX or OWN_SOFTMAX:
        high, hard, nan, total, rated = row_statistics(
            row_pointers, column_stride, kept, classes, parameter, OWN_HARDMAX or STATS, LOSS != MSE, OWN_SOFTMAX,
            R, B, ONE_TILE, REAL,
        )  # fmt: skip
    source_high = high
    source_hard = hard
    source_nan = nan
    if not OWN_SOURCE:
        source_pointers = source + row * source_row_stride
        source_stride = source_column_stride
        if LABEL_FN == HARDMAX or LABEL_FN == SOFTMAX:
            source_high, source_hard, source_nan, _, rated = row_statistics(
                source_pointers, source_stride, kept & (at_source != 0), classes, parameter, LABEL_FN == HARDMAX, False,
                LABEL_FN == SOFTMAX, R, B, ONE_TILE, REAL,
            )  # fmt: skip
    if LABEL_FN == HARDMAX:
        uniform = tl.where(source_nan & (at_source != 0), float("nan"), uniform)

    out_pointers = row_pointers
    if gradient is not None:
        out_pointers = gradient + row * classes
    weight_pointers = row_pointers
    if WEIGHTED:
        weight_pointers = class_weight
    # An index label and any h have mass 1 together, so the gradient need not wait for a sum over the row.
    row_loss, entropy, target_high, best, target_nan = sweep(
        classes,
        (row_pointers, label_pointers, source_pointers, weight_pointers),
        (column_stride, label_column_stride, source_stride),
        (kept, label, uniform, at_label, at_source, high, total, source_hard, source_high, rated),
        parameter, at_label + uniform * classes + at_source, factor, out_pointers, row < rows,
        (LOSS, LABEL_FN, SOFT_LABELS, OWN_SOURCE, WEIGHTED, SHARE_EXP),
        LOSS == MSE or (LOSS != BRIER and not SOFT_LABELS and not WEIGHTED), gradient is not None, STATS, R, B, ONE_TILE,
        REAL,
    )  # fmt: skip
    if BACKWARD:
        return

    if LOSS == MSE:
        row_loss = row_loss / classes
    elif LOSS != BRIER:
        row_loss = tl.where(total == total, row_loss, float("nan"))  # though no class have any mass
    row_loss = tl.where(kept, row_loss * row_factor, 0.0)
    if REDUCTION == NONE:
        tl.store(loss + row, row_loss, mask=row < rows)
    else:
        _store_partial(partials, 0, row_loss, kept, REAL)
    if STATS:
        if SIGNS:
            agrees = (target_high > 0) == (tl.load(label_pointers, mask=kept, other=0.0) > 0)
        else:
            if SOFT_LABELS:
                _, label, _, _, _ = row_statistics(
                    label_pointers, label_column_stride, kept, classes, 1.0, True, False, False, R, B, ONE_TILE, REAL
                )
            agrees = best == label
        correct_rows = _is_correct(high, hard, nan, label, label_pointers, kept, SIGNS)
        _store_partial(partials, 1, kept, kept, REAL)
        _store_partial(partials, 2, a, kept, REAL)
        _store_partial(partials, 3, correct_rows & ~bad, kept, REAL)
        _store_partial(partials, 4, entropy, kept, REAL)
        _store_partial(partials, 5, agrees & ~target_nan & ~bad, kept, REAL)
    elif state is not None:
        if program == 0:  # the backward reads only these two
            tl.store(state, tl.max(a, 0))
            tl.store(state + 1 + tl.arange(0, 1), denominator)
    if partials is not None:
        _finish(loss, state, partials, arrivals, denominator, a, REDUCTION != NONE, STATS, ALPHA_PER_ROW, REAL)
