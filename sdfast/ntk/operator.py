"""Products with the neural tangent kernel H = J Jᵀ, and with J and Jᵀ, without forming H.

The gradients of all samples are collected once, as rows or as the factors A, B of a layer (`blocks`), and kept; a
product with many vectors is then a few large matrix products for each layer, and no pass through the model. Where they
do not fit in memory, every product collects them anew, group by group.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdfast import _checks
from sdfast.ntk import inputs as feeding
from sdfast.ntk.blocks import Block, Group, collect, groups_of
from sdfast.ntk.factors import backward_factors, column_chunks, forward_factors, squared_norms
from sdfast.ntk.operator_costs import Costs, costs_of
from sdfast.ntk.plan import Plan, make_plan
from sdfast.ntk.products import products_in
from sdfast.ntk.request import request_of
from sdfast.ntk.result import Result
from sdfast.ntk.sample_rows import PathChangedError
from sdfast.ntk.source import Source, loop_everything, say
from sdfast.ntk.unchanged import full_precision, unchanged
from sdfast.ntk.verified import retried

__all__ = ["JacobianOperator", "NTKOperator", "operator"]


def operator(
    model: nn.Module,
    x: Any,
    *,
    outputs: str | int | Callable[[Any], Tensor] | None = None,
    params: Iterable[str] | Callable[[str], bool] | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
) -> "NTKOperator":
    """The kernel H = J Jᵀ as an operator: ``operator(model, x) @ v`` equals ``gram(model, x) @ v``.

    Args:
        model: As for `gram`. Where its gradients do not fit in `memory` it is called again by every product, and must
            not change in between.
        x: As for `gram`.
        outputs: As for `gram`: one scalar per sample, ``"trace"`` or ``"mean"``; with ``"full"`` the operator is that
            of all (sample, output) pairs, row i · outputs + c.
        params: As for `gram`.
        batch_size: As for `gram`.
        memory: Bytes that the gradients held may take; 2 GiB by default.

    Returns:
        The operator, in the model's dtype and on its device.

    Raises:
        ValueError: `outputs` is ``"per_class"``, of which each has a kernel of its own, or `gram` would refuse.
    """
    request = request_of(model, outputs, params, None, batch_size, memory)
    if request.outputs.form == "per_class":
        raise ValueError("outputs: got 'per_class', which is no single matrix; make one operator for each index")
    with unchanged(model, request.device):
        inputs = feeding.read(x, request.first, "x")

        def compute(afresh: bool) -> NTKOperator:
            source, _ = request.sources(inputs, afresh=afresh)
            try:
                made = NTKOperator(_Gradients(source, request.memory))
            except PathChangedError as error:
                loop_everything(source.findings, request.parameters, str(error))
                made = NTKOperator(_Gradients(source, request.memory))
            say(source.findings)
            return made

        return retried(model, compute)


class _Gradients:
    """The blocks of all gradients, kept where one group holds them."""

    def __init__(self, source: Source, memory: int, factored: bool = True) -> None:
        self.source, self.memory = source, memory
        first = next(iter(source.parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.form = source.outputs.form
        samples = source.samples
        sizes = (samples, samples)
        plan = make_plan(source.findings, source.parameters, self.form, source.classes, sizes, True, memory)
        self.entries = {entry.name: entry for entry in plan.entries}
        _choose_factors(plan, samples, source.classes, first.element_size(), memory if factored else 0)
        self.groups = groups_of(plan, samples, source.classes, first.element_size(), memory)
        self.offsets, self.count = {}, 0
        for name, parameter in source.parameters.items():
            self.offsets[name] = self.count
            self.count += parameter.numel()
        self.kept = [self._collected(group) for group in self.groups] if len(self.groups) <= 1 else None
        if self.kept is None:
            for group in self.groups:  # a path that changes shows now, not in the middle of a product
                self._collected(group)

    def blocks(self) -> Iterator[tuple[Group, Block]]:
        """All groups with their gradients."""
        if self.kept is not None:
            yield from zip(self.groups, self.kept, strict=True)
            return
        for group in self.groups:
            with unchanged(self.source.model, self.device):
                block = self._collected(group)
            yield group, block

    def _collected(self, group: Group) -> Block:
        for step in collect(self.source, group):
            if isinstance(step, Block):
                return step
        raise RuntimeError("a pass over the samples ended without a block")

    def places(self, group: Group) -> Iterator[tuple[slice, slice]]:
        """Columns of a group's rows, and where they lie among all parameters."""
        offset = 0
        for name, start, stop in group.pieces:
            width, first = stop - start, self.offsets[name] + start
            yield slice(offset, offset + width), slice(first, first + width)
            offset += width

    def in_rows(self) -> "_Gradients":
        """The same without factors, in the order of the parameters' entries."""
        if not any(group.factored for group in self.groups):
            return self
        with unchanged(self.source.model, self.device):
            return _Gradients(self.source, self.memory, factored=False)


