"""The steps of the distillation kernel, each on a tile of (R, B) = (rows, columns) entries.

Every divergence and every form of the teacher is one formula here. Switches are compile-time constants.
"""

import triton
import triton.language as tl

from sdfast.ops.distillation.description import DIVERGENCES, TEACHER_FORMS
from sdfast.ops.self_distillation.triton_steps import load_tile

KL = tl.constexpr(DIVERGENCES["kl"])
REVERSE_KL = tl.constexpr(DIVERGENCES["reverse_kl"])
LOGITS = tl.constexpr(TEACHER_FORMS["logits"])
BUCKET = tl.constexpr(TEACHER_FORMS["top_k_bucket"])


@triton.jit
def listed_tile(
    columns,  # (B,)
    indices,  # (R,) pointers of contiguous rows of classes
    values,  # (R,) pointers of rows of log-probabilities
    value_stride,
    listed,
    kept,  # (R,)
    R: tl.constexpr,
    B: tl.constexpr,
    REAL: tl.constexpr,
):
    """(whether a class is listed, its log-probability), (R, B), by comparison with each index in turn."""
    first = tl.min(columns, 0)
    hit = tl.zeros([R, B], tl.int1)
    log_q = tl.zeros([R, B], REAL)
    for j in range(listed):
        index = tl.load(indices + j, mask=kept, other=-1)
        here = (index >= first) & (index < first + B)
        if tl.max(here.to(tl.int32), 0) > 0:  # of long rows most indices lie in other tiles
            value = tl.load(values + j * value_stride, mask=kept, other=0.0).to(REAL)
            match = columns[None, :] == index[:, None]
            hit = hit | match
            log_q = tl.where(match, value[:, None], log_q)
    return hit, log_q


@triton.jit
def unlisted_mass(
    row_pointers,  # (R,) of logits
    column_stride,
    teacher,  # what `listed_tile` takes
    kept,  # (R,)
    classes,
    rate,
    R: tl.constexpr,
    B: tl.constexpr,
    REAL: tl.constexpr,
):
    """(max, sum exp(rate (x - max))) of the logits of the classes that are not listed."""
    indices, values, value_stride, listed = teacher
    lanes = tl.arange(0, B)
    peaks = tl.full([R, B], float("-inf"), REAL)
    totals = tl.zeros([R, B], REAL)
    for start in range(0, classes, B):
        columns = start + lanes
        inside = kept[:, None] & (columns < classes)[None, :]
        x = load_tile(row_pointers, columns, column_stride, inside, float("-inf"), REAL)
        hit, _ = listed_tile(columns, indices, values, value_stride, listed, kept, R, B, REAL)
        x = tl.where(hit, float("-inf"), x)
        above = x > peaks
        distance = tl.where(x == peaks, 0.0, tl.abs(x - peaks))  # equal infinities are no distance apart
        term = tl.exp(-distance * rate)
        totals = tl.where(above, totals * term + 1.0, totals + term)
        peaks = tl.where(above, x, peaks)
    high = tl.max(peaks, 1)
    return high, tl.sum(totals * tl.exp((peaks - high[:, None]) * rate), 1)


@triton.jit
def soft_tile(
    x,  # (R, B) logits, -inf outside
    columns,  # (B,)
    inside,  # (R, B)
    teacher,  # (R,) pointers, column stride; with top-k also index pointers, how many are listed
    student_row,  # (R,) max of the logits, sum of their tempered exponentials
    teacher_row,  # (R,) the same of the teacher; with top-k the log-probability that others start from
    kept,  # (R,) rows that look at their teacher
    rate,
    teacher_rate,
    DIVERGENCE: tl.constexpr,
    FORM: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    REAL: tl.constexpr,
):
    """(p, score, part of D, part of the sum that the gradient needs, listed classes), (R, B) each."""
    high, total = student_row
    teacher_high, teacher_total = teacher_row
    scaled = (x - high[:, None]) * rate
    p = tl.exp(scaled) / total[:, None]
    log_p = scaled - tl.log(total)[:, None]
    hit = inside
    if FORM >= BUCKET:
        pointers, stride, indices, listed = teacher
        hit, log_q = listed_tile(columns, indices, pointers, stride, listed, kept, R, B, REAL)
        others = tl.zeros([R, B], REAL) + teacher_high[:, None]
        if FORM == BUCKET:
            others = tl.where(others == float("-inf"), others, log_p + others)
        log_q = tl.where(inside, tl.where(hit, log_q, others), float("-inf"))
        q = tl.exp(log_q)
    else:
        pointers, stride, _, _ = teacher
        log_q = load_tile(pointers, columns, stride, inside & kept[:, None], float("-inf"), REAL)
        if FORM == LOGITS:
            warmed = (log_q - teacher_high[:, None]) * teacher_rate
            q = tl.exp(warmed) / teacher_total[:, None]
            log_q = warmed - tl.log(teacher_total)[:, None]
        else:
            q = tl.exp(log_q)
    if DIVERGENCE == KL:
        score = tl.where(inside, q, 0.0)
        part = score
        term = tl.where(score == 0, 0.0, q * (log_q - log_p))
    elif DIVERGENCE == REVERSE_KL:
        p = tl.where(inside, p, 0.0)
        score = tl.where(p == 0, 0.0, log_p - log_q)
        part = p * score
        term = part
    else:
        p = tl.where(inside, p, 0.0)
        q = tl.where(inside, q, 0.0)
        m = (p + q) * 0.5
        score = tl.where(p == 0, 0.0, tl.log(tl.where(p == 0, 1.0, p / m)) * 0.5)
        part = p * score
        term = part + tl.where(q == 0, 0.0, q * tl.log(tl.where(q == 0, 1.0, q / m)) * 0.5)
    return p, score, term, part, hit


@triton.jit
def soft_gradient(
    p,  # (R, B)
    score,  # (R, B)
    inner,  # (R,)
    DIVERGENCE: tl.constexpr,
):
    """DD / d(logits over temperature)."""
    if DIVERGENCE == KL:
        return p * inner[:, None] - score
    return p * (score - inner[:, None])


@triton.jit
def hard_tile(
    x,  # (R, B)
    columns,  # (B,)
    inside,  # (R, B)
    labels,  # (R,) pointers of probability rows
    label_stride,
    row,  # (R,) each: label, its weight, the uniform floor, max, sum of exponentials
    SOFT_LABELS: tl.constexpr,
    REAL: tl.constexpr,
):
    """(p, target, part of the loss): the self-distillation kernel's arithmetic at alpha 1, in its order."""
    label, at_label, uniform, high, total = row
    p = tl.exp(x - high[:, None]) / total[:, None]
    if SOFT_LABELS:
        target = uniform[:, None] + at_label[:, None] * load_tile(labels, columns, label_stride, inside, 0.0, REAL)
    else:
        target = uniform[:, None] + tl.where(columns[None, :] == label[:, None], at_label[:, None], 0.0)
    target = tl.where(inside, target, 0.0)
    term = tl.log(total)[:, None] - (x - high[:, None])
    return p, target, tl.where(target == 0, 0.0, target * term)
