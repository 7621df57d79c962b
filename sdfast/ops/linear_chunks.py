"""What the losses of a linear classifier share: how its rows are cut into chunks, and the matrix products of a chunk.

A chunk's logits are written into one buffer, the loss's kernel turns them into their gradient in place, and three
matrix products carry that on: nothing of rows × classes is ever held. The buffer is float32 for halves too (float64
for float64): logits rounded to bfloat16 would be off by several per cent of their probabilities.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sdfast import _checks, _dispatch
from sdfast.ops.self_distillation.description import REDUCTIONS, accumulation_dtype

WORKSPACE = 512 << 20  # bytes: the default of `workspace=`
CPU_CHUNK = 512  # rows: enough for a CPU's matrix product, and a chunk's memory is what the whole loss costs
BLOCK_ENTRIES = 1 << 20  # of the rows whose gradient the CPU kernel writes at a time: they stay in the cache
COLUMNS_ENTRIES = 1 << 22  # of weight rows that are converted at a time


class Plan(NamedTuple):
    """How the work is cut: rows of a chunk, rows of a block of it, classes that are converted at a time."""

    chunk: int
    block: int
    columns: int


def plan(
    classes: int, width: int, dtype: torch.dtype, device_type: str, buffers: int, chunk_rows: int | None, workspace: int
) -> Plan:
    """The largest chunk that fits the workspace, all scratch of the loss counted.

    Args:
        classes: Rows of the classifier's weight.
        width: Its columns, the larger of student and teacher.
        dtype: Of the hidden states.
        device_type: A CPU takes chunks of at most `CPU_CHUNK` rows by itself.
        buffers: Of (chunk, classes): one, and another for a teacher.
        chunk_rows: What the caller asked for.
        workspace: Bytes.

    Returns:
        The plan.

    Raises:
        ValueError: The workspace is too small for one row, or for `chunk_rows`; the message says what is needed.
    """
    size = 8 if dtype == torch.float64 else 4
    on_cpu = device_type == "cpu"
    converted = width * size if on_cpu and dtype in (torch.bfloat16, torch.float16) else 0  # bytes of a class

    def fixed(block: int, columns: int) -> int:
        return block * classes * size + columns * converted

    copied = 2 if not on_cpu and dtype in (torch.bfloat16, torch.float16) else 0  # the gradient in the product's dtype
    wanted, row_bytes = chunk_rows or 1, classes * (size * buffers + copied)
    block = max(1, BLOCK_ENTRIES // classes) if on_cpu else 0
    columns = min(classes, max(256, COLUMNS_ENTRIES // max(width, 1)))
    if workspace < 2 * fixed(block, columns) + wanted * row_bytes:  # spare scratch rather than rows
        block, columns = min(block, 1), min(columns, 256)
    chunk = (workspace - fixed(block, columns)) // row_bytes
    if chunk < wanted:
        rows = f"{wanted} rows" if chunk_rows else "one row"
        raise ValueError(
            f"workspace: got {workspace} bytes, but {rows} of {classes} classes needs "
            f"{fixed(block, columns) + wanted * row_bytes} bytes"
        )
    return Plan(chunk_rows or (min(chunk, CPU_CHUNK) if on_cpu else chunk), block, columns)


def check_sizes(chunk_rows: int | None, workspace: int) -> None:
    """Refuses what are no sizes."""
    if chunk_rows is not None and (isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"chunk_rows: got {chunk_rows!r}, wanted a positive integer or None")
    if isinstance(workspace, bool) or not isinstance(workspace, int) or workspace < 1:
        raise ValueError(f"workspace: got {workspace!r}, wanted a positive number of bytes")


class Classifier(NamedTuple):
    """A linear classifier and the rows it is applied to: logits = hidden weightᵀ + bias."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (C, H)
    bias: Tensor | None  # (C,)

    def detached(self) -> "Classifier":
        """The same, cut off."""
        return Classifier(*(None if t is None else t.detach() for t in self))  # type: ignore[arg-type]

    def logits_into(self, out: Tensor, rows: slice, columns: int) -> None:
        """Writes the logits of `rows` to `out`, (rows, C) of the accumulation dtype."""
        hidden = self.hidden[rows]
        if hidden.dtype == out.dtype:
            torch.mm(hidden, self.weight.t(), out=out)
        elif hidden.device.type == "cpu":
            hidden = hidden.to(out.dtype)
            for part in _slices(len(self.weight), columns):
                torch.mm(hidden, self.weight[part].to(out.dtype).t(), out=out[:, part])
        else:
            torch.ops.aten.mm.dtype_out(hidden, self.weight.t(), out.dtype, out=out)
        if self.bias is not None:
            out += self.bias