def _choose_factors(plan: Plan, samples: int, classes: int, itemsize: int, memory: int) -> None:
    """Factors wherever they fit and are smaller than the gradients: a product costs the same arithmetic with both."""
    for entry in plan.entries:
        if entry.beside:
            entry.method, entry.beside = "materialise", ""
        if entry.factors is not None and entry.method in ("materialise", "contract", "stream"):
            size = entry.factor_bytes(samples, classes, itemsize)
            smaller = size < entry.numel * samples * classes * itemsize and size <= memory
            entry.method = "contract" if smaller else "materialise"


class _Operator:
    """What all operators here have in common; columns are torch tensors or NumPy arrays, results of the same kind."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def _multiply(self, columns: Tensor) -> Tensor:
        raise NotImplementedError

    def matmat(self, columns: Any) -> Any:
        """The product with a block of vectors.

        Args:
            columns: (columns of the operator, b).

        Returns:
            (rows of the operator, b).

        Raises:
            ValueError: They have another shape.
        """
        given = columns if isinstance(columns, Tensor) else torch.from_numpy(np.ascontiguousarray(columns))
        if given.dim() != 2 or len(given) != self.shape[1]:
            raise ValueError(f"columns: got shape {_checks.shape_text(given)}, wanted ({self.shape[1]}, any)")
        with torch.no_grad(), full_precision():
            result = self._multiply(given.detach().to(self.device, self.dtype))
        return result if isinstance(columns, Tensor) else result.cpu().numpy()

    def __matmul__(self, right: Any) -> Any:
        return self.matmat(right[:, None])[:, 0] if right.ndim == 1 else self.matmat(right)

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator``, for `eigsh` and its like."""
        from scipy.sparse.linalg import LinearOperator

        forward = self.matmat
        backward = self.T.matmat
        return LinearOperator(
            self.shape,
            matvec=lambda v: forward(v.reshape(-1, 1))[:, 0],
            rmatvec=lambda v: backward(v.reshape(-1, 1))[:, 0],
            matmat=forward,
            rmatmat=backward,
            dtype=np.dtype(str(self.dtype).removeprefix("torch.")),
        )

    @property
    def T(self) -> "_Operator":  # noqa: N802  # as arrays have it
        """The transpose."""
        raise NotImplementedError


