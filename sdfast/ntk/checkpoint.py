"""The state of an unfinished Gram matrix on disk: whole or not there, and of no other run."""

import os
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sdfast
from sdfast import _files
from sdfast.data.fingerprint import content_hash
from sdfast.ntk.coupling import far_apart
from sdfast.ntk.inputs import Inputs

SHARE = 20  # a file that took a second to write is not written again before so many seconds


class Checkpoint:
    """A file with the sum over the groups that are done.

    Args:
        path: Of the file.
        settings: What the result depends on, as plain values.
        answers: Outputs of the model on a few samples (samples, classes): code is no setting, but what it gives is.

    Raises:
        ValueError: The file is of another run, or is no checkpoint.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any], answers: Tensor) -> None:
        self.path, self.settings, self.answers = Path(path), settings, answers.cpu()
        self.done = 0
        self.looped = False
        self.matrix: Tensor | None = None
        self._next = 0.0
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint: {self.path.parent} is no folder")
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            saved, self.done, self.looped = state["settings"], state["done"], state["looped"]
            self.matrix, answers = state["matrix"], state["answers"]
        except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError, OSError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"checkpoint: {self.path} is no checkpoint of a Gram matrix: {first}") from None
        differing = [name for name in self.settings if saved.get(name) != self.settings[name]]
        if differing:
            told = "; ".join(f"{name} was {saved.get(name)} and is {self.settings[name]}" for name in differing)
            raise ValueError(f"checkpoint: {self.path} is of another run: {told}; name another file, or delete it")
        if answers.shape != self.answers.shape or far_apart(self.answers, answers, self.answers):
            raise ValueError(
                f"checkpoint: {self.path} is of another run: the model, or the callable outputs, gave "
                f"{answers[0, :4].tolist()} on the first sample and gives {self.answers[0, :4].tolist()}; name another "
                "file, or delete it"
            )

    def forget(self) -> None:
        """Begins again: the next `save` replaces what the file holds."""
        self.done, self.matrix, self._next = 0, None, 0.0

    def save(self, done: int, matrix: Tensor, looped: bool, last: bool) -> None:
        """Writes the sum over the first `done` groups, unless that was done a moment ago.

        Args:
            done: Number of groups.
            matrix: Their sum.
            looped: Whether all parameters are differentiated one sample at a time.
            last: Whether these are all groups; then it is written in any case.
        """
        start = time.monotonic()
        if start < self._next and not last:
            return
        state = {"settings": self.settings, "answers": self.answers, "done": done, "looped": looped, "matrix": matrix}
        _files.write_atomically(self.path, lambda file: torch.save(state, file))
        end = time.monotonic()
        self._next = end + SHARE * (end - start)


def settings_of(
    model: nn.Module, parameters: Mapping[str, Tensor], sides: Mapping[str, Inputs | None], **values: Any
) -> dict[str, Any]:
    """What a Gram matrix depends on, by the name under which a difference is told.

    Args:
        model: The model: its class, parameters, buffers and modes.
        parameters: Those that are differentiated.
        sides: The inputs, by argument.
        values: Further settings.

    Returns:
        Plain values.
    """
    modes = [module.training for module in model.modules()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "sdfast": sdfast.__version__,
        "torch": str(torch.__version__),
        "model class": type(model).__qualname__,
        "training mode": content_hash(modes),
        "parameters and buffers of the model": content_hash([[name, tensor] for name, tensor in tensors]),
        "params": content_hash(list(parameters)),
        **{
            name: None if side is None else content_hash([[str(key), tensor] for key, tensor in side.tensors.items()])
            for name, side in sides.items()
        },
        **values,
    }
