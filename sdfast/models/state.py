"""Weights from a file, where a command names it."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_UNREADABLE = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    EOFError,
    pickle.UnpicklingError,
)
_TOLD = 4  # entries that do not fit; there may be hundreds


def load_state(model: nn.Module, path: Path, flag: str) -> nn.Module:
    """The model with the state dict of a file, on the CPU.

    Args:
        model: Whose state it is.
        path: The file, as torch.save writes it.
        flag: That named it, for the error.

    Returns:
        The model.

    Raises:
        ValueError: The file holds no state of this model; what differs is named.
    """
    wanted = model.state_dict()
    state = _read(path, flag)
    if not isinstance(state, Mapping):
        raise ValueError(f"{flag}: {path} holds a {type(state).__name__}, wanted a state_dict")
    misfits = _misfits(state, wanted)
    if misfits:
        raise ValueError(f"{flag}: {path} does not fit the network: {_some(misfits)}")
    model.load_state_dict(state)
    return model


def _read(path: Path, flag: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        if "GLOBAL" in str(error):  # what torch calls a class, or a function, that it does not take from a file
            wanted = "wanted what torch.save(model.state_dict(), ...) writes"
            raise ValueError(f"{flag}: {path} holds objects beside tensors, {wanted}") from None
        raise ValueError(f"{flag}: {path} is no file of torch.save, or not the whole of one") from None


def _misfits(state: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> list[str]:
    if not state.keys() & wanted.keys():
        return [f"it holds {_some([*map(str, state)]) or 'nothing'}, and the network {_some([*wanted])}"]
    told = []
    for name, tensor in wanted.items():
        if not isinstance(state.get(name), Tensor):
            told.append(f"{name} is missing")
        elif not _is_plain(state[name]) or (state[name].is_complex() and not tensor.is_complex()):
            told.append(f"{name} is sparse, nested, quantised, complex or without values")
        elif state[name].shape != tensor.shape:
            told.append(f"{name} is {tuple(state[name].shape)} and not {tuple(tensor.shape)}")
    return told + [f"the network has no {name}" for name in state if name not in wanted]


def _is_plain(tensor: Tensor) -> bool:
    """Whether a parameter can be copied from it."""
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)


def _some(parts: list[str]) -> str:
    return ", ".join(parts[:_TOLD] + [f"and {len(parts) - _TOLD} more"] * (len(parts) > _TOLD))