class NTKOperator(_Operator):
    """H = J Jᵀ, symmetric; made by `operator`.

    Attributes:
        shape: (n, n), or (n · outputs, n · outputs) for all pairs of samples and outputs.
        dtype: The model's.
        device: The model's.
    """

    def __init__(self, gradients: _Gradients) -> None:
        self._gradients = gradients
        source = gradients.source
        rows = source.samples * (source.classes if gradients.form == "full" else 1)
        self.shape, self.dtype, self.device = (rows, rows), gradients.dtype, gradients.device

    def __repr__(self) -> str:
        kept = "kept" if self._gradients.kept is not None else f"collected anew in {len(self._gradients.groups)} passes"
        return f"NTKOperator(shape={self.shape}, gradients {kept})"

    @property
    def T(self) -> "NTKOperator":  # noqa: N802
        """Itself."""
        return self

    @property
    def costs(self) -> Costs:
        """What a product and the matrix itself cost; `eigenspace` chooses by it."""
        gradients, source = self._gradients, self._gradients.source
        kept = gradients.kept is not None
        return costs_of(
            gradients.groups,
            gradients.entries,
            source.samples,
            source.classes,
            gradients.form,
            self.dtype.itemsize,
            kept,
        )

    @property
    def memory(self) -> int:
        """Bytes that were allowed for the gradients; `eigenspace` makes no larger matrix either."""
        return self._gradients.memory

    def to_dense(self) -> Tensor:
        """H itself (rows, rows) in the operator's dtype: what `gram` computes, symmetric in every bit."""
        gradients, source = self._gradients, self._gradients.source
        precision = _checks.dtype_name(next(iter(source.parameters.values())))
        points = source.samples
        result = Result(source.outputs, points, points, precision, self.device, symmetric=True, out=None)
        with torch.no_grad(), products_in(precision):
            for _, block in gradients.blocks():
                for rows, columns in result.tiles():
                    result.add(rows, columns, block.tile(block, rows, columns, gradients.form, precision))
        matrix = result.finished()
        return matrix.movedim(2, 1).reshape(self.shape) if gradients.form == "full" else matrix

    @functools.cached_property
    def jacobian(self) -> "JacobianOperator":
        """J: from parameters to outputs.

        Raises:
            ValueError: The kernel is a sum over outputs, J Jᵀ for no J of its shape.
        """
        if self._gradients.form in ("trace", "mean"):
            raise ValueError(f"jacobian: outputs={self._gradients.form!r} sums kernels of several; take outputs='full'")
        return JacobianOperator(self._gradients.in_rows())

    def _multiply(self, columns: Tensor) -> Tensor:
        gradients = self._gradients
        stacked = _stack(columns, gradients)  # (stacks, outputs of a stack, n, b)
        total = stacked.new_zeros(stacked.shape)
        for _, block in gradients.blocks():
            for stack, (given, out) in enumerate(zip(stacked, total, strict=True)):
                part = slice(stack, stack + 1) if len(stacked) > 1 else slice(None)
                if block.rows.shape[-1]:
                    rows = block.rows[part].flatten(0, 1)  # (outputs · n, width)
                    out += (rows @ (rows.mT @ given.flatten(0, 1))).view_as(out)
                for name, (a, b) in block.factors.items():
                    height = gradients.source.parameters[name].shape[0]
                    for few in column_chunks(given.shape[-1], b[part]):
                        pulled = backward_factors(a, b[part], given[..., few], height)
                        out[..., few] += forward_factors(a, b[part], pulled)
        return _unstack(total, gradients)

    def diagonal(self) -> Tensor:
        """H_ii (n,)."""
        gradients = self._gradients
        total = torch.zeros(gradients.source.classes, gradients.source.samples, dtype=self.dtype, device=self.device)
        with torch.no_grad(), full_precision():
            for _, block in gradients.blocks():
                if block.rows.shape[-1]:
                    total += block.rows.square().sum(-1)
                for a, b in block.factors.values():
                    total += squared_norms(a, b)
        if gradients.form == "full":
            return total.T.flatten()
        return total.mean(0) if gradients.form == "mean" else total.sum(0)

    def trace(self) -> float:
        """Σ_i H_ii."""
        return self.diagonal().double().sum().item()


class JacobianOperator(_Operator):
    """J of shape (outputs, parameters), the parameters flattened one after another; ``J.T`` is the other way.

    Attributes:
        shape: Of it.
        dtype: The model's.
        device: The model's.
    """

    def __init__(self, gradients: _Gradients, transposed: bool = False) -> None:
        self._gradients, self._transposed = gradients, transposed
        source = gradients.source
        shape = (source.samples * source.classes, gradients.count)
        self.shape = (shape[1], shape[0]) if transposed else shape
        self.dtype, self.device = gradients.dtype, gradients.device

    @property
    def T(self) -> "JacobianOperator":  # noqa: N802
        """The transpose."""
        return JacobianOperator(self._gradients, not self._transposed)

    def _multiply(self, columns: Tensor) -> Tensor:
        gradients = self._gradients
        source = gradients.source
        if not self._transposed:
            image = columns.new_zeros(source.classes, source.samples, columns.shape[1])
            for group, block in gradients.blocks():
                for inside, among_all in gradients.places(group):
                    image += block.rows[..., inside] @ columns[among_all]
            return image.movedim(0, 1).flatten(0, 1)
        given = columns.unflatten(0, (source.samples, source.classes)).movedim(1, 0).flatten(0, 1)
        image = columns.new_zeros(gradients.count, columns.shape[1])
        for group, block in gradients.blocks():
            for inside, among_all in gradients.places(group):
                image[among_all] = block.rows[..., inside].flatten(0, 1).mT @ given
        return image


def _stack(columns: Tensor, gradients: _Gradients) -> Tensor:
    """Columns as (stacks, outputs that one kernel couples, n, b)."""
    classes = gradients.source.classes
    if gradients.form == "full":
        return columns.unflatten(0, (-1, classes)).movedim(1, 0)[None]
    return columns.expand(classes, 1, *columns.shape)


def _unstack(total: Tensor, gradients: _Gradients) -> Tensor:
    if gradients.form == "full":
        return total[0].movedim(0, 1).flatten(0, 1)
    return total[:, 0].mean(0) if gradients.form == "mean" else total[:, 0].sum(0)
