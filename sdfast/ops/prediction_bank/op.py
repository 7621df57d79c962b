"""The private operation behind every loss on a prediction bank: its schema, its fake and its autograd.

`_prediction_bank` reads the rows, mixes the target, computes loss and gradient and writes the rows. It changes the bank
in place and its schema says so. In compiled code, which may not change a tensor within an `autograd.Function`, it
therefore stands outside of one that only carries the gradient that it has written; eager code runs it within.
"""

from typing import Any

import torch
from torch import Tensor

from sdfast import _checks
from sdfast.ops.prediction_bank.bank import BankRows, will_be_recomputed
from sdfast.ops.prediction_bank.description import LATE, UPDATE, BankDescription, packed
from sdfast.ops.prediction_bank.reference import prediction_bank_reference
from sdfast.ops.self_distillation.description import (
    REDUCTIONS,
    STATE_SIZE,
    WANT_GRADIENT,
    Description,
    Packed,
    accumulation_dtype,
    reduction_of,
    unpacked,
)
from sdfast.ops.self_distillation.op import refuse_double_backward, scaled

_SCHEMA = (
    "_prediction_bank{suffix}(Tensor logits, Tensor labels, Tensor? alpha, Tensor indices, Tensor(a!) predictions, "
    "Tensor(b!) classes, Tensor(c!) seen, Tensor(d!) claims, Tensor? class_weight, Tensor? row_weight, "
    "float alpha_value, int codes, int ignore_index, float[]? numbers, float momentum, float[]? regularisation) "
    "-> (Tensor loss, Tensor gradient, Tensor state)"  # the second line is `description.PackedBank`
)
_CODES = -5  # where `codes` stands among the arguments

library = torch.library.Library("sdfast", "FRAGMENT")  # outlives the operations: they end with it


def _fake(logits, *arguments):
    codes = arguments[_CODES]
    # What such a compiler makes of it reads, in the backward, rows that the forward has written already.
    if codes & UPDATE and "recompute" in torch.fx.traceback.current_meta:
        raise NotImplementedError(
            "rows: a PredictionBank is not written in an activation checkpoint that torch.compile compiles; put the "
            "loss outside of the checkpoint, or the checkpoint outside of the compiled function"
        )
    rows, classes = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    return (
        logits.new_empty((rows,) if reduction_of(codes) == REDUCTIONS["none"] else (), dtype=dtype),
        logits.new_empty(
            (rows, classes) if codes & WANT_GRADIENT else (0,), dtype=dtype if codes & LATE else logits.dtype
        ),
        logits.new_empty((STATE_SIZE,), dtype=dtype),
    )


for _suffix in ("", "_compiled", "_triton"):
    library.define(_SCHEMA.format(suffix=_suffix))
    torch.library.register_fake(f"sdfast::_prediction_bank{_suffix}", _fake)


def _triton_forward(*arguments):
    from sdfast.ops.prediction_bank import triton_impl  # triton is imported by its first call, never before

    return triton_impl.forward(*_without_update_if_recomputed(arguments))


def _native_forward(*arguments):
    return _NATIVE(*_without_update_if_recomputed(arguments))


def _without_update_if_recomputed(arguments):
    """What code that was compiled cannot know: whether a checkpoint around it will run it again."""
    if arguments[_CODES] & UPDATE and will_be_recomputed():
        return (*arguments[:_CODES], arguments[_CODES] & ~UPDATE, *arguments[_CODES + 1 :])
    return arguments


for _key in ("CPU", "CUDA", "XPU"):  # CPU tensors: in Triton's interpreter
    library.impl("_prediction_bank_triton", _triton_forward, _key)
for _key in ("CPU", "CUDA"):
    library.impl("_prediction_bank_compiled", _native_forward, _key)

# The same for the reference: a mask of all rows' writing.
library.define("_bank_is_written(Tensor seen) -> Tensor")
torch.library.register_fake("sdfast::_bank_is_written", lambda seen: seen.new_empty((), dtype=torch.bool))
library.impl(
    "_bank_is_written",
    lambda seen: seen.new_full((), not will_be_recomputed(), dtype=torch.bool),
    "CompositeExplicitAutograd",
)

_NATIVE = torch.ops.sdfast._prediction_bank.default
_COMPILED = torch.ops.sdfast._prediction_bank_compiled.default
_TRITON = torch.ops.sdfast._prediction_bank_triton.default
# In eager code past the Python part of an operation's call; compiled code wants the operations themselves.
_EAGER = {"cpu": _NATIVE._op, "cuda": _NATIVE._op, "triton": _TRITON._op}
_EXPORTED = {"cpu": _NATIVE, "cuda": _NATIVE, "triton": _TRITON}
_TRACED = {"cpu": _COMPILED, "cuda": _COMPILED, "triton": _TRITON}


class CarryGradient(torch.autograd.Function):
    """A loss whose gradient with respect to the logits is known already.

    With `late` it is not rounded to the logits' dtype yet, nor times the row's weight, nor divided by ``state[1]``, the
    mean's denominator: a factor is to come that must go in first, one a row without a reduction, or that of float16's
    loss scaler.
    """

    @staticmethod
    def forward(ctx, backend, logits, value, gradient, state, row_weight, late):
        """Keeps the gradient beside the value."""
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.dtype = backend, logits.dtype
        ctx.save_for_backward(*((gradient, state, row_weight) if late else (gradient, None, None)))
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        """The gradient times the upstream one."""
        return None, known_gradient(ctx, upstream), *(None,) * 5


