"""The private operations behind `linear_distillation_loss`: schemas, fakes and autograd.

As those of the linear self-distillation loss, with a second buffer for the teacher's logits of a chunk.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sdfast.ops.distillation.arguments import TeacherRows, check_values
from sdfast.ops.distillation.description import REDUCTIONS, STATE_SIZE, TEACHER_FORMS, Description
from sdfast.ops.distillation.op import OPERATIONS, gradient_from_inputs
from sdfast.ops.linear_chunks import (
    Classifier,
    Gradients,
    Plan,
    denominator,
    fake_gradients,
    row_factors,
    rows_of,
    sweep,
)
from sdfast.ops.self_distillation.description import accumulation_dtype
from sdfast.ops.self_distillation.op import refuse_double_backward, scaled

_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, "
    "Tensor? labels, Tensor? alpha, Tensor? row_weight"
)
_LOSS = (
    "float alpha_value, float temperature, float teacher_temperature, int divergence, int reduction, int ignore_index, "
    "float label_smoothing, SymInt chunk, SymInt block, SymInt columns, bool want_hidden, bool want_weight, "
    "bool want_bias"
)

library = torch.library.Library("sdfast", "FRAGMENT")  # outlives the operations: they end with it
library.define(
    f"_linear_distillation(str backend, {_TENSORS}, {_LOSS}) "
    "-> (Tensor loss, Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor state)"
)
library.define(
    f"_linear_distillation_backward(str backend, Tensor upstream, Tensor state, {_TENSORS}, {_LOSS}) "
    "-> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)"
)


@torch.library.register_fake("sdfast::_linear_distillation_backward")
def _fake_backward(backend, upstream, state, hidden, weight, bias, *rest):
    return fake_gradients(hidden, weight, bias, rest[-3:])


@torch.library.register_fake("sdfast::_linear_distillation")
def _fake_forward(backend, hidden, weight, bias, *rest):
    dtype = accumulation_dtype(hidden.dtype)
    reduction = rest[-9]
    value = hidden.new_empty(hidden.shape[:1] if reduction == REDUCTIONS["none"] else (), dtype=dtype)
    gradients = _fake_backward(backend, None, None, hidden, weight, bias, *rest)
    return (value, *gradients, hidden.new_empty((STATE_SIZE,), dtype=dtype))


def _kernel(backend: str, which: str, part: Tensor) -> Callable:
    """The loss's operation; Triton's launcher writes the gradient over the logits themselves."""
    if backend != "triton":
        return getattr(OPERATIONS[backend], which)
    from sdfast.ops.distillation import triton_impl  # triton is imported by its first call, never before

    return partial(getattr(triton_impl, which), into=part)


def _forward(
    backend, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels, alpha, row_weight, alpha_value,
    temperature, teacher_temperature, divergence, reduction, ignore_index, label_smoothing, chunk, block, columns,
    want_hidden, want_weight, want_bias,
):  # fmt: skip
    student = Classifier(hidden, weight, bias).detached()
    teacher = Classifier(teacher_hidden, teacher_weight, teacher_bias).detached()
    wanted = (want_hidden, want_weight, want_bias)
    form = TEACHER_FORMS["logits"]
    check_values(labels, alpha, TeacherRows(form, weight), weight.t(), ignore_index)  # of all rows: names the right one
    divisor = denominator(labels, None, reduction, ignore_index, hidden)
    if reduction == REDUCTIONS["mean"]:
        row_weight = row_factors(row_weight, divisor, len(hidden))
    each = REDUCTIONS["none" if reduction == REDUCTIONS["none"] else "sum"]
    description = Description(
        alpha_value, temperature, teacher_temperature, divergence, form, each, ignore_index, label_smoothing
    )
    value = divisor.new_zeros((len(hidden),) if each == REDUCTIONS["none"] else (), dtype=torch.float64)
    gradients = Gradients(student, wanted) if any(wanted) else None

    def of_block(rows, logits, teacher_logits):
        losses, gradient, _ = _kernel(backend, "forward", logits)(
            logits, teacher_logits, None, None, rows_of(labels, rows), rows_of(alpha, rows), rows_of(row_weight, rows),
            *description, any(wanted),
        )  # fmt: skip
        into = value[rows] if value.dim() else value
        into += losses
        return gradient

    sweep([student, teacher], Plan(chunk, block, columns), of_block, gradients)
    real = divisor.dtype
    made = Gradients(student, (False,) * 3) if gradients is None else gradients
    return (value.to(real), *made.finished(), divisor.new_ones((STATE_SIZE,)))


def _backward(
    backend, upstream, state, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels, alpha,
    row_weight, alpha_value, temperature, teacher_temperature, divergence, reduction, ignore_index, label_smoothing,
    chunk, block, columns, want_hidden, want_weight, want_bias,
):  # fmt: skip
    student = Classifier(hidden, weight, bias).detached()
    teacher = Classifier(teacher_hidden, teacher_weight, teacher_bias).detached()
    gradients = Gradients(student, (want_hidden, want_weight, want_bias))
    if reduction == REDUCTIONS["mean"]:
        row_weight = row_factors(row_weight, denominator(labels, None, reduction, ignore_index, hidden), len(hidden))
    form, each = TEACHER_FORMS["logits"], REDUCTIONS["none"]
    description = Description(
        alpha_value, temperature, teacher_temperature, divergence, form, each, ignore_index, label_smoothing
    )

    def of_block(rows, logits, teacher_logits):
        a_row = (rows_of(t, rows) for t in (labels, alpha, row_weight))
        saved = (state, logits, teacher_logits, None, None, *a_row)
        operations = OPERATIONS[backend]._replace(backward=_kernel(backend, "backward", logits))
        of_rows = upstream[rows] if upstream.dim() else upstream
        return gradient_from_inputs(operations, of_rows, saved, description)

    sweep([student, teacher], Plan(chunk, block, columns), of_block, gradients)
    return gradients.finished()


for _key in ("CPU", "CUDA", "XPU"):
    library.impl("_linear_distillation", _forward, _key)
    library.impl("_linear_distillation_backward", _backward, _key)


class LinearDistillation(torch.autograd.Function):
    """Loss of the rows of a student's (N, H) hidden states against a teacher's."""

    @staticmethod
    def forward(
        ctx, backend, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels, alpha, row_weight,
        description, plan,
    ):  # fmt: skip
        """Computes the loss, and the gradients too where they are wanted and reduced."""
        d = description
        wanted = tuple(ctx.needs_input_grad[1:4])
        # A loss scaler's factor must come before the rounding to float16, so those wait for it.
        now = any(wanted) and d.reduction != REDUCTIONS["none"] and hidden.dtype != torch.float16
        tensors = (
            hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels, alpha, row_weight,
        )  # fmt: skip
        value, *gradients, state = torch.ops.sdfast._linear_distillation(
            backend, *tensors, d.alpha_value, d.temperature, d.teacher_temperature, d.divergence, d.reduction,
            d.ignore_index, d.label_smoothing, *plan, *(wanted if now else (False,) * 3),
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.now, ctx.description, ctx.plan = backend, now, description, plan
        if now:
            ctx.save_for_backward(*gradients)
        elif any(wanted):
            ctx.save_for_backward(state, *tensors)
        return value

    @staticmethod
    def backward(ctx, upstream):
        """Scales the gradients of the forward, or computes them from the saved inputs."""
        refuse_double_backward("linear_distillation_loss")
        if upstream is None:
            return (None,) * 12
        wanted = tuple(ctx.needs_input_grad[1:4])
        saved = ctx.saved_tensors  # read once: activation checkpointing unpacks them only once
        if ctx.now:
            gradients = [scaled(gradient, upstream, ctx.backend) for gradient in saved]
        else:
            d = ctx.description
            state, *tensors = saved
            gradients = torch.ops.sdfast._linear_distillation_backward(
                ctx.backend, upstream, state, *tensors, d.alpha_value, d.temperature, d.teacher_temperature,
                d.divergence, d.reduction, d.ignore_index, d.label_smoothing, *ctx.plan, *wanted,
            )  # fmt: skip
        return (None, *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * 8)
