"""What a training is made of: model, optimizer, scheduler, batches, precision, and which of them are refused."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from sdfast import _checks
from sdfast.baselines.method import Method

AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def check_method(method: object, alpha: object, options: dict[str, Any]) -> None:
    """Refuses a training with both a method and a loss, or with neither; `options` are the loss's, by their names."""
    if method is None:
        if alpha is None:
            raise ValueError("alpha: got None, wanted a number, sdfast.AdaptiveAlpha or a function, or a method")
        return
    if not isinstance(method, Method):
        raise TypeError(f"method: got {type(method).__name__}, wanted a method of sdfast.baselines")
    given = [name for name, value in {"alpha": alpha, **options}.items() if value is not None]
    if given:
        raise ValueError(f"{given[0]}: given beside method={method.name!r}, which has a loss of its own")


def check_parts(model: object, optimizer: object, scheduler: object) -> None:
    """Refuses what is no model, an optimizer of something else, and a scheduler of another optimizer."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, wanted a torch.optim.Optimizer")
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("optimizer: holds no parameter of model, so training would change nothing")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise NotImplementedError("scheduler: ReduceLROnPlateau wants a figure at each step; step it in a callback")
    if scheduler is not None and not isinstance(scheduler, LRScheduler):
        raise TypeError(f"scheduler: got {type(scheduler).__name__}, wanted a torch.optim.lr_scheduler.LRScheduler")
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError("scheduler: belongs to another optimizer than the one given")


def check_batches(name: str, batches: object) -> None:
    """Refuses what cannot be passed over once an epoch."""
    if batches is None and name == "eval":
        return
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor):
        raise TypeError(f"{name}: got {type(batches).__name__}, wanted an iterable of (inputs, labels) batches")
    if isinstance(batches, Iterator):
        raise ValueError(
            f"{name}: got an iterator, which is used up after one epoch; wanted a list, DataLoader or Batches"
        )


def amp_name(amp: str | torch.dtype | None, device: torch.device) -> str | None:
    """The name of a precision that is possible on the device, or ``None`` for full precision."""
    if amp is None:
        return None
    names = {dtype: name for name, dtype in AMP_DTYPES.items()}
    name = names.get(amp, str(amp)) if isinstance(amp, torch.dtype) else amp
    _checks.check_option("amp", name, AMP_DTYPES)
    if name == "float16" and device.type == "cpu":
        raise NotImplementedError("amp: got 'float16' on the CPU, which has no use for it; use 'bfloat16'")
    return name
