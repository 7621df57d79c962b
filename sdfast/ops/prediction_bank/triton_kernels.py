"""The Triton kernels of a prediction bank: who writes which row, and the loss with its gradient and the write.

Rows are swept tile by tile, the bank's row beside the logits' one; what a sweep needs again comes from the cache. The
steps that the bank shares with the self-distillation loss are that operation's own.
"""

import triton
import triton.language as tl

from sdfast.ops.prediction_bank.triton_tiles import (
    believed_tile,
    cut,
    cut_sums,
    fresh_tile,
    mixed_tile,
    reshaped,
    store_largest,
    store_row,
)
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
from sdfast.ops.self_distillation.triton_steps import (
    BRIER,
    KL,
    MSE,
    first_peak,
    index_labels,
    row_statistics,
    store_gradient,
)
from sdfast.ops.self_distillation.triton_sweep import entropy_terms, gradient_tile, row_terms

NONE = tl.constexpr(REDUCTIONS["none"])
MEAN = tl.constexpr(REDUCTIONS["mean"])


@triton.jit
def claim_kernel(
    labels,  # (N,) int64, or (N, C)
    indices,  # (N,) int64
    claims,  # (samples, 2) int32: the last row that has an index, and how many rows have it
    label_stride,
    rows,
    samples,
    ignore_index,
    SOFT_LABELS: tl.constexpr,
    TILE: tl.constexpr,
):
    # Computed: for each index of the batch its last row and how many rows have it.
    # Fused: leaving out ignored rows and indices out of range.
    # Never materialised: a sorted batch.
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    kept = row < rows
    if not SOFT_LABELS:
        kept = kept & (tl.load(labels + row * label_stride, mask=kept, other=0) != ignore_index)
    index = tl.load(indices + row, mask=kept, other=0)
    kept = kept & (index >= 0) & (index < samples)
    index = tl.where(kept, index, 0)
    tl.atomic_max(claims + 2 * index, (row + 1).to(tl.int32), mask=kept)
    tl.atomic_add(claims + 2 * index + 1, tl.full([TILE], 1, tl.int32), mask=kept)


