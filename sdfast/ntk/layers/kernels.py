"""Whose kernels make gradients per sample: the package's own where they serve, else torch's operations.

The choice rests on device and dtype alone, so the plan can name it before anything runs.
"""

import torch
from torch import Tensor

from sdfast import _dispatch

TORCH = "torch"


def kernel_for(device_type: str, dtype: torch.dtype) -> str:
    """The backend of `sdfast.ops.sample_gradients` for such tensors, or ``"torch"`` where there is none.

    Args:
        device_type: Of the tensors.
        dtype: Of them all.

    Returns:
        ``"cpu"``, ``"triton"`` or ``"torch"``.
    """
    backend = "cpu" if device_type == "cpu" else "triton"
    served = dtype in (torch.float32, torch.float64) and _dispatch.why_not(backend, device_type) is None
    return backend if served else TORCH


def own(gradient: Tensor, *others: Tensor) -> str | None:
    """The own backend for tensors of one dtype outside torch.func transforms, or ``None``: torch's operations.

    Args:
        gradient: Of the layer's output.
        others: What comes with it.

    Returns:
        The backend's name.
    """
    if any(other.dtype != gradient.dtype for other in others) or _dispatch.functorch_is_active():
        return None
    kernel = kernel_for(gradient.device.type, gradient.dtype)
    return None if kernel == TORCH else kernel
