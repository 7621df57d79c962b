"""Batch norm as a pass here runs it: with constants where it trains, and with a product for its backward where not."""

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

FUNCTIONS = (functional.batch_norm, torch.batch_norm)
_NAMES = {
    functional.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}


def _named(func: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(_NAMES[func], args, strict=False)) | kwargs


def trains(func: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call takes the statistics of the batch."""
    return bool(_named(func, args, kwargs).get("training", False))


def with_constants(func: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """The arguments of ``functional.batch_norm`` with mean 0 and variance 1 in place of the batch's own."""
    given = _named(func, args, kwargs)
    channels = given["input"].shape[1]
    constants = [given["input"].new_full((channels,), value) for value in (0.0, 1.0)]
    return given["input"], *constants, given.get("weight"), given.get("bias"), False, 0.1, given.get("eps", 1e-5)


def run(func: Callable, args: tuple, kwargs: dict[str, Any], by_autograd: Container[int]) -> Tensor:
    """What a call gives; by running statistics with the gradient of its input alone: B · γ / sqrt(variance + ε).

    That is a product, which torch's own backward precedes by two sums over B and the input. Where anything else may
    look at the graph or at what it holds (checkpointing and other hooks on saved tensors, `torch.func`, forward-mode
    differentiation) it is left to torch.

    Args:
        func: One of `FUNCTIONS`.
        args: Of the call.
        kwargs: Of the call.
        by_autograd: By identity, the parameters whose gradients are wanted of autograd.

    Returns:
        The same in every bit.
    """
    given = _named(func, args, kwargs)
    data, mean, variance = (given.get(name) for name in ("input", "running_mean", "running_var"))
    weight, bias = given.get("weight"), given.get("bias")
    sources = [tensor for tensor in (mean, variance, weight, bias) if tensor is not None and tensor.requires_grad]
    wanted = any(not tensor.is_leaf or id(tensor) in by_autograd for tensor in sources)
    followed = torch.is_grad_enabled() and type(data) is Tensor and data.requires_grad and not _watched()
    if given.get("training") or variance is None or wanted or not followed:
        return func(*args, **kwargs)

    def compute() -> tuple[Tensor, Tensor]:
        result = func(*args, **kwargs)
        scale = (variance + given.get("eps", 1e-5)).rsqrt()
        scale = scale if weight is None else scale * weight
        return result, scale.view(-1, *[1] * (result.dim() - 2))

    return _Scaled.apply(data, compute)


def _watched() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    transformed = torch._C._are_functorch_transforms_active()
    return hooks is not None or transformed or forward_ad._current_level >= 0


class _Scaled(torch.autograd.Function):
    """A function of which the gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, data: Tensor, compute: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        result, scale = compute()  # no graph is made inside
        ctx.save_for_backward(scale)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None
