"""The target of a tile of (R, B) entries: the mean of label and source, arithmetic or geometric, and its sharpening."""

import triton
import triton.language as tl

from sdfast.ops.self_distillation.triton_steps import CLIP, HARDMAX, MSE, NO_LABEL_FUNCTION, SOFTMAX, load_tile


@triton.jit
def logarithm(
    probability,  # (R, B)
):
    return tl.where(probability == 0, float("-inf"), tl.log(tl.where(probability == 0, 1.0, probability)))


@triton.jit
def mean_tile(
    columns,  # (B,)
    classes,
    pointers,  # of the tile's rows: logits, labels, source (R,), class weights
    strides,  # between columns: logits, labels, source
    row,  # what a row fixes, (R,) each
    shape,  # alpha, smoothing (R,), and what else reshapes a target
    parameter,  # 1 / temperature, or the clip's slope
    LOSS: tl.constexpr,
    LABEL_FN: tl.constexpr,
    GEOMETRIC: tl.constexpr,
    SHARPENED: tl.constexpr,
    SOFT_LABELS: tl.constexpr,
    OWN_SOURCE: tl.constexpr,
    SHARE_EXP: tl.constexpr,
    REAL: tl.constexpr,
):
    """(x, p, arithmetic mean, logarithm of the target to be reshaped but for a constant) and which are inside."""
    logits, labels, source, _ = pointers
    stride, label_stride, source_stride = strides
    kept, label, uniform, at_label, at_source, high, total, hard, source_high, source_total = row
    inside = kept[:, None] & (columns < classes)[None, :]
    x = load_tile(logits, columns, stride, inside, float("-inf"), REAL)
    p = x
    if LOSS != MSE:
        p = tl.exp(x - high[:, None]) / total[:, None]

    if SOFT_LABELS:
        given = load_tile(labels, columns, label_stride, inside, 0.0, REAL)
        mean = uniform[:, None] + at_label[:, None] * given
    else:
        given = tl.where(columns[None, :] == label[:, None], 1.0, 0.0).to(REAL)
        mean = uniform[:, None] + tl.where(columns[None, :] == label[:, None], at_label[:, None], 0.0)
    raw = x
    if LABEL_FN == HARDMAX:
        mean += tl.where(columns[None, :] == hard[:, None], at_source[:, None], 0.0)
    elif LABEL_FN != NO_LABEL_FUNCTION:
        if not OWN_SOURCE:
            raw = load_tile(source, columns, source_stride, inside, float("-inf"), REAL)
        believed = raw
        if LABEL_FN == SOFTMAX:
            if SHARE_EXP:
                believed = p
            else:
                believed = tl.exp((believed - source_high[:, None]) * parameter) / source_total[:, None]
        elif LABEL_FN == CLIP:
            believed = believed * parameter  # not minimum and maximum: a NaN stays
            believed = tl.where(believed < -1.0, -1.0, tl.where(believed > 1.0, 1.0, believed))
        mean += tl.where(at_source[:, None] == 0, 0.0, at_source[:, None] * believed)  # alpha = 1 hides any source
    logarithms = mean
    if GEOMETRIC or SHARPENED:
        logarithms = logarithm(mean)
        if GEOMETRIC:
            alpha = shape[0][:, None]
            smoothing = shape[1][:, None]
            log_given = logarithm(smoothing / classes + (1.0 - smoothing) * given)
            both = (raw - source_high[:, None]) * parameter * at_source[:, None]
            both += tl.where(alpha == 0, 0.0, alpha * log_given)  # without weight a zero forbids nothing
            both = tl.where(uniform[:, None] == uniform[:, None], both, float("nan"))
            logarithms = tl.where(at_source[:, None] == 0, logarithms, both)
        logarithms = tl.where(inside, logarithms, float("-inf"))
    return x, p, mean, logarithms, inside


@triton.jit
def target_statistics(
    classes,
    pointers,  # as mean_tile takes them
    strides,
    row,
    shape,
    parameter,
    LOSS: tl.constexpr,
    LABEL_FN: tl.constexpr,
    GEOMETRIC: tl.constexpr,
    SHARPENED: tl.constexpr,
    SOFT_LABELS: tl.constexpr,
    OWN_SOURCE: tl.constexpr,
    SHARE_EXP: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    STAGES: tl.constexpr,
    REAL: tl.constexpr,
):
    """(max, sum exp(power (v - max))) of each row's logarithms v, in one sweep, per lane as in `row_statistics`."""
    peaks = tl.full([R, B], float("-inf"), REAL)
    totals = tl.zeros([R, B], REAL)
    for start in tl.range(0, classes, B, num_stages=STAGES):
        columns = start + tl.arange(0, B)
        _, _, _, v, _ = mean_tile(
            columns, classes, pointers, strides, row, shape, parameter, LOSS, LABEL_FN, GEOMETRIC, SHARPENED,
            SOFT_LABELS, OWN_SOURCE, SHARE_EXP, REAL,
        )  # fmt: skip
        term = tl.exp(-tl.where(v == peaks, 0.0, tl.abs(v - peaks)) * shape[2])
        totals = tl.where(v > peaks, totals * term + 1.0, totals + term)
        peaks = tl.where(v > peaks, v, peaks)
    peak = tl.max(peaks, 1)
    return peak, tl.sum(totals * tl.exp((peaks - peak[:, None]) * shape[2]), 1)


@triton.jit
def target_tile(
    columns,  # (B,)
    classes,
    pointers,  # as mean_tile takes them
    strides,
    row,
    shape,  # alpha, smoothing (R,), power (R, 1), and of the logarithms their largest and their sum (R,)
    parameter,
    LOSS: tl.constexpr,
    LABEL_FN: tl.constexpr,
    GEOMETRIC: tl.constexpr,
    SHARPENED: tl.constexpr,
    SOFT_LABELS: tl.constexpr,
    OWN_SOURCE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHARE_EXP: tl.constexpr,
    REAL: tl.constexpr,
):
    """(x, p, target, weighted target), (R, B) each, and which entries are inside; the targets are 0 outside."""
    x, p, target, logarithms, inside = mean_tile(
        columns, classes, pointers, strides, row, shape, parameter, LOSS, LABEL_FN, GEOMETRIC, SHARPENED, SOFT_LABELS,
        OWN_SOURCE, SHARE_EXP, REAL,
    )  # fmt: skip
    if GEOMETRIC or SHARPENED:
        reshaped = tl.exp((logarithms - shape[3][:, None]) * shape[2]) / shape[4][:, None]
        if SHARPENED:
            target = reshaped
        else:
            target = tl.where(row[4][:, None] == 0, target, reshaped)  # alpha = 1: the label itself
    target = tl.where(inside, target, 0.0)
    weighted = target
    if WEIGHTED:
        weighted *= tl.load(pointers[3] + columns, mask=columns < classes, other=0.0)[None, :]
    return x, p, target, weighted, inside
