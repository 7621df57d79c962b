"""The Triton backend of the self-distillation loss: tile sizes, launches, and the two operations.

Launches: one forward, two where a count over the batch must come first (adaptive alpha, or a mean over the kept rows of
more than `COUNT_IN_PROGRAM`); one backward. The last program to arrive sums the programs' partial losses in their own
order: that saves a launch, stays bitwise repeatable, and costs one integer atomic per program.

Why these tiles. The loss does some twenty operations and one or two exponentials an entry and moves 2 or 4 bytes each
way, so bytes bound it. A row of up to `ONE_TILE` classes is read once, lives in registers (16 entries a thread) and is
written once: nothing can move fewer bytes. Short rows share a program, so that every thread still has 16 entries, two
16-byte loads of bfloat16. Longer rows are swept twice, 8 KiB of bfloat16 a tile with several tiles in flight; the
second sweep goes backwards to meet what the first left in the cache. Brier, and targets whose mass must be summed
(probability labels, class weights), take a third sweep there. Unlike the launches, none of this is measured yet.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdfast import _devices
from sdfast.ops.self_distillation.description import (
    LABEL_FUNCTIONS,
    LOSSES,
    MIXINGS,
    REDUCTIONS,
    STATE_SIZE,
    WANT_GRADIENT,
    WANT_STATS,
    Description,
    accumulation_dtype,
    unpacked,
)
from sdfast.ops.self_distillation.triton_batch import MAX_COUNT_BLOCKS, SUM_BLOCK, count_kernel
from sdfast.ops.self_distillation.triton_kernels import rows_kernel, scale_kernel
from sdfast.ops.self_distillation.triton_steps import NO_LABEL_FUNCTION

ONE_TILE = 8192  # classes: the longest row that stays in registers
LOOPED_TILE = 4096  # columns of a tile of a longer row
TILE = 2048  # entries of a tile of short rows
COUNT_IN_PROGRAM = 4096  # labels: up to here each program counts them all, 32 KiB of cache, and no launch is spent
SCALE_TILE = 4096  # entries of a program that scales a gradient
PARTIALS = 6  # loss, kept, alpha, correct, entropy, agreement

REAL = {torch.float32: tl.float32, torch.float64: tl.float64}


class Tiling(NamedTuple):
    """How a row of some number of classes is cut: nothing else decides the order of a row's sums."""

    rows: int
    columns: int
    one_tile: bool
    warps: int


