"""Weights from a file, where a command names it."""

import pickle
from pathlib import Path

import torch
from torch import nn


def load_state(model: nn.Module, path: Path, flag: str) -> nn.Module:
    """The model with the state dict of a file, on the CPU.

    Args:
        model: Whose state it is.
        path: The file, as torch.save writes it.
        flag: That named it, for the error.

    Returns:
        The model.

    Raises:
        ValueError: The file holds no state of this model.
    """
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{flag}: {path} does not fit the network: {reason}") from None
    return model
