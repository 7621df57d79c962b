"""The Triton kernel of the self-distillation loss: forward and backward, every loss, label function and option.

An absent tensor is ``None``, and its code is not compiled. The steps on a tile are in `triton_steps`, what concerns the
whole batch in `triton_batch`.
"""

import triton
import triton.language as tl

from sdfast.ops.self_distillation.description import REDUCTIONS
from sdfast.ops.self_distillation.triton_batch import (
    batch_denominator,
    divided,
    finish_batch,
    is_correct,
    row_alphas,
    store_partial,
    store_state,
    store_statistics,
)
from sdfast.ops.self_distillation.triton_steps import BRIER, CLIP, HARDMAX, MSE, SOFTMAX, index_labels, row_statistics
from sdfast.ops.self_distillation.triton_sweep import sweep

NONE = tl.constexpr(REDUCTIONS["none"])
MEAN = tl.constexpr(REDUCTIONS["mean"])


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
    target_power: tl.float64,
    row_power: tl.float64,
    rows,
    classes,
    count_blocks,
    ignore_index,
    LOSS: tl.constexpr,
    LABEL_FN: tl.constexpr,
    GEOMETRIC: tl.constexpr,
    SHARPENED: tl.constexpr,
    ROW_POWER: tl.constexpr,
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
    STAGES: tl.constexpr,
    REAL: tl.constexpr,
):
    # Computed: the self-distillation loss of R rows, its gradient with respect to the logits, batch sums, statistics.
    # Fused: denominator, alpha, label function, target, loss, gradient, and by the last program the sum over all rows.
    # Never materialised: a (rows, classes) target or probability; a row of one tile is read once, into registers.
    program = tl.program_id(0)
    row = program.to(tl.int64) * R + tl.arange(0, R)  # (R,), 64 bits before any stride multiplies it
    kept = row < rows
    bad = tl.zeros([R], tl.int1)
    label = tl.zeros([R], tl.int32)
    if not SOFT_LABELS:
        kept, bad, label = index_labels(labels + row * label_row_stride, kept, classes, ignore_index)

    # What the batch fixes: the denominator and alpha. target = uniform + at_label y + at_source h
    denominator = tl.full([1], 1.0, REAL)
    if BACKWARD:
        denominator = tl.load(state + 1 + tl.arange(0, 1))
    elif REDUCTION == MEAN:
        denominator = batch_denominator(
            labels, label_row_stride, class_weight, kept_counts, weight_sums, rows, classes, count_blocks, ignore_index,
            SOFT_LABELS, REAL,
        )  # fmt: skip
    a = row_alphas(alpha, alpha_value, correct, kept_counts, count_blocks, row, rows, ADAPTIVE, ALPHA_PER_ROW, R, REAL)
    smoothing = tl.full([R], label_smoothing, REAL)
    at_label = a * (1.0 - smoothing)
    uniform = tl.where(bad, float("nan"), a * smoothing / classes)
    at_source = 1.0 - a
    row_factor = tl.full([R], 1.0, REAL)
    if row_weight is not None:
        row_factor = tl.load(row_weight + row, mask=kept, other=0.0)
    factor = row_factor
    if BACKWARD:
        factor = tl.load(upstream + row * upstream_stride, mask=kept, other=0.0) * row_factor
    factor = divided(factor, denominator)

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
            R, B, ONE_TILE, STAGES, REAL,
        )  # fmt: skip
    source_high = high
    source_hard = hard
    source_nan = nan
    if not OWN_SOURCE:
        source_pointers = source + row * source_row_stride
        source_stride = source_column_stride
        if LABEL_FN == HARDMAX or LABEL_FN == SOFTMAX:  # noqa: SIM109 (Triton has no tuple test)
            source_high, source_hard, source_nan, _, rated = row_statistics(
                source_pointers, source_stride, kept & (at_source != 0), classes, parameter, LABEL_FN == HARDMAX, False,
                LABEL_FN == SOFTMAX, R, B, ONE_TILE, STAGES, REAL,
            )  # fmt: skip
    if LABEL_FN == HARDMAX:
        uniform = tl.where(source_nan & (at_source != 0), float("nan"), uniform)

    own = tl.full([R], 1.0, REAL)
    if ROW_POWER:
        at = tl.load(row_pointers + label.to(tl.int64) * column_stride, mask=kept, other=0.0).to(REAL)
        own = tl.exp(tl.full([R], row_power, REAL) * (at - high - tl.log(total)))
        row_factor *= own

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
        (a, smoothing, tl.full([R, 1], target_power, REAL)), parameter, at_label + uniform * classes + at_source,
        own, factor, out_pointers, row < rows,
        LOSS, LABEL_FN, GEOMETRIC, SHARPENED, SOFT_LABELS, OWN_SOURCE, WEIGHTED, SHARE_EXP,
        LOSS == MSE or (LOSS != BRIER and not SOFT_LABELS and not WEIGHTED), gradient is not None, STATS, R, B,
        ONE_TILE, STAGES, REAL,
    )  # fmt: skip
    if not BACKWARD:
        if LOSS == MSE:
            row_loss = row_loss / classes
        elif LOSS != BRIER:
            row_loss = tl.where(total == total, row_loss, float("nan"))  # though no class have any mass
        if ROW_POWER:
            row_loss = tl.where((own == 0) & (row_loss == float("inf")), 0.0, row_loss)  # the limit, not 0 * inf
        row_loss = tl.where(kept, row_loss * row_factor, 0.0)
        if REDUCTION == NONE:
            tl.store(loss + row, row_loss, mask=row < rows)
        else:
            store_partial(partials, 0, row_loss, kept, REAL)
        if STATS:
            if SIGNS:
                agrees = (target_high > 0) == (tl.load(label_pointers, mask=kept, other=0.0) > 0)
            else:
                if SOFT_LABELS:
                    _, label, _, _, _ = row_statistics(
                        label_pointers, label_column_stride, kept, classes, 1.0, True, False, False, R, B, ONE_TILE,
                        STAGES, REAL,
                    )  # fmt: skip
                agrees = best == label
            correct_rows = is_correct(high, hard, nan, label, label_pointers, kept, SIGNS)
            agrees = agrees & ~target_nan & ~bad
            store_statistics(partials, kept, a, correct_rows & ~bad, entropy, agrees, REAL)
        elif state is not None:  # the backward reads only these two
            store_state(state, a, denominator)
        if partials is not None:
            finish_batch(loss, state, partials, arrivals, denominator, a, REDUCTION != NONE, STATS, ALPHA_PER_ROW, REAL)


@triton.jit
def scale_kernel(
    gradient,  # (entries,) in and out, contiguous
    upstream,  # ()
    entries,
    TILE: tl.constexpr,
):
    # Computed: gradient *= upstream, in the accumulation dtype.
    # Fused: the test for 1, on the device: a plain loss.backward() costs an empty launch.
    # Never materialised: a second gradient.
    factor = tl.load(upstream)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        value = tl.load(gradient + at, mask=at < entries, other=0.0).to(factor.dtype) * factor
        tl.store(gradient + at, value.to(gradient.dtype.element_ty), mask=at < entries)