@cache
def tiling(classes: int) -> Tiling:
    """The tiles of rows of `classes`."""
    columns = max(4, triton.next_power_of_2(classes))
    if columns > ONE_TILE:
        return Tiling(1, LOOPED_TILE, False, 8)
    rows = max(1, TILE // columns)
    return Tiling(rows, columns, True, rows * columns // 512)


def stages(*tensors: Tensor | None) -> int:
    """Column tiles in flight of rows of several tiles: up to 4, within 48 KiB of shared memory for all that is read."""
    return max(1, min(4, 1 + 49152 // (LOOPED_TILE * sum(t.element_size() for t in tensors if t is not None))))


def forward(
    logits: Tensor,  # (N, C)
    labels: Tensor,  # (N,) int64, or (N, C)
    alpha: Tensor | None,  # () or (N,)
    source: Tensor | None,  # (N, C)
    class_weight: Tensor | None,  # (C,)
    row_weight: Tensor | None,  # (N,)
    alpha_value: float,
    codes: int,
    ignore_index: int,
    numbers: list[float] | None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_self_distillation_triton`: (loss, gradient, state) as the operation's schema has them.

    The gradient may go `into` a contiguous tensor, the logits themselves too: a tile is read before it is written.
    """
    d = unpacked(alpha_value, codes, ignore_index, numbers)
    want_gradient, want_stats = bool(codes & WANT_GRADIENT), bool(codes & WANT_STATS)
    rows, classes = logits.shape
    real = accumulation_dtype(logits.dtype)
    reduced = d.reduction != REDUCTIONS["none"]
    value = logits.new_empty(() if reduced else (rows,), dtype=real)
    gradient = logits.new_empty((rows, classes) if want_gradient else (0,)) if into is None else into
    want_state = want_stats or not want_gradient
    state = logits.new_empty((STATE_SIZE if want_state else 0,), dtype=real)
    programs = max(1, triton.cdiv(rows, tiling(classes).rows))
    summed = reduced or want_stats
    with _devices.current(logits):
        counts: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if d.adaptive or (d.reduction == REDUCTIONS["mean"] and labels.dim() == 1 and rows > COUNT_IN_PROGRAM):
            counts = count(logits, labels, class_weight, d.adaptive, ignore_index)
        _launch(
            programs, logits, labels, alpha, source, class_weight, row_weight, d,
            counts=counts, state=state if want_state else None, gradient=gradient if want_gradient else None,
            loss_out=value, partials=logits.new_empty((PARTIALS, programs), dtype=real) if summed else None,
            arrivals=arrival_counter(logits.device) if summed else None, want_stats=want_stats,
        )  # fmt: skip
    return value, gradient, state


def backward(
    upstream: Tensor,  # () or (N,)
    state: Tensor,  # (5,)
    logits: Tensor,  # (N, C)
    labels: Tensor,  # (N,) int64, or (N, C)
    alpha: Tensor | None,  # () or (N,)
    source: Tensor | None,  # (N, C)
    class_weight: Tensor | None,  # (C,)
    row_weight: Tensor | None,  # (N,)
    alpha_value: float,
    codes: int,
    ignore_index: int,
    numbers: list[float] | None,
    into: Tensor | None = None,
) -> Tensor:
    """`_self_distillation_backward_triton`: the gradient for any upstream gradient, which is folded in."""
    gradient = logits.new_empty(logits.shape) if into is None else into
    d = unpacked(alpha_value, codes, ignore_index, numbers)._replace(adaptive=False, reduction=REDUCTIONS["none"])
    programs = max(1, triton.cdiv(logits.shape[0], tiling(logits.shape[1]).rows))
    with _devices.current(logits):
        _launch(
            programs, logits, labels, alpha, source, class_weight, row_weight, d, state=state, gradient=gradient,
            upstream=upstream,
        )  # fmt: skip
    return gradient


def scale_in_place(gradient: Tensor, upstream: Tensor) -> None:
    """`_scale_in_place_triton`: multiplies a contiguous gradient by the 0-d upstream gradient, unless that is 1."""
    entries = gradient.numel()
    if entries:
        with _devices.current(gradient):
            scale_kernel[(triton.cdiv(entries, SCALE_TILE),)](gradient, upstream, entries, TILE=SCALE_TILE)


def count(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, adaptive: bool, ignore_index: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(correct, kept, class weights' sum) per program, on the device; what is not asked for is ``None``."""
    rows, classes = logits.shape
    tile = tiling(classes)
    soft = labels.dim() == 2
    step = tile.rows if adaptive else SUM_BLOCK.value
    chunk = step * max(1, triton.cdiv(rows, step * MAX_COUNT_BLOCKS.value))
    programs = max(1, triton.cdiv(rows, chunk))

    def new(wanted: bool, dtype: torch.dtype) -> Tensor | None:
        return logits.new_empty((programs,), dtype=dtype) if wanted else None

    weighted = class_weight is not None and not soft
    counts = (
        new(adaptive, torch.int32), new(not soft, torch.int32), new(weighted, accumulation_dtype(logits.dtype)),
    )  # fmt: skip
    count_kernel[(programs,)](
        logits, labels, class_weight if weighted else None, *counts, *logits.stride(), *label_strides(labels),
        rows, classes, chunk, ignore_index, adaptive, soft, soft and classes == 1, tile.rows, tile.columns,
        tile.one_tile, stages(logits, labels if soft else None), REAL[accumulation_dtype(logits.dtype)],
        num_warps=tile.warps,
    )  # fmt: skip
    return counts


def _launch(
    programs: int, logits: Tensor, labels: Tensor, alpha: Tensor | None, source: Tensor | None,
    class_weight: Tensor | None, row_weight: Tensor | None, d: Description, *,
    counts: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None), upstream: Tensor | None = None,
    state: Tensor | None = None, gradient: Tensor | None = None, loss_out: Tensor | None = None,
    partials: Tensor | None = None, arrivals: Tensor | None = None, want_stats: bool = False,
) -> None:  # fmt: skip
    rows, classes = logits.shape
    tile = tiling(classes)
    soft = labels.dim() == 2
    if alpha is None and not d.adaptive and d.alpha_value == 1:
        d, source = d._replace(label_fn=NO_LABEL_FUNCTION.value, mixing=MIXINGS["arithmetic"]), None
    own_softmax = source is None and d.label_fn == LABEL_FUNCTIONS["softmax"] and d.label_parameter == 1
    share_exp = own_softmax and d.loss != LOSSES["mse"]
    rows_kernel[(programs,)](
        logits, labels, alpha, source, class_weight, row_weight, *counts, upstream, state, gradient, loss_out, partials,
        arrivals, *logits.stride(), *label_strides(labels), *((0, 0) if source is None else source.stride()),
        upstream.stride(0) if upstream is not None and upstream.dim() else 0, d.alpha_value, d.label_parameter,
        d.label_smoothing, d.target_power, d.row_power, rows, classes,
        next((count.numel() for count in counts if count is not None), 0),
        d.ignore_index, d.loss, d.label_fn, d.mixing == MIXINGS["geometric"], d.target_power != 1, d.row_power != 0,
        d.reduction, soft, d.adaptive, alpha is not None and alpha.dim() == 1, share_exp,
        upstream is not None, want_stats, soft and classes == 1, tile.rows, tile.columns, tile.one_tile,
        stages(logits, labels if soft else None, source, class_weight), REAL[accumulation_dtype(logits.dtype)],
        num_warps=tile.warps,
    )  # fmt: skip


def label_strides(labels: Tensor) -> tuple[int, int]:
    return (labels.stride(0), labels.stride(1) if labels.dim() == 2 else 0)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def arrival_counter(device: torch.device) -> Tensor:
    """A zero that a launch counts up and leaves zero: one a stream, whose launches never overlap.

    A graph being captured gets its own, zeroed inside the graph: it may be replayed on any stream.
    """
    if device.type == "cpu":
        return torch.zeros(1, dtype=torch.int32)
    module = torch.get_device_module(device)
    if getattr(module, "is_current_stream_capturing", bool)():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, module.current_stream(device).stream_id)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]
