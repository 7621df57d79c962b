"""The Triton backend of the distillation loss: launches, and the two operations.

Tiles, launches and the order of sums are those of the self-distillation backend. Each side is swept for its statistics,
then both for loss and gradient, and once more where the gradient waits for a sum over the row (reverse KL,
Jensen-Shannon, teachers by probabilities); rows of one tile find it all in the cache. One launch forward, two where a
mean must first count the kept rows of a large batch; one backward. None of it is measured yet.
"""

import triton
from torch import Tensor

from sdfast import _devices
from sdfast.ops.distillation.description import REDUCTIONS, STATE_SIZE, TEACHER_FORMS
from sdfast.ops.distillation.triton_kernels import rows_kernel
from sdfast.ops.self_distillation.description import accumulation_dtype
from sdfast.ops.self_distillation.triton_impl import (
    COUNT_IN_PROGRAM,
    REAL,
    arrival_counter,
    count,
    label_strides,
    stages,
    tiling,
)


def forward(
    logits: Tensor,  # (N, C)
    teacher: Tensor,  # (N, C) or (N, k)
    indices: Tensor | None,  # (N, k)
    tail: Tensor | None,  # (N,)
    labels: Tensor | None,  # (N,) int64, or (N, C)
    alpha: Tensor | None,  # () or (N,)
    row_weight: Tensor | None,  # (N,)
    alpha_value: float,
    temperature: float,
    teacher_temperature: float,
    divergence: int,
    teacher_form: int,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    want_gradient: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_distillation_triton`: (loss, gradient, state) as the operation's schema has them.

    The gradient may go `into` a contiguous tensor, the logits themselves too: a tile is read before it is written.
    """
    rows, classes = logits.shape
    real = accumulation_dtype(logits.dtype)
    reduced = reduction != REDUCTIONS["none"]
    value = logits.new_empty(() if reduced else (rows,), dtype=real)
    gradient = logits.new_empty((rows, classes) if want_gradient else (0,)) if into is None else into
    state = logits.new_empty((0,) if want_gradient else (STATE_SIZE,), dtype=real)
    programs = max(1, triton.cdiv(rows, tiling(classes).rows))
    with _devices.current(logits):
        kept = None
        if reduction == REDUCTIONS["mean"] and labels is not None and labels.dim() == 1 and rows > COUNT_IN_PROGRAM:
            _, kept, _ = count(logits, labels, None, False, ignore_index)
        _launch(
            programs, logits, teacher, indices, tail, labels, alpha, row_weight, alpha_value, temperature,
            teacher_temperature, divergence, teacher_form, ignore_index, label_smoothing, reduction=reduction,
            kept=kept, state=None if want_gradient else state, gradient=gradient if want_gradient else None,
            loss_out=value, partials=logits.new_empty((1, programs), dtype=real) if reduced else None,
            arrivals=arrival_counter(logits.device) if reduced else None,
        )  # fmt: skip
    return value, gradient, state


def backward(
    upstream: Tensor,  # () or (N,)
    state: Tensor,  # (1,)
    logits: Tensor,  # (N, C)
    teacher: Tensor,  # (N, C) or (N, k)
    indices: Tensor | None,  # (N, k)
    tail: Tensor | None,  # (N,)
    labels: Tensor | None,  # (N,) int64, or (N, C)
    alpha: Tensor | None,  # () or (N,)
    row_weight: Tensor | None,  # (N,)
    alpha_value: float,
    temperature: float,
    teacher_temperature: float,
    divergence: int,
    teacher_form: int,
    ignore_index: int,
    label_smoothing: float,
    into: Tensor | None = None,
) -> Tensor:
    """`_distillation_backward_triton`: the gradient for any upstream gradient, which is folded in."""
    gradient = logits.new_empty(logits.shape) if into is None else into
    programs = max(1, triton.cdiv(logits.shape[0], tiling(logits.shape[1]).rows))
    with _devices.current(logits):
        _launch(
            programs, logits, teacher, indices, tail, labels, alpha, row_weight, alpha_value, temperature,
            teacher_temperature, divergence, teacher_form, ignore_index, label_smoothing, state=state,
            gradient=gradient, upstream=upstream,
        )  # fmt: skip
    return gradient


def _launch(
    programs: int, logits: Tensor, teacher: Tensor, indices: Tensor | None, tail: Tensor | None, labels: Tensor | None,
    alpha: Tensor | None, row_weight: Tensor | None, alpha_value: float, temperature: float,
    teacher_temperature: float, divergence: int, teacher_form: int, ignore_index: int, label_smoothing: float, *,
    reduction: int = REDUCTIONS["none"], kept: Tensor | None = None, upstream: Tensor | None = None,
    state: Tensor | None = None, gradient: Tensor | None = None, loss_out: Tensor | None = None,
    partials: Tensor | None = None, arrivals: Tensor | None = None,
) -> None:  # fmt: skip
    rows, classes = logits.shape
    tile = tiling(classes)
    soft = labels is not None and labels.dim() == 2
    listed = teacher.shape[1] if teacher_form >= TEACHER_FORMS["top_k_bucket"] else 0
    rows_kernel[(programs,)](
        logits, teacher, indices, tail, labels, alpha, row_weight, kept, upstream, state, gradient, loss_out, partials,
        arrivals, *logits.stride(), *teacher.stride(), *((0, 0) if labels is None else label_strides(labels)),
        upstream.stride(0) if upstream is not None and upstream.dim() else 0, alpha_value, 1 / temperature,
        1 / teacher_temperature, temperature, label_smoothing, rows, classes, listed,
        0 if kept is None else kept.numel(), ignore_index, divergence, teacher_form, reduction, soft,
        alpha is not None and alpha.dim() == 1, labels is not None and not (alpha is None and alpha_value == 0),
        upstream is not None, tile.rows, tile.columns, tile.one_tile,
        stages(logits, teacher if listed == 0 else None, labels if soft else None),
        REAL[accumulation_dtype(logits.dtype)], num_warps=tile.warps,
    )  # fmt: skip
