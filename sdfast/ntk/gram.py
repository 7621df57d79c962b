"""The Gram matrix of a model's gradients, streamed over groups of parameters and tiles of samples."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdfast import _checks
from sdfast.ntk import inputs as feeding
from sdfast.ntk.blocks import Block, Group, collect, groups_of
from sdfast.ntk.checkpoint import Checkpoint, settings_of
from sdfast.ntk.outputs import Outputs
from sdfast.ntk.plan import make_plan
from sdfast.ntk.products import PRECISIONS, products_in
from sdfast.ntk.progress import Progress
from sdfast.ntk.result import Result
from sdfast.ntk.sample_gradients import check_batch_size
from sdfast.ntk.sample_rows import PathChangedError
from sdfast.ntk.source import Source, loop_everything, say, select_parameters
from sdfast.ntk.unchanged import unchanged

MEMORY = 2**31  # bytes: fixed, so that the groups, and with them the last bits, do not depend on what else runs


def gram(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    outputs: str | int | Callable[[Any], Tensor] | None = None,
    precision: str | None = None,
    params: Iterable[str] | Callable[[str], bool] | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    out: Tensor | np.ndarray | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike | None = None,
) -> Tensor:
    """The empirical neural tangent kernel H_ij = ⟨∂f(x_i)/∂θ, ∂f(x_j)/∂θ⟩, exact.

    Equals ``J1 @ J2.T`` for the Jacobians of f on `x1` and `x2`, which are never held whole. Without `x2` the result is
    symmetric in every bit; with the same batch size, thread count and build it is the same in every bit.

    Args:
        model: Any module; it is left as it is. Batch norm in training mode is exact too, on `x1` as one batch, at the
            price of n backward passes.
        x1: A tensor (n, ...), a tuple or dict of them (called as ``model(*x1)``, ``model(**x1)``), a dataset or a
            loader without shuffling (of an (input, label) pair the input alone).
        x2: The same for the columns, or ``None`` for those of `x1`.
        outputs: ``None`` for a model of one output. ``"sum"``: f is the sum of all outputs. ``"trace"``: the sum over
            the outputs c of their Gram matrices. ``"mean"``: trace / outputs. ``"per_class"``: all of them
            (outputs, n, n). ``"full"``: H[i, j, c, c'] for all pairs (n, n, outputs, outputs). An index: that output.
            A callable: from the model's output to one scalar per sample (n,).
        precision: Of the products; gradients are always computed in the model's own dtype, without TF32. ``"float32"``,
            ``"float64"``, ``"bf16x3"`` (operands as the sum of two bf16 numbers), ``"tf32"``, ``"bf16"``: operands are
            rounded, sums are kept in float32 for at most 4096 terms and in float64 beyond. ``None``: the model's dtype.
        params: Names, shell patterns of names, or a function of the name; ``None`` for all that require grad.
        batch_size: Samples of a micro-batch; 32 by default. It does not change the result but by rounding.
        memory: Bytes that the gradients held at a time may take; 2 GiB by default. Less memory means more passes.
        out: Where to put the result: a tensor or array (a memory map, say) of its shape and dtype.
        progress: Show a bar.
        checkpoint: A file that finished groups of parameters are written to. If it is there, the run continues, and
            gives the same bits as one that was not interrupted; it stays when the run is done.

    Returns:
        H in float64 for ``"float64"`` and in float32 for all others, on the device of the model, or `out`.

    Raises:
        TypeError: An argument has the wrong type, or parameters are in half precision.
        ValueError: `outputs` is missing, samples are coupled or drawn at random, or the checkpoint is of another run.
        FloatingPointError: A gradient is not finite; the parameter is named.
        MemoryError: The result does not fit, or `memory` is too small for one column of gradients.
    """
    asked = Outputs(outputs)
    parameters = select_parameters(model, params)
    first = next(iter(parameters.values()))
    precision = _check_precision(precision, first)
    check_batch_size(batch_size)
    memory = check_memory(memory)
    with unchanged(model, first.device):
        left = Source(model, feeding.read(x1, first, "x1"), asked, parameters, batch_size)
        right = left
        if x2 is not None:
            right = Source(model, feeding.read(x2, first, "x2"), asked, parameters, batch_size, left.findings)
        result = Result(asked, left.samples, right.samples, precision, first.device, symmetric=x2 is None, out=out)
        saved = None if checkpoint is None else _opened(checkpoint, left, right, precision, memory)
        if saved is not None and saved.looped:
            loop_everything(left.findings, parameters, "as before the interruption")
        try:
            _fill(result, left, right, precision, memory, saved, progress)
        except PathChangedError as error:
            loop_everything(left.findings, parameters, str(error))
            if saved is not None:
                saved.forget()
            result.clear()
            _fill(result, left, right, precision, memory, saved, progress)
        say(left.findings)
    return result.finished()


def _fill(
    result: Result,
    left: Source,
    right: Source,
    precision: str,
    memory: int,
    saved: Checkpoint | None,
    progress: bool,
) -> None:
    """Adds up all groups."""
    samples = (left.samples, right.samples)
    form, classes = left.outputs.form, left.classes
    first = next(iter(left.parameters.values()))
    plan = make_plan(left.findings, left.parameters, form, classes, samples, memory)
    sources = list(dict.fromkeys((left, right)))
    groups = groups_of(plan, sum(source.samples for source in sources), classes, first.element_size(), memory)
    done = 0
    if saved is not None and saved.matrix is not None:
        done = saved.done
        result.tensor.copy_(saved.matrix)
    bar = Progress([group.width or 1 for group in groups[done:]], progress)
    try:
        for number, group in enumerate(groups[done:], done + 1):
            blocks = _blocks(sources, group, bar)
            _add_tiles(result, blocks, group, form, precision, bar)
            if saved is not None:
                saved.save(number, result.tensor, left.findings.all_looped, last=number == len(groups))
    finally:
        bar.close()


def _blocks(sources: list[Source], group: Group, bar: Progress) -> list[Block]:
    """The gradients of one group, of each source."""
    blocks: list[Block] = []
    everything = sum(source.samples for source in sources)
    before = 0
    for source in sources:
        for step in collect(source, group):
            if isinstance(step, Block):
                blocks.append(step)
            else:
                bar.passed((before + step) / everything)
        before += source.samples
    return blocks


def _add_tiles(result: Result, blocks: list[Block], group: Group, form: str, precision: str, bar: Progress) -> None:
    tiles = list(result.tiles())
    with products_in(precision):
        for number, (rows, columns) in enumerate(tiles, 1):
            tile = blocks[0].tile(blocks[-1], rows, columns, form, precision)
            if not tile.isfinite().all():
                _refuse_infinite(blocks, group)
            result.add(rows, columns, tile)
            bar.multiplied(number / len(tiles))


def _opened(path: str | os.PathLike, left: Source, right: Source, precision: str, memory: int) -> Checkpoint:
    sides = {"x1": left.inputs, "x2": None if right is left else right.inputs}
    settings = settings_of(
        left.model,
        left.parameters,
        sides,
        outputs=left.outputs.describe(),
        precision=precision,
        batch_size=[left.batch_size, right.batch_size],
        memory=memory,
    )
    return Checkpoint(path, settings, torch.stack([*left.findings.answers.values()]))


def _refuse_infinite(blocks: list[Block], group: Group) -> None:
    names = list(dict.fromkeys(name for block in blocks for name in block.not_finite(group)))
    if names:
        raise FloatingPointError(f"model: gradients of {', '.join(names)} are NaN or infinite")
    parameters = [*dict.fromkeys(piece.parameter for piece in group.pieces), *group.factored]
    raise FloatingPointError(
        f"model: products of the gradients of {', '.join(parameters)} exceed float32; use precision='float64'"
    )


def _check_precision(precision: str | None, parameter: Tensor) -> str:
    if precision is None:
        return _checks.dtype_name(parameter)
    _checks.check_option("precision", precision, PRECISIONS)
    return precision


def check_memory(memory: object) -> int:
    """The bytes that gradients may take at a time; the default where ``None``."""
    if memory is None:
        return MEMORY
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise TypeError(f"memory: got {type(memory).__name__}, wanted a number of bytes or None")
    if memory < 1:
        raise ValueError(f"memory: got {memory}, wanted at least 1 byte")
    return memory
