"""The sweep over a row's tiles that adds up its loss and its statistics, and writes its gradient."""

import triton
import triton.language as tl

from sdfast.ops.self_distillation.triton_steps import BRIER, KL, MSE, first_peak, store_gradient
from sdfast.ops.self_distillation.triton_target import target_statistics, target_tile


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
    own,  # (R,) weights that the rows make themselves
    factor,  # (R,)
    kept,  # (R,)
    classes,
    LOSS: tl.constexpr,
):
    """The loss's gradient with respect to the logits, times the row's own weight, times its factor.

    The factor comes last, each product rounded: who hands 1 and multiplies afterwards has the same bits.
    """
    if LOSS == MSE:
        gradient = (x - target) * (2.0 / classes.to(factor.dtype))
    elif LOSS == BRIER:
        gradient = p * (p - target - sums[:, None]) * 2.0
    else:
        gradient = p * sums[:, None] - weighted
    return tl.where(kept[:, None], gradient * own[:, None] * factor[:, None], 0.0)


@triton.jit
def sweep(
    classes,
    pointers,  # as target_tile takes them
    strides,
    row,
    shape,  # alpha, smoothing (R,), power (R, 1)
    parameter,
    mass,  # (R,) of the weighted target; used where it is known beforehand
    own,  # (R,)
    factor,  # (R,)
    out_pointers,  # (R,) of gradient rows
    stored,  # (R,) which rows of the gradient exist
    LOSS: tl.constexpr,
    LABEL_FN: tl.constexpr,
    GEOMETRIC: tl.constexpr,
    SHARPENED: tl.constexpr,
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
    if GEOMETRIC or SHARPENED:
        target_high, target_total = target_statistics(
            classes, pointers, strides, row, shape, parameter, LOSS, LABEL_FN, GEOMETRIC, SHARPENED, SOFT_LABELS,
            OWN_SOURCE, SHARE_EXP, R, B, STAGES, REAL,
        )  # fmt: skip
        shape = (shape[0], shape[1], shape[2], target_high, target_total)
    if ONE_TILE:
        x, p, target, weighted, inside = target_tile(
            lanes, classes, pointers, strides, row, shape, parameter, LOSS, LABEL_FN, GEOMETRIC, SHARPENED,
            SOFT_LABELS, OWN_SOURCE, WEIGHTED, SHARE_EXP, REAL,
        )  # fmt: skip
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
            values = gradient_tile(x, p, target, weighted, mass, own, factor, kept, classes, LOSS)
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
            columns, classes, pointers, strides, row, shape, parameter, LOSS, LABEL_FN, GEOMETRIC, SHARPENED,
            SOFT_LABELS, OWN_SOURCE, WEIGHTED, SHARE_EXP, REAL,
        )  # fmt: skip
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
            values = gradient_tile(x, p, target, weighted, mass, own, factor, kept, classes, LOSS)
            store_gradient(out_pointers, columns, stored, classes, values)
    if GRADIENT and not KNOWN_MASS:
        mass = tl.sum(part_sums, 1)
        for start in tl.range(0, classes, B, num_stages=STAGES):
            columns = start + lanes
            x, p, target, weighted, inside = target_tile(
                columns, classes, pointers, strides, row, shape, parameter, LOSS, LABEL_FN, GEOMETRIC, SHARPENED,
                SOFT_LABELS, OWN_SOURCE, WEIGHTED, SHARE_EXP, REAL,
            )  # fmt: skip
            values = gradient_tile(x, p, target, weighted, mass, own, factor, kept, classes, LOSS)
            store_gradient(out_pointers, columns, stored, classes, values)
    peak, best, nan = first_peak(peaks, firsts, nans, classes)
    return tl.sum(losses, 1), tl.sum(entropies, 1), peak, best, nan
