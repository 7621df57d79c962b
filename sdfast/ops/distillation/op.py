"""The private operations behind `distillation_loss`: schemas, fakes and autograd.

`_distillation` writes the gradient in the forward when it is asked to; `_distillation_backward` computes it from the
inputs again, for any upstream gradient. Both take the same description of the loss, in this order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdfast.ops.distillation.description import REDUCTIONS, STATE_SIZE, Description
from sdfast.ops.self_distillation.description import accumulation_dtype
from sdfast.ops.self_distillation.op import refuse_double_backward, scaled, writes_gradient_early

_TENSORS = (
    "Tensor logits, Tensor teacher, Tensor? indices, Tensor? tail, Tensor? labels, Tensor? alpha, Tensor? row_weight"
)
_LOSS = "float alpha_value, float temperature, float teacher_temperature, int divergence, int teacher_form"
_SCHEMAS = (
    f"_distillation{{suffix}}({_TENSORS}, {_LOSS}, int reduction, int ignore_index, float label_smoothing, "
    "bool want_gradient) -> (Tensor loss, Tensor gradient, Tensor state)",
    f"_distillation_backward{{suffix}}(Tensor upstream, Tensor state, {_TENSORS}, {_LOSS}, int ignore_index, "
    "float label_smoothing) -> Tensor gradient",
)

library = torch.library.Library("sdfast", "FRAGMENT")  # outlives the operations: they end with it
for _suffix in ("", "_triton"):
    for _schema in _SCHEMAS:
        library.define(_schema.format(suffix=_suffix))


def _fake_forward(
    logits, teacher, indices, tail, labels, alpha, row_weight, alpha_value, temperature, teacher_temperature,
    divergence, teacher_form, reduction, ignore_index, label_smoothing, want_gradient,
):  # fmt: skip
    rows, classes = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    return (
        logits.new_empty((rows,) if reduction == REDUCTIONS["none"] else (), dtype=dtype),
        logits.new_empty((rows, classes) if want_gradient else (0,)),
        logits.new_empty((0,) if want_gradient else (STATE_SIZE,), dtype=dtype),
    )


for _suffix in ("", "_triton"):
    torch.library.register_fake(f"sdfast::_distillation{_suffix}", _fake_forward)
    torch.library.register_fake(
        f"sdfast::_distillation_backward{_suffix}", lambda upstream, state, logits, *_: logits.new_empty(logits.shape)
    )


def _triton_forward(*arguments):
    from sdfast.ops.distillation import triton_impl  # triton is imported by its first call, never before

    return triton_impl.forward(*arguments)


def _triton_backward(*arguments):
    from sdfast.ops.distillation import triton_impl

    return triton_impl.backward(*arguments)


for _key in ("CPU", "CUDA", "XPU"):  # CPU tensors: in Triton's interpreter
    library.impl("_distillation_triton", _triton_forward, _key)
    library.impl("_distillation_backward_triton", _triton_backward, _key)


class Operations(NamedTuple):
    """The two operations of a backend."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


OPERATIONS = {
    "cpu": Operations(torch.ops.sdfast._distillation.default, torch.ops.sdfast._distillation_backward.default),
    "triton": Operations(
        torch.ops.sdfast._distillation_triton.default, torch.ops.sdfast._distillation_backward_triton.default
    ),
}


class Distillation(torch.autograd.Function):
    """Loss of the rows of (N, C) logits. As in `SelfDistillation`, `forward` takes `ctx` itself."""

    @staticmethod
    def forward(ctx, backend, logits, teacher, indices, tail, labels, alpha, row_weight, description):
        """Computes the loss, and the gradient too where it is wanted and reduced."""
        wanted = ctx.needs_input_grad[1]
        now = wanted and writes_gradient_early(backend, logits.dtype, description.reduction)
        value, gradient, state = OPERATIONS[backend].forward(
            logits, teacher, indices, tail, labels, alpha, row_weight, *description, now
        )
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        if now:
            ctx.save_for_backward(gradient)
        elif wanted:
            ctx.description = description
            ctx.save_for_backward(state, logits, teacher, indices, tail, labels, alpha, row_weight)
        return value

    @staticmethod
    def backward(ctx, upstream):
        """Scales the gradient of the forward, or computes it from the saved inputs."""
        refuse_double_backward("distillation_loss")
        if upstream is None:
            return (None,) * 9
        saved = ctx.saved_tensors  # read once: activation checkpointing unpacks them only once
        if len(saved) == 1:
            gradient = scaled(saved[0], upstream, ctx.backend)
        else:
            gradient = gradient_from_inputs(OPERATIONS[ctx.backend], upstream, saved, ctx.description)
        return None, gradient, None, None, None, None, None, None, None


# `Function.apply` without its Python part, as for `SelfDistillation`.
_apply = super(torch.autograd.Function, Distillation).apply


def distillation(*arguments) -> Tensor:
    """The rows' loss. Arguments as `Distillation.forward` has them."""
    return Distillation.apply(*arguments) if torch.compiler.is_compiling() else _apply(*arguments)


def gradient_from_inputs(operations: Operations, upstream: Tensor, saved: tuple, d: Description) -> Tensor:
    """The gradient for any upstream gradient; `saved` is the state and the seven tensors of the loss."""
    state, *tensors = saved
    return operations.backward(
        upstream, state, *tensors, d.alpha_value, d.temperature, d.teacher_temperature, d.divergence, d.teacher_form,
        d.ignore_index, d.label_smoothing,
    )  # fmt: skip