class LossOnRows(torch.autograd.Function):
    """The operation with its gradient, in eager code: what `CarryGradient` saves, without a copy of the loss."""

    @staticmethod
    def forward(ctx, backend, logits, others, packed_arguments, late):
        """Runs the operation; `others` are its tensors after the logits."""
        value, gradient, state = _EAGER[backend](logits, *others, *packed_arguments)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.dtype = backend, logits.dtype
        ctx.save_for_backward(*((gradient, state, others[-1]) if late else (gradient, None, None)))
        ctx.mark_non_differentiable(state)
        return value, state

    @staticmethod
    def backward(ctx, upstream, _):
        """The gradient times the upstream one."""
        return None, known_gradient(ctx, upstream), None, None, None


def known_gradient(ctx: Any, upstream: Tensor | None) -> Tensor | None:
    """The saved gradient times the upstream one, rounded where it came late.

    The factor is put together as the plain loss's backward does it: a row with α = 1 has that loss's bits.
    """
    refuse_double_backward("a loss on a PredictionBank")
    if upstream is None:
        return None
    gradient, state, row_weight = ctx.saved_tensors  # read once: activation checkpointing unpacks them only once
    if state is None:
        return scaled(gradient, upstream, ctx.backend)
    factor = (upstream if row_weight is None else upstream * row_weight) / state[1]
    return (gradient * (factor[:, None] if factor.dim() else factor)).to(ctx.dtype)


_apply = super(torch.autograd.Function, LossOnRows).apply  # without the Python part, as self_distillation has it


def prediction_bank_loss(
    backend: str,
    logits: Tensor,  # (N, C)
    labels: Tensor,  # (N,) int64, or (N, C)
    alpha: Tensor | None,  # () or (N,)
    rows: BankRows,
    class_weight: Tensor | None,  # (C,)
    row_weight: Tensor | None,  # (N,)
    loss: Packed,
    strength: float = 0.0,
    clamp: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss, state) of the rows, the bank written where the handle says so."""
    bank = rows.describe(strength, clamp)
    indices = rows.indices
    if indices.dim() != 1 or indices.dtype is not torch.int64 or not indices.is_contiguous():
        indices = indices.reshape(-1).to(torch.int64).contiguous()
    storage = rows.bank.storage()
    if storage.sparse and backend == "cuda":
        raise NotImplementedError("backend='cuda': it has no kernel for a bank with top_k; leave backend=None")
    if backend == "reference":
        description = unpacked(*loss)
        check_indices(indices, labels, description, bank, len(storage.seen))
        value, state = prediction_bank_reference(
            logits, labels, alpha, indices, storage, class_weight, row_weight, description, bank
        )
    else:
        value, state = _native(backend, logits, labels, alpha, indices, storage, class_weight, row_weight, loss, bank)
    if bank.update:
        rows.written = True
    return value, state


def _native(
    backend, logits, labels, alpha, indices, storage, class_weight, row_weight, loss: Packed, bank: BankDescription,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wanted = logits.requires_grad and torch.is_grad_enabled()
    alpha_value, codes, ignore_index, numbers = loss
    if wanted:
        codes |= WANT_GRADIENT
    late = wanted and (reduction_of(codes) == REDUCTIONS["none"] or logits.dtype == torch.float16)
    others = (labels, alpha, indices, *storage, class_weight, row_weight)
    packed_arguments = packed((alpha_value, codes, ignore_index, numbers), bank, late)
    if not torch.compiler.is_compiling():
        if wanted:
            value, state = _apply(backend, logits, others, packed_arguments, late)
        else:
            value, _, state = _EAGER[backend](logits.detach(), *others, *packed_arguments)
        if bank.update:
            torch.autograd.graph.increment_version((storage.predictions, storage.classes, storage.seen))
        return value, state
    operations = _EXPORTED if torch.compiler.is_exporting() else _TRACED
    value, gradient, state = operations[backend](logits.detach(), *others, *packed_arguments)
    return (CarryGradient.apply(backend, logits, value, gradient, state, row_weight, late) if wanted else value), state


def check_indices(
    indices: Tensor, labels: Tensor, description: Description, bank: BankDescription, samples: int
) -> None:
    """The reference's check of the indices: on the CPU, where looking costs nothing."""
    if indices.device.type != "cpu" or torch.compiler.is_compiling():
        return
    kept = labels != description.ignore_index if labels.dim() == 1 else torch.ones_like(indices, dtype=torch.bool)
    row = _checks.first_row(((indices < 0) | (indices >= samples)) & kept)
    if row is not None:
        raise IndexError(f"indices: row {row} is {int(indices[row])}, wanted 0 <= index < {samples}")
    if bank.unique:
        first: dict[int, int] = {}
        for row in kept.nonzero()[:, 0].tolist():
            index = int(indices[row])
            if index in first:
                raise ValueError(f"indices: rows {first[index]} and {row} are both {index}, in a bank with unique=True")
            first[index] = row
