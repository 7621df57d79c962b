"""Devices that torch can compute on here."""

import platform
from contextlib import AbstractContextManager, nullcontext

import torch


def usable(device: torch.device | str) -> torch.device:
    """The device, once it has been seen to hold a number.

    Args:
        device: Or its name.

    Returns:
        The torch.device.

    Raises:
        ValueError: torch knows no such device, or cannot compute on it here.
    """
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's own for a device that is not there
        raise ValueError(f"device: got {str(device)!r}, which torch cannot compute on here") from error
    return chosen


def named(device: torch.device | str) -> torch.device:
    """The device of that name, whether or not it can be computed on: meta tensors have one too.

    Args:
        device: Or its name.

    Returns:
        The torch.device.

    Raises:
        ValueError: torch has no such name.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: got {device!r}, wanted a torch.device or its name, as 'cpu' or 'cuda:0'") from error


def processor_name() -> str:
    """The processor's name, as the kernel has it where there is a kernel that tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def current(tensor: torch.Tensor) -> AbstractContextManager:
    """Makes the tensor's device the current one, on which Triton launches.

    Args:
        tensor: Any.

    Returns:
        A context manager; of nothing for the CPU.
    """
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)
