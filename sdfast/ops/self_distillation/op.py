"""The private operations behind `self_distillation_loss`: schemas, fakes and autograd.

`_self_distillation` writes the gradient in the forward when it is asked to; `_self_distillation_backward` computes it
from the inputs again, for any upstream gradient. Both take the same description of the loss, in this order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LABEL_FUNCTIONS = {"softmax": 0, "hardmax": 1, "identity": 2, "clip": 3}
LOSSES = {"cross_entropy": 0, "kl": 1, "mse": 2, "brier": 3}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

# The `state` output: (alpha, denominator, accuracy, target entropy, agreement); empty where nobody needs it.
STATE_SIZE = 5

_TENSORS = "Tensor logits, Tensor labels, Tensor? alpha, Tensor? source, Tensor? class_weight, Tensor? row_weight"
_SCHEMAS = (
    f"_self_distillation{{suffix}}({_TENSORS}, float alpha_value, bool adaptive, int label_fn, float label_parameter, "
    "int loss, int reduction, int ignore_index, float label_smoothing, bool want_gradient, bool want_stats) "
    "-> (Tensor loss, Tensor gradient, Tensor state)",
    f"_self_distillation_backward{{suffix}}(Tensor upstream, Tensor state, {_TENSORS}, float alpha_value, "
    "int label_fn, float label_parameter, int loss, int ignore_index, float label_smoothing) -> Tensor gradient",
)

library = torch.library.Library("sdfast", "FRAGMENT")  # outlives the operations: they end with it
for _suffix in ("", "_triton"):
    for _schema in _SCHEMAS:
        library.define(_schema.format(suffix=_suffix))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums, losses and weights have for logits of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_forward(
    logits, labels, alpha, source, class_weight, row_weight, alpha_value, adaptive, label_fn, label_parameter, loss,
    reduction, ignore_index, label_smoothing, want_gradient, want_stats,
):  # fmt: skip
    rows, classes = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    return (
        logits.new_empty((rows,) if reduction == REDUCTIONS["none"] else (), dtype=dtype),
        logits.new_empty((rows, classes) if want_gradient else (0,)),
        logits.new_empty((STATE_SIZE,) if want_stats or not want_gradient else (0,), dtype=dtype),
    )


def _fake_backward(upstream, state, logits, *description):
    return logits.new_empty(logits.shape)


for _suffix in ("", "_triton"):
    torch.library.register_fake(f"sdfast::_self_distillation{_suffix}", _fake_forward)
    torch.library.register_fake(f"sdfast::_self_distillation_backward{_suffix}", _fake_backward)


def _triton_forward(*arguments):
    from sdfast.ops.self_distillation import triton_impl  # triton is imported by its first call, never before

    return triton_impl.forward(*arguments)


def _triton_backward(*arguments):
    from sdfast.ops.self_distillation import triton_impl

    return triton_impl.backward(*arguments)


for _key in ("CPU", "CUDA", "XPU"):  # CPU tensors: in Triton's interpreter
    library.impl("_self_distillation_triton", _triton_forward, _key)
    library.impl("_self_distillation_backward_triton", _triton_backward, _key)

_NATIVE = (torch.ops.sdfast._self_distillation.default, torch.ops.sdfast._self_distillation_backward.default)
_TRITON = (
    torch.ops.sdfast._self_distillation_triton.default,
    torch.ops.sdfast._self_distillation_backward_triton.default,
)
_OPERATIONS = {"cpu": _NATIVE, "cuda": _NATIVE, "triton": _TRITON}


class Description(NamedTuple):
    """What a call fixes for all rows, as the operations take it."""

    alpha_value: float
    adaptive: bool
    label_fn: int
    label_parameter: float
    loss: int
    reduction: int
    ignore_index: int
    label_smoothing: float


class SelfDistillation(torch.autograd.Function):
    """Loss of the rows of (N, C) logits; with `want_stats` also the state, which carries no gradient.

    `forward` takes `ctx` itself: a separate `setup_context` makes every call inspect signatures, and costs more than
    the kernel at 128 x 10.
    """

    @staticmethod
    def forward(ctx, backend, logits, labels, alpha, source, class_weight, row_weight, description, want_stats):
        """Computes the loss, and the gradient too where it is wanted and reduced."""
        wanted = ctx.needs_input_grad[1]
        # Compiled code cannot look at the upstream gradient, and folds it in by computing the gradient in the backward.
        now = wanted and description.reduction != REDUCTIONS["none"] and not torch.compiler.is_compiling()
        value, gradient, state = _OPERATIONS[backend][0](
            logits, labels, alpha, source, class_weight, row_weight, *description, now, want_stats
        )
        ctx.set_materialize_grads(False)
        if now:
            ctx.description = None
            ctx.save_for_backward(gradient)
        elif wanted:
            ctx.backend, ctx.description = backend, description
            ctx.save_for_backward(state, logits, labels, alpha, source, class_weight, row_weight)
        if not want_stats:
            return value
        ctx.mark_non_differentiable(state)
        return value, state

    @staticmethod
    def backward(ctx, upstream, _=None):
        """Scales the gradient of the forward, or computes it from the saved inputs."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "self_distillation_loss: its native backends have no second derivative; pass backend='reference' to "
                "differentiate the gradient (create_graph=True)"
            )
        if upstream is None:
            gradient = None
        elif ctx.description is None:
            gradient = _scaled(ctx.saved_tensors[0], upstream)
        else:
            state, logits, labels, alpha, source, class_weight, row_weight = ctx.saved_tensors
            d = ctx.description
            gradient = _OPERATIONS[ctx.backend][1](
                upstream, state, logits, labels, state[0] if d.adaptive else alpha, source, class_weight, row_weight,
                d.alpha_value, d.label_fn, d.label_parameter, d.loss, d.ignore_index, d.label_smoothing,
            )  # fmt: skip
        return None, gradient, None, None, None, None, None, None, None


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """`gradient` times the 0-d `upstream`; the very tensor where that is 1, as after a plain ``loss.backward()``."""
    if upstream.device.type == "cpu" and upstream.item() == 1.0:
        return gradient
    return gradient * upstream.to(gradient.dtype)
