"""Devices that torch can compute on here."""

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
