"""Batch norm as a pass here runs it: with constants where it trains, and with a product for its backward where not."""

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor
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


def run(func: Callable, args: tuple, kwargs: dict[str, Any], tapped: Container[int]) -> Tensor:
    """What a call gives; by running statistics with the gradient of its input alone: B · γ / sqrt(variance + ε).

    That is a product, which torch's own backward precedes by two sums over B and the input.

    Args:
        func: One of `FUNCTIONS`.
        args: Of the call.
        kwargs: Of the call.
        tapped: By identity, the parameters whose gradients are not wanted of autograd.

    Returns:
        The same in every bit.
    """
    given = _named(func, args, kwargs)
    data, mean, variance = (given.get(name) for name in ("input", "running_mean", "running_var"))
    weight, bias = given.get("weight"), given.get("bias")
    if given.get("training") or type(data) is not Tensor or not data.requires_grad or variance is None:
        return func(*args, **kwargs)
    others = [tensor for tensor in (mean, variance, weight, bias) if tensor is not None and id(tensor) not in tapped]
    if not torch.is_grad_enabled() or any(tensor.requires_grad for tensor in others):
        return func(*args, **kwargs)
    with torch.no_grad():
        scale = (variance + given.get("eps", 1e-5)).rsqrt()
        scale = scale if weight is None else scale * weight
    return _Scaled.apply(data, scale.view(-1, *[1] * (data.dim() - 2)), lambda: func(*args, **kwargs))


class _Scaled(torch.autograd.Function):
    """A function of which the gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, data: Tensor, scale: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        ctx.save_for_backward(scale)
        return compute()  # no graph is made inside

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.saved_tensors[0], None, None
