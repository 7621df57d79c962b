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

# The `state` output: (alpha, denominator, accuracy, target entropy, agreement), what the backward and the statistics
# need of the batch; without statistics only the first two are defined. The CPU leaves it empty where nobody needs it.
STATE_SIZE = 5

_TENSORS = "Tensor logits, Tensor labels, Tensor? alpha, Tensor? source, Tensor? class_weight, Tensor? row_weight"
_SCHEMAS = (
    f"_self_distillation{{suffix}}({_TENSORS}, float alpha_value, bool adaptive, int label_fn, float label_parameter, "
    "int loss, int reduction, int ignore_index, float label_smoothing, bool want_gradient, bool want_stats) "
    "-> (Tensor loss, Tensor gradient, Tensor state)",
    f"_self_distillation_backward{{suffix}}(Tensor upstream, Tensor state, {_TENSORS}, float alpha_value, "
    "int label_fn, float label_parameter, int loss, int ignore_index, float label_smoothing) -> Tensor gradient",
    # On a GPU, where the host does not know the upstream gradient: leaves at once if that is 1.
    "_scale_in_place{suffix}(Tensor(a!) gradient, Tensor upstream) -> ()",
)

library = torch.library.Library("sdfast", "FRAGMENT")  # outlives the operations: they end with it
for _suffix in ("", "_triton"):
    for _schema in _SCHEMAS:
        library.define(_schema.format(suffix=_suffix))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums, losses and weights have for logits of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_forward(native):
    def fake(
        logits, labels, alpha, source, class_weight, row_weight, alpha_value, adaptive, label_fn, label_parameter,
        loss, reduction, ignore_index, label_smoothing, want_gradient, want_stats,
    ):  # fmt: skip
        rows, classes = logits.shape
        dtype = accumulation_dtype(logits.dtype)
        stateless = native and logits.device.type == "cpu" and want_gradient and not want_stats
        return (
            logits.new_empty((rows,) if reduction == REDUCTIONS["none"] else (), dtype=dtype),
            logits.new_empty((rows, classes) if want_gradient else (0,)),
            logits.new_empty((0 if stateless else STATE_SIZE,), dtype=dtype),
        )

    return fake


for _suffix in ("", "_triton"):
    torch.library.register_fake(f"sdfast::_self_distillation{_suffix}", _fake_forward(native=not _suffix))
    torch.library.register_fake(
        f"sdfast::_self_distillation_backward{_suffix}", lambda upstream, state, logits, *_: torch.empty_like(logits)
    )
    torch.library.register_fake(f"sdfast::_scale_in_place{_suffix}", lambda gradient, upstream: None)


def _triton_forward(*arguments):
    from sdfast.ops.self_distillation import triton_impl  # triton is imported by its first call, never before

    return triton_impl.forward(*arguments)


def _triton_backward(*arguments):
    from sdfast.ops.self_distillation import triton_impl

    return triton_impl.backward(*arguments)


def _triton_scale_in_place(gradient, upstream):
    from sdfast.ops.self_distillation import triton_impl

    triton_impl.scale_in_place(gradient, upstream)


for _key in ("CPU", "CUDA", "XPU"):  # CPU tensors: in Triton's interpreter
    library.impl("_self_distillation_triton", _triton_forward, _key)
    library.impl("_self_distillation_backward_triton", _triton_backward, _key)
    library.impl("_scale_in_place_triton", _triton_scale_in_place, _key)


class _Operations(NamedTuple):
    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload
    scale_in_place: torch._ops.OpOverload


_NATIVE = _Operations(
    torch.ops.sdfast._self_distillation.default,
    torch.ops.sdfast._self_distillation_backward.default,
    torch.ops.sdfast._scale_in_place.default,
)
_TRITON = _Operations(
    torch.ops.sdfast._self_distillation_triton.default,
    torch.ops.sdfast._self_distillation_backward_triton.default,
    torch.ops.sdfast._scale_in_place_triton.default,
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
        # Compiled code cannot look at the upstream gradient. A GPU folds it in by computing the gradient in the
        # backward, which moves fewer bytes than a pass to scale it; a CPU is bound by the exponentials, and scales.
        now = wanted and description.reduction != REDUCTIONS["none"]
        now = now and (backend == "cpu" or not torch.compiler.is_compiling())
        value, gradient, state = _OPERATIONS[backend].forward(
            logits, labels, alpha, source, class_weight, row_weight, *description, now, want_stats
        )
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        if now and backend == "cpu":
            ctx.save_for_backward(gradient)
        elif wanted:
            # Not saved through autograd: the first backward gives it away, a later one computes it again.
            ctx.gradient = gradient if now else None
            ctx.description = description
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
            return (None,) * 9
        saved = ctx.saved_tensors  # read once: activation checkpointing unpacks them only once
        if len(saved) == 1:
            # A copy where it must be scaled: another backward may follow.
            plain = not torch.compiler.is_compiling() and upstream.item() == 1
            gradient = saved[0] if plain else saved[0] * upstream.to(saved[0].dtype)
        elif ctx.gradient is not None:
            gradient, ctx.gradient = ctx.gradient, None
            _OPERATIONS[ctx.backend].scale_in_place(gradient, upstream)
        else:
            gradient = _gradient_from_inputs(_OPERATIONS[ctx.backend], upstream, saved, ctx.description)
        return None, gradient, None, None, None, None, None, None, None


# `Function.apply` without its Python part, which looks for functorch wrappers in every argument (2.4 µs a call): under
# a functorch transform the reference runs instead. Compiled code wants `apply` itself.
_apply = super(torch.autograd.Function, SelfDistillation).apply


def self_distillation(*arguments):
    """The rows' loss; with `want_stats` the pair (loss, state). Arguments as `SelfDistillation.forward` has them."""
    return SelfDistillation.apply(*arguments) if torch.compiler.is_compiling() else _apply(*arguments)


def _gradient_from_inputs(operations: _Operations, upstream: Tensor, saved: tuple, d: Description) -> Tensor:
    state, logits, labels, alpha, source, class_weight, row_weight = saved
    return operations.backward(
        upstream, state, logits, labels, state[0] if d.adaptive else alpha, source, class_weight, row_weight,
        d.alpha_value, d.label_fn, d.label_parameter, d.loss, d.ignore_index, d.label_smoothing,
    )  # fmt: skip
