"""The private operations behind `linear_self_distillation_loss`: schemas, fakes and autograd.

Whole operations, so that a compiler sees no loop over chunks. `_linear_self_distillation` computes the gradients in the
forward when it is asked to, while it has a chunk's logits; `_linear_self_distillation_backward` makes the logits again,
for upstream gradients one a row. `_linear_count_correct` is the pass of its own that an adaptive α takes.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

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
from sdfast.ops.self_distillation import arguments
from sdfast.ops.self_distillation.description import (
    LOSSES,
    REDUCTIONS,
    STATE_SIZE,
    Description,
    accumulation_dtype,
    packed,
)
from sdfast.ops.self_distillation.op import OPERATIONS, gradient_from_inputs, refuse_double_backward, scaled
from sdfast.ops.self_distillation.reference import batch_accuracy

_CLASSIFIER = "Tensor hidden, Tensor weight, Tensor? bias"
_TENSORS = f"{_CLASSIFIER}, Tensor labels, Tensor? alpha, Tensor? class_weight, Tensor? row_weight"
_PLAN = "SymInt chunk, SymInt block, SymInt columns"
_WANTED = "bool want_hidden, bool want_weight, bool want_bias"

library = torch.library.Library("sdfast", "FRAGMENT")  # outlives the operations: they end with it
library.define(
    f"_linear_self_distillation(str backend, {_TENSORS}, float alpha_value, int label_fn, float label_parameter, "
    f"int loss, int reduction, int ignore_index, float label_smoothing, {_PLAN}, {_WANTED}, bool want_stats) "
    "-> (Tensor loss, Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor state)"
)
library.define(
    f"_linear_self_distillation_backward(str backend, Tensor upstream, Tensor state, {_TENSORS}, float alpha_value, "
    f"int label_fn, float label_parameter, int loss, int reduction, int ignore_index, float label_smoothing, {_PLAN}, "
    f"{_WANTED}) -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)"
)
library.define(f"_linear_count_correct({_CLASSIFIER}, Tensor labels, int ignore_index, {_PLAN}) -> Tensor counts")


@torch.library.register_fake("sdfast::_linear_self_distillation")
def _fake_forward(
    backend, hidden, weight, bias, labels, alpha, class_weight, row_weight, alpha_value, label_fn, label_parameter,
    loss, reduction, ignore_index, label_smoothing, chunk, block, columns, want_hidden, want_weight, want_bias,
    want_stats,
):  # fmt: skip
    dtype = accumulation_dtype(hidden.dtype)
    value = hidden.new_empty(hidden.shape[:1] if reduction == REDUCTIONS["none"] else (), dtype=dtype)
    gradients = fake_gradients(hidden, weight, bias, (want_hidden, want_weight, want_bias))
    return (value, *gradients, hidden.new_empty((STATE_SIZE,), dtype=dtype))


@torch.library.register_fake("sdfast::_linear_self_distillation_backward")
def _fake_backward(backend, upstream, state, hidden, weight, bias, *rest):
    return fake_gradients(hidden, weight, bias, rest[-3:])


@torch.library.register_fake("sdfast::_linear_count_correct")
def _fake_count(hidden, *_):
    return hidden.new_empty((2,), dtype=accumulation_dtype(hidden.dtype))


def _kernel(backend: str, which: str, part: Tensor) -> Callable:
    """The loss's operation; Triton's launcher writes the gradient over the logits themselves."""
    if backend != "triton":
        return getattr(OPERATIONS[backend], which)
    from sdfast.ops.self_distillation import triton_impl  # triton is imported by its first call, never before

    return partial(getattr(triton_impl, which), into=part)


def _forward(
    backend, hidden, weight, bias, labels, alpha, class_weight, row_weight, alpha_value, label_fn, label_parameter,
    loss, reduction, ignore_index, label_smoothing, chunk, block, columns, want_hidden, want_weight, want_bias,
    want_stats,
):  # fmt: skip
    classifier = Classifier(hidden, weight, bias).detached()
    wanted = (want_hidden, want_weight, want_bias)
    of_all = "mse" if loss == LOSSES["mse"] else "cross_entropy"
    arguments.check_values(labels, alpha, weight.t(), of_all, ignore_index)  # of all rows: the right one is named
    divisor = denominator(labels, class_weight, reduction, ignore_index, hidden)
    if reduction == REDUCTIONS["mean"]:
        row_weight = row_factors(row_weight, divisor, len(hidden))
    each = REDUCTIONS["none" if reduction == REDUCTIONS["none"] else "sum"]
    description = Description(alpha_value, False, label_fn, label_parameter, loss, each, ignore_index, label_smoothing)
    value = divisor.new_zeros((len(hidden),) if each == REDUCTIONS["none"] else (), dtype=torch.float64)
    statistics = divisor.new_zeros((STATE_SIZE,), dtype=torch.float64)
    gradients = Gradients(classifier, wanted) if any(wanted) else None

    def of_block(rows, logits):
        losses, gradient, state = _kernel(backend, "forward", logits)(
            logits, labels[rows], rows_of(alpha, rows), None, class_weight, rows_of(row_weight, rows),
            *packed(description, any(wanted), want_stats),
        )  # fmt: skip
        into = value[rows] if value.dim() else value
        into += losses
        if want_stats:
            statistics.add_(state * (labels[rows] != ignore_index).sum())
        return gradient

    sweep([classifier], Plan(chunk, block, columns), of_block, gradients)
    if want_stats:
        statistics /= (labels != ignore_index).sum().clamp(min=1)
        if alpha is None or alpha.dim() == 0:
            statistics[0] = alpha_value if alpha is None else alpha
    statistics[1] = 1  # the row weights have divided already
    real = divisor.dtype
    made = Gradients(classifier, (False,) * 3) if gradients is None else gradients
    return (value.to(real), *made.finished(), statistics.to(real))


def _backward(
    backend, upstream, state, hidden, weight, bias, labels, alpha, class_weight, row_weight, alpha_value, label_fn,
    label_parameter, loss, reduction, ignore_index, label_smoothing, chunk, block, columns, want_hidden, want_weight,
    want_bias,
):  # fmt: skip
    classifier = Classifier(hidden, weight, bias).detached()
    gradients = Gradients(classifier, (want_hidden, want_weight, want_bias))
    if reduction == REDUCTIONS["mean"]:
        divisor = denominator(labels, class_weight, reduction, ignore_index, hidden)
        row_weight = row_factors(row_weight, divisor, len(hidden))
    description = Description(
        alpha_value, False, label_fn, label_parameter, loss, REDUCTIONS["none"], ignore_index, label_smoothing
    )

    def of_block(rows, logits):
        saved = (state, logits, labels[rows], rows_of(alpha, rows), None, class_weight, rows_of(row_weight, rows))
        operations = OPERATIONS[backend]._replace(backward=_kernel(backend, "backward", logits))
        of_rows = upstream[rows] if upstream.dim() else upstream
        return gradient_from_inputs(operations, of_rows, saved, packed(description))

    sweep([classifier], Plan(chunk, block, columns), of_block, gradients)
    return gradients.finished()


def _count_correct(hidden, weight, bias, labels, ignore_index, chunk, block, columns):
    classifier = Classifier(hidden, weight, bias).detached()
    counts = hidden.new_zeros((2,), dtype=accumulation_dtype(hidden.dtype))

    def of_block(rows, logits):
        counts.add_(torch.stack(batch_accuracy(logits, labels[rows], ignore_index)))

    # In parts of a chunk on a GPU too: looking for NaN takes a byte an entry.
    sweep([classifier], Plan(chunk, block or max(1, chunk // 8), columns), of_block, None)
    return counts


for _key in ("CPU", "CUDA", "XPU"):
    library.impl("_linear_self_distillation", _forward, _key)
    library.impl("_linear_self_distillation_backward", _backward, _key)
    library.impl("_linear_count_correct", _count_correct, _key)


class LinearSelfDistillation(torch.autograd.Function):
    """(loss, state) of the rows of (N, H) hidden states under a classifier; the state carries no gradient."""

    @staticmethod
    def forward(ctx, backend, hidden, weight, bias, labels, alpha, class_weight, row_weight, description, plan, stats):
        """Computes the loss, and the gradients too where they are wanted and reduced."""
        d = description
        wanted = tuple(ctx.needs_input_grad[1:4])
        # A loss scaler's factor must come before the rounding to float16, so those wait for it.
        now = any(wanted) and d.reduction != REDUCTIONS["none"] and hidden.dtype != torch.float16
        value, *gradients, state = torch.ops.sdfast._linear_self_distillation(
            backend, hidden, weight, bias, labels, alpha, class_weight, row_weight, d.alpha_value, d.label_fn,
            d.label_parameter, d.loss, d.reduction, d.ignore_index, d.label_smoothing, *plan,
            *(wanted if now else (False,) * 3), stats,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(state)
        ctx.backend, ctx.now, ctx.description, ctx.plan = backend, now, description, plan
        if now:
            ctx.save_for_backward(*gradients)
        elif any(wanted):
            ctx.save_for_backward(state, hidden, weight, bias, labels, alpha, class_weight, row_weight)
        return value, state

    @staticmethod
    def backward(ctx, upstream, _=None):
        """Scales the gradients of the forward, or computes them from the saved inputs."""
        refuse_double_backward("linear_self_distillation_loss")
        if upstream is None:
            return (None,) * 11
        wanted = tuple(ctx.needs_input_grad[1:4])
        saved = ctx.saved_tensors  # read once: activation checkpointing unpacks them only once
        if ctx.now:
            gradients = [scaled(gradient, upstream, ctx.backend) for gradient in saved]
        else:
            gradients = _gradients_from_inputs(ctx.backend, upstream, saved, ctx.description, ctx.plan, wanted)
        return (None, *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * 7)


def _gradients_from_inputs(backend: str, upstream: Tensor, saved: tuple, d: Description, plan: Plan, wanted: tuple):
    state, *tensors = saved
    return torch.ops.sdfast._linear_self_distillation_backward(
        backend, upstream, state, *tensors, d.alpha_value, d.label_fn, d.label_parameter, d.loss, d.reduction,
        d.ignore_index, d.label_smoothing, *plan, *wanted,
    )  # fmt: skip
