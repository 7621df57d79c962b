"""What a batch fixes before its rows are computed, and what is summed over it after: counts, alpha, mean, statistics.

No float is ever added atomically, and every sum has an order of its own: results are bitwise repeatable.
"""

import triton
import triton.language as tl

from sdfast.ops.self_distillation.triton_steps import row_statistics

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
def is_correct(
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
    STAGES: tl.constexpr,
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
                    label_pointers,
                    label_column_stride,
                    wanted,
                    classes,
                    1.0,
                    True,
                    False,
                    False,
                    R,
                    B,
                    ONE_TILE,
                    STAGES,
                    REAL,
                )
                label = likeliest.to(tl.int64)
            high, index, nan, _, _ = row_statistics(
                logits + row * row_stride,
                column_stride,
                wanted,
                classes,
                1.0,
                True,
                False,
                False,
                R,
                B,
                ONE_TILE,
                STAGES,
                REAL,
            )
            hits += is_correct(high, index, nan, label, label_pointers, wanted, SIGNS).to(tl.int32)
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
def batch_denominator(
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
    """What a mean divides by, in shape (1,): kept rows, or with class weights and index labels the labels' weights."""
    denominator = tl.full([1], 1.0, REAL)
    if SOFT_LABELS:
        denominator *= tl.maximum(rows, 1)
    else:
        if kept_counts is None:
            count, weight = _count_labels(labels, label_stride, class_weight, 0, rows, classes, ignore_index, REAL)
        else:
            count = _sum_counts(kept_counts, count_blocks)
            weight = 0.0
            if class_weight is not None:
                weight = _sum_counts(weight_sums, count_blocks)
        if class_weight is None:
            denominator *= tl.maximum(count, 1)
        else:
            denominator = tl.where(count == 0, denominator, denominator * weight)  # no row kept: 0, not 0 / 0
    return denominator


@triton.jit
def divided(
    numerator,  # (R,)
    denominator,  # (1,)
):
    """The quotient as IEEE rounds it, which `/` of float32 does not on a GPU: torch divides alike."""
    if numerator.dtype == tl.float32:
        return tl.div_rn(numerator, denominator)
    return numerator / denominator


@triton.jit
def row_alphas(
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
        a = 1.0 - tl.minimum(a * accuracy, 1.0)
    elif alpha is not None:
        if PER_ROW:
            a = tl.load(alpha + row, mask=row < rows, other=1.0)
        else:
            a = tl.full([R], 1.0, REAL) * tl.load(alpha)
    return a


@triton.jit
def store_partial(
    partials,  # (6, programs)
    which: tl.constexpr,
    values,  # (R,)
    kept,  # (R,)
    REAL: tl.constexpr,
):
    total = tl.sum(tl.where(kept, values.to(REAL), 0.0), 0)
    tl.store(partials + which * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit
def store_statistics(
    partials,  # (6, programs)
    kept,  # (R,), and so all that follow
    a,
    correct,
    entropy,
    agrees,
    REAL: tl.constexpr,
):
    """What `finish_batch` makes the state of, with STATS."""
    store_partial(partials, 1, kept, kept, REAL)
    store_partial(partials, 2, a, kept, REAL)
    store_partial(partials, 3, correct, kept, REAL)
    store_partial(partials, 4, entropy, kept, REAL)
    store_partial(partials, 5, agrees, kept, REAL)


@triton.jit
def store_state(
    state,  # (5,) out
    a,  # (R,)
    denominator,  # (1,)
):
    """The state without STATS, by the first program: alpha and the denominator, all that a backward reads."""
    program = tl.program_id(0)
    tl.store(state, tl.max(a, 0), mask=program == 0)
    tl.store(state + 1 + tl.arange(0, 1), denominator, mask=tl.arange(0, 1) == program)
    statistics = tl.arange(0, 4)
    tl.store(state + 2 + statistics, float("nan"), mask=statistics < tl.where(program == 0, 3, 0))


@triton.jit
def finish_batch(
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
