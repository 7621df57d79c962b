"""The private operations behind `self_distillation_loss`: schemas, fakes and autograd.

`_self_distillation` writes the gradient in the forward when it is asked to; `_self_distillation_backward` computes it
from the inputs again, for any upstream gradient. Both take the same description of the loss, in this order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdfast.ops.self_distillation.description import (
    ADAPTIVE,
    REDUCTIONS,
    STATE_SIZE,
    WANT_GRADIENT,
    WANT_STATS,
    Packed,
    accumulation_dtype,
    reduction_of,
)

_TENSORS = "Tensor logits, Tensor labels, Tensor? alpha, Tensor? source, Tensor? class_weight, Tensor? row_weight"
_DESCRIPTION = "float alpha_value, int codes, int ignore_index, float[]? numbers"  # `description.Packed`
_SCHEMAS = (
    f"_self_distillation{{suffix}}({_TENSORS}, {_DESCRIPTION}) -> (Tensor loss, Tensor gradient, Tensor state)",
    f"_self_distillation_backward{{suffix}}(Tensor upstream, Tensor state, {_TENSORS}, {_DESCRIPTION}) "
    "-> Tensor gradient",
    # On a GPU, where the host does not know the upstream gradient: leaves at once if that is 1.
    "_scale_in_place{suffix}(Tensor(a!) gradient, Tensor upstream) -> ()",
)

library = torch.library.Library("sdfast", "FRAGMENT")  # outlives the operations: they end with it
for _suffix in ("", "_triton"):
    for _schema in _SCHEMAS:
        library.define(_schema.format(suffix=_suffix))


def _fake_forward(logits, labels, alpha, source, class_weight, row_weight, alpha_value, codes, ignore_index, numbers):
    rows, classes = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    want_state = codes & WANT_STATS or not codes & WANT_GRADIENT
    return (
        logits.new_empty((rows,) if reduction_of(codes) == REDUCTIONS["none"] else (), dtype=dtype),
        logits.new_empty((rows, classes) if codes & WANT_GRADIENT else (0,)),
        logits.new_empty((STATE_SIZE,) if want_state else (0,), dtype=dtype),
    )


for _suffix in ("", "_triton"):
    torch.library.register_fake(f"sdfast::_self_distillation{_suffix}", _fake_forward)
    torch.library.register_fake(
        f"sdfast::_self_distillation_backward{_suffix}",
        lambda upstream, state, logits, *_: logits.new_empty(logits.shape),
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
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    scale_in_place: Callable[..., Any]


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
OPERATIONS = {"cpu": _NATIVE, "cuda": _NATIVE, "triton": _TRITON}
# In eager code past the Python part of an operation's call; compiled code wants the operations themselves.
_EAGER = {
    name: _Operations(*(operation._op for operation in operations))  # type: ignore[attr-defined]
    for name, operations in OPERATIONS.items()
}


class SelfDistillation(torch.autograd.Function):
    """Loss of the rows of (N, C) logits; with `WANT_STATS` also the state, which carries no gradient.

    `forward` takes `ctx` itself: a separate `setup_context` makes every call inspect signatures, and costs more than
    the kernel at 128 x 10.
    """

    @staticmethod
    def forward(
        ctx, backend, logits, labels, alpha, source, class_weight, row_weight, alpha_value, codes, ignore_index, numbers
    ):
        """Computes the loss, and the gradient too where it is wanted and reduced."""
        wanted = ctx.needs_input_grad[1]
        now = wanted and writes_gradient_early(backend, logits.dtype, reduction_of(codes))
        run = (OPERATIONS if torch.compiler.is_compiling() else _EAGER)[backend].forward
        value, gradient, state = run(
            logits, labels, alpha, source, class_weight, row_weight, alpha_value,
            codes | WANT_GRADIENT if now else codes, ignore_index, numbers,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        if now:
            ctx.save_for_backward(gradient)
        elif wanted:
            ctx.packed = alpha_value, codes, ignore_index, numbers
            ctx.save_for_backward(state, logits, labels, alpha, source, class_weight, row_weight)
        if not codes & WANT_STATS:
            return value
        ctx.mark_non_differentiable(state)
        return value, state

    @staticmethod
    def backward(ctx, upstream, _=None):
        """Scales the gradient of the forward, or computes it from the saved inputs."""
        refuse_double_backward("self_distillation_loss")
        if upstream is None:
            return (None,) * 11
        saved = ctx.saved_tensors  # read once: activation checkpointing unpacks them only once
        if len(saved) == 1:
            gradient = scaled(saved[0], upstream, ctx.backend)
        else:
            gradient = gradient_from_inputs(OPERATIONS[ctx.backend], upstream, saved, ctx.packed)
        return None, gradient, *(None,) * 9


def refuse_double_backward(name: str) -> None:
    """Raises where the gradient is to be differentiated: a saved one would give silent zeros."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name}: its native backends have no second derivative; pass backend='reference' to differentiate the "
            "gradient (create_graph=True)"
        )


def writes_gradient_early(backend: str, dtype: torch.dtype, reduction: int) -> bool:
    """Whether the forward writes the gradient, for an upstream gradient of 1.

    Not where that would lose something: `none` has an upstream gradient a row, and float16 needs the factor of a loss
    scaler before it rounds. Compiled code cannot look at the upstream gradient: there a GPU folds it in by computing
    the gradient in the backward, which moves fewer bytes than a pass to scale it, while a CPU, bound by the
    exponentials, writes early and scales.
    """
    if reduction == REDUCTIONS["none"] or dtype == torch.float16:
        return False
    return backend == "cpu" or not torch.compiler.is_compiling()


def scaled(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """`gradient` times the 0-d `upstream`: `gradient` itself where nobody needs it again."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(upstream) is not Tensor
    if not traced and not _is_batched(upstream) and not _graph_is_kept():
        if backend != "cpu":
            OPERATIONS[backend].scale_in_place(gradient, upstream)
            return gradient
        if upstream.item() == 1:
            return gradient
    return (gradient.to(upstream.dtype) * upstream).to(gradient.dtype)


# As by ``torch.autograd.grad(…, is_grads_batched=True)``.
_is_batched = torch._C._functorch.is_legacy_batchedtensor

# Whether this backward keeps the graph, so that another may follow and wants the same saved gradient.
_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph


# `Function.apply` without its Python part, which looks for functorch wrappers in every argument: under
# a functorch transform the reference runs instead. Compiled code wants `apply` itself.
_apply = super(torch.autograd.Function, SelfDistillation).apply


def self_distillation(*arguments):
    """The rows' loss; with `WANT_STATS` the pair (loss, state). Arguments as `SelfDistillation.forward` has them."""
    return SelfDistillation.apply(*arguments) if torch.compiler.is_compiling() else _apply(*arguments)


def gradient_from_inputs(operations: _Operations, upstream: Tensor, saved: tuple, packed: Packed) -> Tensor:
    """The gradient for any upstream gradient; `saved` is the state and the six tensors of the loss."""
    state, logits, labels, alpha, *others = saved
    if packed[1] & ADAPTIVE:
        alpha = state[0]
    return operations.backward(upstream, state, logits, labels, alpha, *others, *packed)
