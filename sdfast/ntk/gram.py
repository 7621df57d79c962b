"""The Gram matrix of a model's gradients, streamed over groups of parameters and tiles of samples."""

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sdfast.data.fingerprint import content_hash
from sdfast.ntk.blocks import Block, Group, collect
from sdfast.ntk.checkpoint import Checkpoint, settings_of
from sdfast.ntk.costs import Rates
from sdfast.ntk.distributed import Shards
from sdfast.ntk.plan import Plan
from sdfast.ntk.planner import check_plan, plan_of, rates_of
from sdfast.ntk.products import products_in
from sdfast.ntk.progress import Progress
from sdfast.ntk.request import MEMORY, check_precision, request_of
from sdfast.ntk.result import Result
from sdfast.ntk.sample_rows import PathChangedError
from sdfast.ntk.source import Source, loop_everything, say
from sdfast.ntk.unchanged import unchanged
from sdfast.ntk.verified import retried


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
    group: Any = None,
    plan: Plan | None = None,
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
        batch_size: Samples of a micro-batch; by default 32 to 192, as many as have activations of 512 MiB, and up
            to 1024 where no layer has more than one position a sample; fewer where their activations would take more
            than `memory`. It does not change the result but by rounding.
        memory: Bytes that the gradients held at a time may take; 2 GiB by default. Less memory means more passes.
            The activations of a micro-batch and H come on top.
        out: Where to put the result: a tensor or array (a memory map, say) of its shape and dtype.
        progress: Show a bar.
        checkpoint: A file that finished groups of parameters are written to. If it is there, the run continues, and
            gives the same bits as one that was not interrupted; it stays when the run is done. With `group` every
            process has its own, the name followed by its rank.
        group: A ``torch.distributed`` process group (gloo, nccl) whose processes all make this call: each takes a part
            of the parameters, on its own device, and all get H from one sum over the processes. ``None``: this process
            alone; the whole world is ``torch.distributed.group.WORLD``.
        plan: What ``sdfast.ntk.plan(…, calibrate=True)`` gave for the same arguments: methods are chosen by the rates
            that it measured.

    Returns:
        H in float64 for ``"float64"`` and in float32 for all others, on the device of the model, or `out`.

    Raises:
        TypeError: An argument has the wrong type, or parameters are in half precision.
        ValueError: `outputs` is missing, samples are coupled or drawn at random, the checkpoint or the plan is of
            another run, or the processes of the group differ in what they compute.
        FloatingPointError: A gradient is not finite; the parameter is named.
        MemoryError: The result does not fit, or `memory` is too small for one column of gradients.
        RuntimeError: Another process of the group failed or is gone.
    """
    shards = Shards(group, checkpoint is not None)
    with shards.together(resumable=False):
        request = request_of(model, outputs, params, precision, batch_size, memory)
        rates = rates_of(plan)
        shards.serve(request.device)
    with unchanged(model, request.device):
        with shards.together(resumable=False):
            rows, columns = request.sides(x1, x2)

        def compute(afresh: bool) -> Result:
            with shards.together(resumable=False):
                left, right = request.sources(rows, columns, afresh=afresh)
                run = _Run(left, right, request.precision, request.memory, plan, rates, shards)
                result = run.empty_result(out)
            saved = None if checkpoint is None and group is None else _opened(checkpoint, run)
            if shards.any(saved is not None and saved.looped):
                loop_everything(left.findings, left.parameters, "as before the interruption")
                if saved is not None and not saved.looped:
                    saved.forget()
            _fill_or_loop(result, run, saved, progress)
            shards.add_up(result.tensor)
            say(left.findings)
            return result

        # What is shared with other processes, or goes on another day, does not rest on what one of them has seen.
        result = retried(model, compute, afresh=group is not None or checkpoint is not None)
    return result.finished()


class _Run(NamedTuple):
    """What a matrix is computed from."""

    left: Source
    right: Source
    precision: str
    memory: int
    given: Plan | None
    rates: Rates | None
    shards: Shards

    def plan(self) -> Plan:
        """As the findings stand; cut so that every process has a share."""
        made = plan_of(self.left, self.right, self.precision, self.memory, self.rates, self.shards.world)
        if self.given is not None:
            check_plan(self.given, made)
        return made

    def empty_result(self, out: Tensor | np.ndarray | None = None) -> Result:
        """Where the matrix is to be, checked and cleared."""
        left, right = self.left, self.right
        device = next(iter(left.parameters.values())).device
        sizes = (left.samples, right.samples)
        return Result(left.outputs, *sizes, self.precision, device, symmetric=right is left, out=out)


def gram_of(source: Source) -> Tensor:
    """H of one source with the defaults of `gram`, inside `unchanged`.

    Args:
        source: Where the gradients come from.

    Returns:
        H.

    Raises:
        PathChangedError: A batch took another path than findings of another time say.
    """
    precision = check_precision(None, next(iter(source.parameters.values())))
    run = _Run(source, source, precision, MEMORY, None, None, Shards(None))
    result = run.empty_result()
    _fill_or_loop(result, run, None, False)
    say(source.findings)
    return result.finished()


def _fill_or_loop(result: Result, run: _Run, saved: Checkpoint | None, progress: bool) -> None:
    """Again with all parameters looped, where a batch takes another path than the probe's samples."""
    try:
        _fill(result, run, saved, progress)
    except PathChangedError as error:
        loop_everything(run.left.findings, run.left.parameters, str(error))
        if saved is not None:
            saved.forget()
        result.clear()
        _fill(result, run, saved, progress)


