"""The Triton backend of a prediction bank: launches and the operation.

Launches: one that settles which row of the batch writes which row of the bank (where anything may be written), the
count over a large batch, as the self-distillation loss has it, and one for all else. Rows are swept tile by tile, four
or five times, from the cache but for the first: the CUDA backend keeps them in shared memory, this one is the portable
one. None of it is measured yet.
"""

import math
from typing import Any

import triton
from torch import Tensor

from sdfast import _devices
from sdfast.ops.prediction_bank.description import LATE, unpacked_bank
from sdfast.ops.prediction_bank.triton_kernels import bank_kernel, claim_kernel
from sdfast.ops.self_distillation.description import (
    LABEL_FUNCTIONS,
    MIXINGS,
    REDUCTIONS,
    STATE_SIZE,
    WANT_GRADIENT,
    WANT_STATS,
    accumulation_dtype,
    unpacked,
)
from sdfast.ops.self_distillation.triton_impl import (
    COUNT_IN_PROGRAM,
    PARTIALS,
    REAL,
    arrival_counter,
    count,
    label_strides,
    stages,
    tiling,
)

CLAIM_TILE = 256


def forward(
    logits: Tensor,  # (N, C)
    labels: Tensor,  # (N,) int64, or (N, C)
    alpha: Tensor | None,  # () or (N,)
    indices: Tensor,  # (N,) int64
    predictions: Tensor,  # (samples, C), or (samples, k + 1)
    classes: Tensor,  # (samples, k) int32; (0, 0) where the rows are dense
    seen: Tensor,  # (samples,) int32
    claims: Tensor,  # (samples, 2) int32
    class_weight: Tensor | None,  # (C,)
    row_weight: Tensor | None,  # (N,)
    *description: Any,  # `description.PackedBank`
) -> tuple[Tensor, Tensor, Tensor]:
    """`_prediction_bank_triton`: (loss, gradient, state) as the operation's schema has them."""
    codes, momentum, regularisation = description[1], *description[4:]
    loss = unpacked(*description[:4])
    bank = unpacked_bank(codes, momentum, regularisation)
    want_gradient, late, want_stats = codes & WANT_GRADIENT, bool(codes & LATE), bool(codes & WANT_STATS)
    rows, columns = logits.shape
    top_k = classes.shape[1]
    real = accumulation_dtype(logits.dtype)
    reduced = loss.reduction != REDUCTIONS["none"]
    value = logits.new_empty(() if reduced else (rows,), dtype=real)
    gradient = logits.new_empty((rows, columns) if want_gradient else (0,), dtype=real if late else logits.dtype)
    state = logits.new_empty((STATE_SIZE,), dtype=real)
    tile = tiling(columns)
    programs = max(1, triton.cdiv(rows, tile.rows))
    summed = reduced or want_stats
    soft = labels.dim() == 2
    claimed = (bank.update or bank.unique) and rows > 0
    with _devices.current(logits):
        if claimed:
            claim_kernel[(triton.cdiv(rows, CLAIM_TILE),)](
                labels, indices, claims, labels.stride(0), rows, len(seen), loss.ignore_index, soft, CLAIM_TILE
            )
        counts: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if loss.adaptive or (loss.reduction == REDUCTIONS["mean"] and not soft and rows > COUNT_IN_PROGRAM):
            counts = count(logits, labels, class_weight, loss.adaptive, loss.ignore_index)
        bank_kernel[(programs,)](
            logits, labels, alpha, indices, predictions, classes if top_k else None, seen, claims if claimed else None,
            class_weight, row_weight, *counts, state, gradient if want_gradient else None, value,
            logits.new_empty((PARTIALS, programs), dtype=real) if summed else None,
            arrival_counter(logits.device) if summed else None, *logits.stride(), *label_strides(labels),
            loss.alpha_value, loss.label_parameter, loss.label_smoothing, loss.target_power, loss.row_power,
            1 - momentum, math.log(momentum) if momentum else -math.inf, bank.strength,
            bank.clamp, rows, columns, len(seen), next((count.numel() for count in counts if count is not None), 0),
            loss.ignore_index, bank.warm_up, loss.loss, loss.label_fn, loss.mixing == MIXINGS["geometric"],
            loss.target_power != 1, loss.row_power != 0, loss.reduction, soft, loss.adaptive,
            alpha is not None and alpha.dim() == 1, bank.bias_correction, bank.write_first, bank.unique, bank.update,
            loss.label_fn == LABEL_FUNCTIONS["softmax"] and loss.label_parameter != 1, bank.strength != 0,
            bank.clamp != 0, late,
            want_stats, soft and columns == 1, top_k, triton.next_power_of_2(top_k + 1), tile.rows, tile.columns,
            tile.one_tile, stages(logits), REAL[real], num_warps=tile.warps,
        )  # fmt: skip
    return value, gradient, state