@triton.jit(do_not_specialize=["rows", "count_blocks", "ignore_index", "warm_up", "samples"])
def bank_kernel(
    logits,  # (N, C)
    labels,  # (N,) int64, or (N, C) probabilities
    alpha,  # () or (N,), or None
    indices,  # (N,) int64
    predictions,  # (samples, C) in and out, or (samples, K + 1)
    listed,  # (samples, K) int32 in and out: the classes of the first K; or None
    seen,  # (samples,) int32 in and out
    claims,  # (samples, 2) int32 of claim_kernel, left zero; or None where nothing is claimed
    class_weight,  # (C,) or None
    row_weight,  # (N,) or None
    correct,  # (count_blocks,) int32 from count_kernel, or None
    kept_counts,  # (count_blocks,) int32 from count_kernel, or None
    weight_sums,  # (count_blocks,) from count_kernel, or None
    state,  # (5,) out
    gradient,  # (N, C) out, or None
    loss,  # () or (N,) out
    partials,  # (6, programs) scratch, or None where nothing is summed over rows
    arrivals,  # (1,) int32, zero before and after, or None
    row_stride,
    column_stride,
    label_row_stride,
    label_column_stride,
    alpha_value: tl.float64,
    temperature: tl.float64,
    label_smoothing: tl.float64,
    target_power: tl.float64,
    row_power: tl.float64,
    own_share: tl.float64,
    log_momentum: tl.float64,
    strength: tl.float64,
    clamp: tl.float64,
    rows,
    classes,
    samples,
    count_blocks,
    ignore_index,
    warm_up,
    LOSS: tl.constexpr,
    LABEL_FN: tl.constexpr,
    GEOMETRIC: tl.constexpr,
    SHARPENED: tl.constexpr,
    ROW_POWER: tl.constexpr,
    REDUCTION: tl.constexpr,
    SOFT_LABELS: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ALPHA_PER_ROW: tl.constexpr,
    CORRECTED: tl.constexpr,
    WRITE_FIRST: tl.constexpr,
    UNIQUE: tl.constexpr,
    UPDATE: tl.constexpr,
    RATED: tl.constexpr,
    REGULARISE: tl.constexpr,
    CLAMP: tl.constexpr,
    LATE: tl.constexpr,
    STATS: tl.constexpr,
    SIGNS: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    ONE_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    REAL: tl.constexpr,
):
    # Computed: a loss on R rows of a prediction bank, its gradient with respect to the logits, and the rows' update.
    # Fused: gathering the rows, target or regulariser, loss, gradient, batch sums, and an index's last row's write.
    # Never materialised: a (rows, classes) target, probability or gathered row.
    program = tl.program_id(0)
    row = program.to(tl.int64) * R + tl.arange(0, R)  # (R,), 64 bits before any stride multiplies it
    kept = row < rows
    bad = tl.zeros([R], tl.int1)
    label = tl.zeros([R], tl.int32)
    if not SOFT_LABELS:
        kept, bad, label = index_labels(labels + row * label_row_stride, kept, classes, ignore_index)
    index = tl.load(indices + row, mask=kept, other=0)
    found = kept & (index >= 0) & (index < samples)
    index = tl.where(found, index, 0)
    wrong = kept & ~found
    if UNIQUE:
        wrong = wrong | (found & (tl.load(claims + 2 * index, mask=found, other=0) != row + 1))

    # The logits' softmax, and what it weighs in the bank.
    row_pointers = logits + row * row_stride
    label_pointers = labels + row * label_row_stride
    bank = (predictions + index * classes, None, 1)
    if K:
        bank = (predictions + index * (K + 1), listed + index * K, tl.maximum(classes - K, 1))
    high, top_index, nan, total, _ = row_statistics(
        row_pointers, column_stride, kept, classes, 1.0, STATS, True, False, R, B, ONE_TILE, STAGES, REAL,
    )  # fmt: skip
    finite = (total == total) & (high > float("-inf")) & (high < float("inf"))
    count = tl.load(seen + index, mask=found, other=0)
    weight = tl.full([R], own_share, REAL)
    if CORRECTED:
        corrected = own_share / (1.0 - tl.exp(log_momentum * (count + 1).to(tl.float64)))
        weight = tl.where(count == 0, 1.0, corrected).to(REAL)
    normalizer = tl.full([R], 1.0, REAL)
    lowest = tl.full([1, 1], clamp, REAL)
    if CLAMP:
        normalizer = 1.0 / cut_sums(row_pointers, column_stride, kept, classes, high, total, lowest, R, B, REAL)
    if WRITE_FIRST:
        usable = found & (count >= warm_up) & (finite | (count > 0))
    else:
        usable = found & (count >= tl.maximum(warm_up, 1))

    # What the batch fixes. target = uniform + at_label y + at_source h
    denominator = tl.full([1], 1.0, REAL)
    if REDUCTION == MEAN:
        denominator = batch_denominator(
            labels, label_row_stride, class_weight, kept_counts, weight_sums, rows, classes, count_blocks, ignore_index,
            SOFT_LABELS, REAL,
        )  # fmt: skip
    a = row_alphas(alpha, alpha_value, correct, kept_counts, count_blocks, row, rows, ADAPTIVE, ALPHA_PER_ROW, R, REAL)
    a = tl.where(wrong, float("nan"), tl.where(usable, a, 1.0))
    smoothing = tl.full([R], label_smoothing, REAL)
    at_label = a * (1.0 - smoothing)
    uniform = tl.where(bad | wrong, float("nan"), a * smoothing / classes)
    at_source = 1.0 - a
    row_factor = tl.full([R], 1.0, REAL)
    if row_weight is not None:
        row_factor = tl.load(row_weight + row, mask=kept, other=0.0)
    factor = tl.full([R], 1.0, REAL)
    if not LATE:
        factor = divided(row_factor, denominator)
    own = tl.full([R], 1.0, REAL)
    if ROW_POWER:
        at = tl.load(row_pointers + label.to(tl.int64) * column_stride, mask=kept, other=0.0).to(REAL)
        own = tl.exp(tl.full([R], row_power, REAL) * (at - high - tl.log(total)))
        row_factor *= own

    # What the bank's row fixes: its peak and sum, and how far the logits agree with it.
    rate = 1.0 / tl.full([R, 1], temperature, REAL)
    pointers = (row_pointers, bank)
    fixed = (kept, high, total, finite, weight, normalizer)
    lanes = tl.arange(0, B)
    none = lanes[None, :] + tl.zeros([R, B], tl.int32)
    peaks = tl.full([R, B], -1.0, REAL)
    firsts = none
    sums = tl.zeros([R, B], REAL)
    inners = tl.zeros([R, B], REAL)
    pulls = tl.zeros([R, B], REAL)
    for start in range(0, classes, B):
        columns = start + lanes
        x, p, t, inside = believed_tile(
            columns, classes, pointers, column_stride, fixed, lowest, WRITE_FIRST, CLAMP, K, REAL
        )
        above = inside & (t > peaks)
        firsts = tl.where(above, columns[None, :], firsts)
        peaks = tl.where(above, t, peaks)
        sums += t
        if REGULARISE:
            held = tl.where((p >= lowest) & (p <= 1.0 - lowest), t, 0.0)
            inners += tl.where(inside, t * cut(p, lowest, CLAMP), 0.0)
            pulls += tl.where(inside, held * p, 0.0)
    source_high, source_hard, _ = first_peak(peaks, firsts, peaks != peaks, classes)
    source_total = tl.sum(sums, 1)
    log_high = tl.log(source_high)
    if RATED:
        sums = tl.zeros([R, B], REAL)
        for start in range(0, classes, B):
            _, _, t, inside = believed_tile(
                start + lanes, classes, pointers, column_stride, fixed, lowest, WRITE_FIRST, CLAMP, K, REAL
            )
            sums += tl.where(inside, tl.exp((tl.log(t) - log_high[:, None]) * rate), 0.0)
        source_total = tl.sum(sums, 1)
    slope = tl.zeros([R], REAL)
    pull = tl.zeros([R], REAL)
    distance = tl.full([R], 1.0, REAL)
    if REGULARISE:
        pull = tl.sum(pulls, 1)
        distance = tl.where(usable, 1.0 - tl.sum(inners, 1), 1.0)
        slope = tl.where(usable, tl.full([R], strength, REAL) / distance, 0.0)

    # The loss.
    mixture = (label, uniform, at_label, at_source, source_hard, log_high, source_total)
    shape = (a, smoothing, classes)
    power = tl.full([R, 1], target_power, REAL)
    target_high = high
    target_total = total
    if GEOMETRIC or SHARPENED:
        tops = tl.full([R, B], float("-inf"), REAL)
        sums = tl.zeros([R, B], REAL)
        for start in range(0, classes, B):
            columns = start + lanes
            _, _, t, inside = believed_tile(
                columns, classes, pointers, column_stride, fixed, lowest, WRITE_FIRST, CLAMP, K, REAL
            )
            _, v = mixed_tile(
                t, columns, inside, label_pointers, label_column_stride, mixture, shape, rate, LABEL_FN, GEOMETRIC,
                SHARPENED, SOFT_LABELS, RATED, REAL,
            )  # fmt: skip
            term = tl.exp(-tl.where(v == tops, 0.0, tl.abs(v - tops)) * power)
            sums = tl.where(v > tops, sums * term + 1.0, sums + term)
            tops = tl.where(v > tops, v, tops)
        target_high = tl.max(tops, 1)
        target_total = tl.sum(sums * tl.exp((tops - target_high[:, None]) * power), 1)
    log_total = tl.log(total)
    losses = tl.zeros([R, B], REAL)
    parts = tl.zeros([R, B], REAL)
    entropies = tl.zeros([R, B], REAL)
    target_peaks = tl.full([R, B], float("-inf"), REAL)
    target_firsts = none
    target_nans = tl.zeros([R, B], tl.int1)
    # Backwards, as the plain loss's sweep goes: a row with alpha = 1 adds up in the same order, to the same bits.
    last = (classes - 1) // B * B
    for step in range(0, classes, B):
        columns = last - step + lanes
        x, p, t, inside = believed_tile(
            columns, classes, pointers, column_stride, fixed, lowest, WRITE_FIRST, CLAMP, K, REAL
        )
        target, v = mixed_tile(
            t, columns, inside, label_pointers, label_column_stride, mixture, shape, rate, LABEL_FN, GEOMETRIC,
            SHARPENED, SOFT_LABELS, RATED, REAL,
        )  # fmt: skip
        target = reshaped(target, v, inside, at_source, power, target_high, target_total, GEOMETRIC, SHARPENED)
        weighted = target
        if class_weight is not None:
            weighted *= tl.load(class_weight + columns, mask=columns < classes, other=0.0)[None, :]
        terms, part = row_terms(x, p, target, weighted, inside, high, log_total, LOSS)
        losses += terms
        parts += part
        if STATS:
            entropies += entropy_terms(target)
            higher = inside & (target >= target_peaks)  # an equal entry that comes later stands before
            target_firsts = tl.where(higher, columns[None, :], target_firsts)
            target_peaks = tl.where(higher, target, target_peaks)
            target_nans = target_nans | (target != target)
    row_loss = tl.sum(losses, 1)
    part_sum = tl.sum(parts, 1)
    if LOSS != BRIER and not SOFT_LABELS and class_weight is None:
        part_sum = at_label + uniform * classes + at_source  # known, as in the plain loss

    if gradient is not None:
        for start in range(0, classes, B):
            columns = start + lanes
            x, p, t, inside = believed_tile(
                columns, classes, pointers, column_stride, fixed, lowest, WRITE_FIRST, CLAMP, K, REAL
            )
            target, v = mixed_tile(
                t, columns, inside, label_pointers, label_column_stride, mixture, shape, rate, LABEL_FN, GEOMETRIC,
                SHARPENED, SOFT_LABELS, RATED, REAL,
            )  # fmt: skip
            target = reshaped(target, v, inside, at_source, power, target_high, target_total, GEOMETRIC, SHARPENED)
            weighted = target
            if class_weight is not None:
                weighted *= tl.load(class_weight + columns, mask=columns < classes, other=0.0)[None, :]
            values = gradient_tile(x, p, target, weighted, part_sum, own, factor, kept, classes, LOSS)
            if REGULARISE:
                held = tl.where((p >= lowest) & (p <= 1.0 - lowest), t, 0.0)
                held = p * (pull[:, None] - held) * (slope * factor)[:, None]
                values += tl.where(usable[:, None], held, 0.0)
            store_gradient(gradient + row * classes, columns, row < rows, classes, values)

    if LOSS == MSE:
        row_loss = row_loss / classes
    elif LOSS <= KL:
        row_loss = tl.where(total == total, row_loss, float("nan"))  # though no class have any mass
    if REGULARISE:
        row_loss += tl.full([R], strength, REAL) * tl.log(distance)
    if ROW_POWER:
        row_loss = tl.where((own == 0) & (row_loss == float("inf")), 0.0, row_loss)  # the limit, not 0 * inf
    row_loss = tl.where(kept, row_loss * row_factor, 0.0)
    if REDUCTION == NONE:
        tl.store(loss + row, row_loss, mask=row < rows)
    else:
        store_partial(partials, 0, row_loss, kept, REAL)
    if STATS:
        best_mass, best, target_nan = first_peak(target_peaks, target_firsts, target_nans, classes)
        if SIGNS:
            agrees = (best_mass > 0) == (tl.load(label_pointers, mask=kept, other=0.0) > 0)
        else:
            if SOFT_LABELS:
                _, label, _, _, _ = row_statistics(
                    label_pointers, label_column_stride, kept, classes, 1.0, True, False, False, R, B, ONE_TILE,
                    STAGES, REAL,
                )  # fmt: skip
            agrees = best == label
        correct_rows = is_correct(high, top_index, nan, label, label_pointers, kept, SIGNS)
        agrees = agrees & ~target_nan & ~bad
        store_statistics(partials, kept, a, correct_rows & ~bad, tl.sum(entropies, 1), agrees, REAL)
    else:
        store_state(state, a, denominator)
    if partials is not None:
        finish_batch(loss, state, partials, arrivals, denominator, a, REDUCTION != NONE, STATS, True, REAL)

    # The last row of an index to come here writes the prediction of the last row that has it: all others have read.
    if claims is not None:
        tl.debug_barrier()
        ones = tl.full([R], -1, tl.int32)
        closes = found & (tl.atomic_add(claims + 2 * index + 1, ones, mask=found, sem="acq_rel") == 1)
        tl.debug_barrier()
        writer = tl.load(claims + 2 * index, mask=closes, other=1, cache_modifier=".cg").to(tl.int64) - 1
        tl.store(claims + 2 * index, tl.zeros([R], tl.int32), mask=closes)
        if UPDATE:
            other = closes & (writer != row)
            writer_pointers = tl.where(closes, writer, row) * row_stride + logits
            if tl.max(other.to(tl.int32), 0) != 0:
                high, _, _, total, _ = row_statistics(
                    writer_pointers, column_stride, closes, classes, 1.0, False, True, False, R, B, ONE_TILE, STAGES,
                    REAL,
                )  # fmt: skip
                finite = (total == total) & (high > float("-inf")) & (high < float("inf"))
                if CLAMP:
                    normalizer = 1.0 / cut_sums(
                        writer_pointers, column_stride, closes, classes, high, total, lowest, R, B, REAL
                    )
            writes = closes & finite
            fresh = (high, total, weight, normalizer)
            if K:
                store_largest(
                    writes, classes, writer_pointers, column_stride, bank, fresh, lowest, CLAMP, K, LANES, R, B, REAL
                )
            else:
                for start in range(0, classes, B):
                    columns = start + lanes
                    inside = writes[:, None] & (columns < classes)[None, :]
                    values = fresh_tile(
                        columns, inside, writer_pointers, column_stride, bank, fresh, lowest, CLAMP, K, REAL
                    )
                    store_row(bank[0][:, None] + columns[None, :], values, inside)
            tl.store(seen + index, count + 1, mask=writes)