class Gradients:
    """The gradients of a classifier's tensors, those that are wanted, summed over chunks in the accumulation dtype."""

    def __init__(self, classifier: Classifier, wanted: tuple[bool, bool, bool]) -> None:
        hidden, weight, bias = classifier
        self.classifier = classifier
        self.real = accumulation_dtype(hidden.dtype)
        self.hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
        self.weight = weight.new_zeros(weight.shape, dtype=self.real) if wanted[1] else None
        self.bias = bias.new_zeros(bias.shape, dtype=self.real) if bias is not None and wanted[2] else None

    def add(self, gradient: Tensor, rows: slice, columns: int) -> None:
        """Carries on the gradient (rows, C) of the logits of `rows`."""
        hidden, weight = self.classifier.hidden[rows], self.classifier.weight
        if hidden.dtype == self.real:
            if self.hidden is not None:
                torch.mm(gradient, weight, out=self.hidden[rows])
            if self.weight is not None:
                self.weight.addmm_(gradient.t(), hidden)
        elif hidden.device.type == "cpu":
            self._add_converted(gradient, rows, columns)
        else:
            half = gradient.to(hidden.dtype)
            if self.hidden is not None:
                torch.mm(half, weight, out=self.hidden[rows])
            if self.weight is not None:
                torch.ops.aten.addmm.dtype_out(self.weight, half.t(), hidden, self.real, out=self.weight)
        if self.bias is not None:
            self.bias += gradient.sum(0)

    def _add_converted(self, gradient: Tensor, rows: slice, columns: int) -> None:
        hidden = self.classifier.hidden[rows].to(self.real)
        if self.hidden is not None:
            total = torch.zeros_like(hidden)
            for part in _slices(gradient.shape[1], columns):
                total.addmm_(gradient[:, part], self.classifier.weight[part].to(self.real))
            self.hidden[rows] = total
        if self.weight is not None:
            self.weight.addmm_(gradient.t(), hidden)

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden, weight, bias) in their tensors' dtypes, empty where not wanted."""
        hidden, weight, bias = self.classifier
        empty = hidden.new_empty((0,))
        return (
            empty if self.hidden is None else self.hidden,
            empty.clone() if self.weight is None else self.weight.to(weight.dtype),
            empty.clone() if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


def sweep(
    classifiers: list[Classifier], plan: Plan, of_block: Callable[..., Tensor | None], gradients: Gradients | None
) -> None:
    """Makes the logits chunk by chunk, and has `of_block` look at them, block by block.

    Args:
        classifiers: Of the student, and of a teacher, over the same rows and classes.
        plan: Sizes.
        of_block: Called with the rows, a slice, and each classifier's logits of them; returns the gradient of the
            student's, which it may write over them.
        gradients: Takes the gradient of a chunk; ``None``: there is none.
    """
    count = len(classifiers[0].hidden)
    buffers = [
        c.hidden.new_empty((min(plan.chunk, count), len(c.weight)), dtype=accumulation_dtype(c.hidden.dtype))
        for c in classifiers
    ]
    pieces = -(-count // plan.chunk)
    for rows in _slices(count, -(-count // pieces) if pieces else 1):  # nearly equal chunks, not a small last one
        chunks = [buffer[: rows.stop - rows.start] for buffer in buffers]
        for classifier, chunk in zip(classifiers, chunks, strict=True):
            classifier.logits_into(chunk, rows, plan.columns)
        for part in _slices(rows.stop - rows.start, plan.block or plan.chunk):
            blocks = [chunk[part] for chunk in chunks]
            gradient = of_block(slice(rows.start + part.start, rows.start + part.stop), *blocks)
            if gradients is not None and gradient is not None and gradient.data_ptr() != blocks[0].data_ptr():
                blocks[0].copy_(gradient)
        if gradients is not None:
            gradients.add(chunks[0], rows, plan.columns)


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(begin, min(count, begin + step)) for begin in range(0, count, step))


def rows_of(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Those rows of a tensor that has one entry a row, or the tensor itself where it has one for all."""
    return tensor if tensor is None or tensor.dim() == 0 else tensor[rows]


def row_factors(row_weight: Tensor | None, denominator: Tensor, rows: int) -> Tensor:
    """(N,) factors that make a sum over rows the mean: row weights over the 0-d denominator."""
    share = (1 / denominator).expand(rows)
    return share.contiguous() if row_weight is None else row_weight * share


def denominator(
    labels: Tensor | None, class_weight: Tensor | None, reduction: int, ignore_index: int, like: Tensor
) -> Tensor:
    """What the mean over the rows of `like` divides by, 0-d on the device; 1 where none is kept or none is taken."""
    one = like.new_ones((), dtype=accumulation_dtype(like.dtype))
    if reduction != REDUCTIONS["mean"]:
        return one
    if labels is None:
        return one * max(len(like), 1)
    kept = labels != ignore_index
    count = kept.sum()
    weighed = count.to(one.dtype)
    if class_weight is not None:
        index = torch.where(kept, labels, 0).clamp(0, len(class_weight) - 1)
        weighed = torch.where(kept, class_weight[index].to(one.dtype), 0).sum()
    return torch.where(count == 0, one, weighed)


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, ...]:
    """What stands for the gradients while nothing is computed; empty where not wanted."""
    tensors = (hidden, weight, bias)
    return tuple(
        hidden.new_empty(t.shape if want and t is not None else (0,)) for t, want in zip(tensors, wanted, strict=True)
    )


def check_classifier(names: tuple[str, str, str], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuses what is no (..., H) of hidden states with a (C, H) weight and a (C,) bias, of one dtype and device."""
    _checks.check_floating(names[0], hidden)
    _checks.check_floating(names[1], weight)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{names[0]}: got shape {_checks.shape_text(hidden)}, wanted (..., width) of at least 1")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{names[1]}: got shape {_checks.shape_text(weight)}, wanted (classes, width)")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names[1]}: got shape {_checks.shape_text(weight)}, wanted (classes, {hidden.shape[-1]}) for {names[0]} "
            f"{_checks.shape_text(hidden)}"
        )
    others = [(names[1], weight)]
    if bias is not None:
        _checks.check_floating(names[2], bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{names[2]}: got shape {_checks.shape_text(bias)}, wanted ({weight.shape[0]},) for {names[1]} "
                f"{_checks.shape_text(weight)}"
            )
        others.append((names[2], bias))
    for name, tensor in others:
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: is on {tensor.device}, wanted {hidden.device} as {names[0]}")
        if tensor.dtype != hidden.dtype:
            got, wanted = _checks.dtype_name(tensor), _checks.dtype_name(hidden)
            raise TypeError(f"{name}: got {got}, wanted {wanted} as {names[0]}")


def autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in autocast's dtype where that is on, as `torch.nn.functional.linear` has them."""
    served = isinstance(hidden, Tensor) and hidden.device.type in _dispatch.DEVICES
    if not served or not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)

    def cast(tensor):
        takes_part = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if takes_part else tensor

    return cast(hidden), cast(weight), cast(bias)


def logits_stand_in(hidden: Tensor, weight: Tensor) -> Tensor:
    """Has the shape, dtype and device of the logits, and the memory of one entry: for the checks of other arguments."""
    return hidden.new_empty((1,)).expand(*hidden.shape[:-1], weight.shape[0])