def _fill(result: Result, run: _Run, saved: Checkpoint | None, progress: bool) -> None:
    """Adds up all groups, of several processes this one's."""
    plan = run.plan()
    groups = run.shards.mine(plan)
    done = 0
    if saved is not None and saved.matrix is not None:
        done = saved.done
        result.tensor.copy_(saved.matrix)
    bar = Progress([group.width or 1 for group in groups[done:]], progress)
    sources = list(dict.fromkeys((run.left, run.right)))
    try:
        with run.shards.together():
            for number, group in enumerate(groups[done:], done + 1):
                blocks = _blocks(sources, group, bar)
                _add_tiles(result, blocks, group, plan.form, run.precision, bar)
                del blocks  # before the next ones come: `memory` is for one group
                for source in sources:
                    source.give_back()
                if saved is not None:
                    saved.save(number, result.tensor, run.left.findings.all_looped, last=number == len(groups))
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
        streamed = blocks[0].streamed_tiles(blocks[-1], tiles, form, precision)
        for number, (rows, columns) in enumerate(tiles, 1):
            tile = blocks[0].tile(blocks[-1], rows, columns, form, precision)
            if streamed is not None:
                tile += streamed[number - 1]
            if not tile.isfinite().all():
                _refuse_infinite(blocks, group)
            result.add(rows, columns, tile)
            bar.multiplied(number / len(tiles))


def _opened(path: str | os.PathLike | None, run: _Run) -> Checkpoint | None:
    """The checkpoint, and all processes of one mind about what they compute."""
    left, right, shards = run.left, run.right, run.shards
    sides = {"x1": left.inputs, "x2": None if right is left else right.inputs}
    with shards.together(resumable=False):
        settings = settings_of(
            left.model,
            left.parameters,
            sides,
            outputs=left.outputs.describe(),
            precision=run.precision,
            batch_size=[left.batch_size, right.batch_size],
            memory=run.memory,
            methods=content_hash([[entry.name, entry.method] for entry in run.plan().entries]),
            processes=shards.world,
        )
    shards.check_same({**settings, "checkpoint": path is not None})
    if path is None:
        return None
    if shards.world > 1:
        path = f"{os.fspath(path)}.{shards.rank}"
    with shards.together(resumable=False):
        return Checkpoint(path, settings, torch.stack([*left.findings.answers.values()]))


def _refuse_infinite(blocks: list[Block], group: Group) -> None:
    names = list(dict.fromkeys(name for block in blocks for name in block.not_finite(group)))
    if names:
        raise FloatingPointError(f"model: gradients of {', '.join(names)} are NaN or infinite")
    parameters = [*dict.fromkeys(piece.parameter for piece in group.pieces), *group.factored, *group.streamed]
    raise FloatingPointError(
        f"model: products of the gradients of {', '.join(parameters)} exceed float32; use precision='float64'"
    )
