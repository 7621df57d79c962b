"""The Triton kernel of the distillation loss: forward and backward, every divergence, teacher and option.

An absent tensor is ``None``, and its code is not compiled. The steps on a tile are in `triton_steps`.
"""

import triton
import triton.language as tl

from sdfast.ops.distillation.description import REDUCTIONS
from sdfast.ops.distillation.triton_steps import BUCKET, KL, LOGITS, hard_tile, soft_gradient, soft_tile, unlisted_mass
from sdfast.ops.self_distillation.triton_batch import (
    batch_denominator,
    divided,
    finish_batch,
    row_alphas,
    store_partial,
)
from sdfast.ops.self_distillation.triton_steps import index_labels, load_tile, row_statistics, store_gradient

NONE = tl.constexpr(REDUCTIONS["none"])
MEAN = tl.constexpr(REDUCTIONS["mean"])


@triton.jit(do_not_specialize=["rows", "listed", "count_blocks", "ignore_index"])
def rows_kernel(
    logits,  # (N, C)
    teacher,  # (N, C) logits or log-probabilities, or (N, k) log-probabilities
    indices,  # (N, k) int64, or None
    tail,  # (N,), or None
    labels,  # (N,) int64, or (N, C) probabilities, or None
    alpha,  # () or (N,), or None
    row_weight,  # (N,) or None
    kept_counts,  # (count_blocks,) int32, or None
    upstream,  # () or (N,), in the backward
    state,  # (1,): read in the backward, else written; or None
    gradient,  # (N, C) out, or None
    loss,  # () or (N,) out; None in the backward
    partials,  # (1, programs) scratch, or None where nothing is summed over rows
    arrivals,  # (1,) int32, zero before and after, or None
    row_stride,
    column_stride,
    teacher_row_stride,
    teacher_column_stride,
    label_row_stride,
    label_column_stride,
    upstream_stride,
    alpha_value: tl.float64,
    student_rate: tl.float64,
    teacher_rate: tl.float64,
    temperature: tl.float64,
    label_smoothing: tl.float64,
    rows,
    classes,
    listed,
    count_blocks,
    ignore_index,
    DIVERGENCE: tl.constexpr,
    FORM: tl.constexpr,
    REDUCTION: tl.constexpr,
    SOFT_LABELS: tl.constexpr,
    ALPHA_PER_ROW: tl.constexpr,
    HARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    ONE_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    REAL: tl.constexpr,
):
    # Computed: the distillation loss of R rows, its gradient with respect to the student's logits, the batch's sum.
    # Fused: denominator, both softmaxes, divergence, the label's cross entropy, gradient, the sum over rows.
    # Never materialised: a (rows, classes) probability, teacher or difference; one-tile rows come from memory once.
    program = tl.program_id(0)
    row = program.to(tl.int64) * R + tl.arange(0, R)  # (R,), 64 bits before any stride multiplies it
    exists = row < rows
    kept = exists
    bad = tl.zeros([R], tl.int1)
    label = tl.zeros([R], tl.int32)
    label_pointers = logits + row
    if labels is not None:
        label_pointers = labels + row * label_row_stride
        if not SOFT_LABELS:
            kept, bad, label = index_labels(label_pointers, exists, classes, ignore_index)

    denominator = tl.full([1], 1.0, REAL)
    if BACKWARD:
        denominator = tl.load(state + tl.arange(0, 1))
    elif REDUCTION == MEAN:
        denominator = batch_denominator(
            labels, label_row_stride, None, kept_counts, None, rows, classes, count_blocks, ignore_index,
            SOFT_LABELS or labels is None, REAL,
        )  # fmt: skip
    a = row_alphas(alpha, alpha_value, None, None, 0, row, rows, False, ALPHA_PER_ROW, R, REAL)
    smoothing = tl.full([R], label_smoothing, REAL)
    at_label = a * (1.0 - smoothing)
    uniform = tl.where(bad, float("nan"), a * smoothing / classes)
    row_factor = tl.full([R], 1.0, REAL)
    if row_weight is not None:
        row_factor = tl.load(row_weight + row, mask=kept, other=0.0)
    factor = row_factor
    if BACKWARD:
        factor = tl.load(upstream + row * upstream_stride, mask=kept, other=0.0) * row_factor
    factor = divided(factor, denominator)
    taught = kept & (a != 1)
    warmth = tl.full([R], temperature, REAL)
    rate = tl.full([R, 1], student_rate, REAL)
    warmed = tl.full([R, 1], teacher_rate, REAL)

    # What a row's own numbers fix: peaks and sums of both sides, and where a teacher's unlisted classes start from.
    row_pointers = logits + row * row_stride
    high, _, _, total, rated = row_statistics(
        row_pointers, column_stride, kept, classes, rate, False, True, True, R, B, ONE_TILE, STAGES, REAL
    )
    teacher_pointers = teacher + row * teacher_row_stride
    index_pointers = row
    start = high
    teacher_total = total
    if FORM == LOGITS:
        start, _, _, _, teacher_total = row_statistics(
            teacher_pointers, teacher_column_stride, taught, classes, warmed, False, False, True, R, B, ONE_TILE,
            STAGES, REAL,
        )  # fmt: skip
    elif FORM >= BUCKET:
        index_pointers = indices + row * listed
        mass = tl.load(tail + row, mask=taught, other=0.0)
        bad_list = taught & ~((mass >= 0) & (mass <= 1))
        start = tl.log(mass)
        if FORM == BUCKET:
            unlisted_high, unlisted = unlisted_mass(
                row_pointers, column_stride, (index_pointers, teacher_pointers, teacher_column_stride, listed), taught,
                classes, rate, R, B, REAL,
            )  # fmt: skip
            share = (unlisted_high - high) * tl.full([R], student_rate, REAL) + tl.log(unlisted) - tl.log(rated)
            start = tl.where(mass == 0, float("-inf"), start - share)
        else:
            start = start - tl.log(tl.full([R], 1.0, REAL) * tl.maximum(classes - listed, 1))
    listing = (teacher_pointers, teacher_column_stride, index_pointers, listed)
    hard_row = (label, at_label, uniform, high, total)

    # Loss and gradient. What waits for a sum over the row takes a sweep of its own where the row is long.
    KNOWN_INNER: tl.constexpr = DIVERGENCE == KL and FORM == LOGITS
    KNOWN_MASS: tl.constexpr = not (HARD and SOFT_LABELS)
    lanes = tl.arange(0, B)
    out_pointers = row_pointers
    if gradient is not None:
        out_pointers = gradient + row * classes
    hard_scale = factor
    soft_scale = factor * (1.0 - a) * warmth  # T squared of the loss over T of the logits
    known = at_label + uniform * classes
    one = tl.full([R], 1.0, REAL)
    hard_losses = tl.zeros([R, B], REAL)
    masses = tl.zeros([R, B], REAL)
    soft_losses = tl.zeros([R, B], REAL)
    parts = tl.zeros([R, B], REAL)
    hits = tl.zeros([R, B], tl.int32)
    last = (classes - 1) // B * B
    for step in tl.range(0, classes, B, num_stages=STAGES):
        columns = last - step + lanes  # backwards: the statistics' sweep left the row's end in the cache
        inside = kept[:, None] & (columns < classes)[None, :]
        x = load_tile(row_pointers, columns, column_stride, inside, float("-inf"), REAL)
        p, score, term, part, hit = soft_tile(
            x, columns, inside, listing, (high, rated), (start, teacher_total), taught, rate, warmed, DIVERGENCE, FORM,
            R, B, REAL,
        )  # fmt: skip
        soft_losses += term
        parts += part
        hits += (hit & inside).to(tl.int32)
        if HARD:
            plain, target, hard_term = hard_tile(
                x, columns, inside, label_pointers, label_column_stride, hard_row, SOFT_LABELS, REAL
            )
            hard_losses += hard_term
            masses += target
        if gradient is not None and KNOWN_INNER and KNOWN_MASS and not ONE_TILE:
            values = tl.where(taught[:, None], soft_gradient(p, score, one, DIVERGENCE) * soft_scale[:, None], 0.0)
            if HARD:
                values = (plain * known[:, None] - target) * hard_scale[:, None] + values
            store_gradient(out_pointers, columns, exists, classes, tl.where(kept[:, None], values, 0.0))
    inner = one
    if not KNOWN_INNER:
        inner = tl.sum(parts, 1)
    soft_loss = tl.sum(soft_losses, 1)
    if FORM >= BUCKET:
        # A list with a class twice, or with one that does not exist, has fewer classes than entries.
        bad_list = bad_list | (taught & (tl.sum(hits, 1) != listed))
        inner = tl.where(bad_list, float("nan"), inner)
        soft_loss = tl.where(bad_list, float("nan"), soft_loss)
    if not KNOWN_MASS:
        known = tl.sum(masses, 1)
    if gradient is not None and (ONE_TILE or not (KNOWN_INNER and KNOWN_MASS)):
        for begin in tl.range(0, classes, B, num_stages=STAGES):
            columns = begin + lanes
            inside = kept[:, None] & (columns < classes)[None, :]
            x = load_tile(row_pointers, columns, column_stride, inside, float("-inf"), REAL)
            p, score, term, part, hit = soft_tile(  # (Triton wants a loop's names to keep their types)
                x, columns, inside, listing, (high, rated), (start, teacher_total), taught, rate, warmed, DIVERGENCE,
                FORM, R, B, REAL,
            )  # fmt: skip
            values = tl.where(taught[:, None], soft_gradient(p, score, inner, DIVERGENCE) * soft_scale[:, None], 0.0)
            if HARD:
                plain, target, hard_term = hard_tile(
                    x, columns, inside, label_pointers, label_column_stride, hard_row, SOFT_LABELS, REAL
                )
                values = (plain * known[:, None] - target) * hard_scale[:, None] + values
            store_gradient(out_pointers, columns, exists, classes, tl.where(kept[:, None], values, 0.0))

    if not BACKWARD:
        row_loss = tl.where(taught, (1.0 - a) * warmth * warmth * soft_loss, 0.0)
        if HARD:
            hard_loss = tl.where(total == total, tl.sum(hard_losses, 1), float("nan"))
            row_loss = tl.where(taught, tl.where(a == 0, 0.0, hard_loss) + row_loss, hard_loss)
        row_loss = tl.where(kept, row_loss * row_factor, 0.0)
        if REDUCTION == NONE:
            tl.store(loss + row, row_loss, mask=exists)
        else:
            store_partial(partials, 0, row_loss, kept, REAL)
        if state is not None:
            tl.store(state + tl.arange(0, 1), denominator, mask=tl.arange(0, 1) == program)
        if partials is not None:
            finish_batch(loss, state, partials, arrivals, denominator, a, True, False, ALPHA_PER_ROW, REAL)
