"""What many runs of one thing left behind, in a folder: a file a run, whole or not there, that knows its settings."""

import os
import pickle
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdfast import _checks, _files
from sdfast.data.fingerprint import content_hash, fixed_random
from sdfast.data.parts import Dataset

# What one run may die of without taking the others along.
FAILURES = (FloatingPointError, RuntimeError, MemoryError)


class RunFile:
    """The file of one run, or the place of a run that is kept in memory only.

    Args:
        folder: Of the files; ``None`` keeps nothing.
        name: Of this run's.
        settings: That must be the same on resume.

    Raises:
        ValueError: The file belongs to other settings, or is none.
    """

    def __init__(self, folder: str | os.PathLike | None, name: str, settings: dict[str, Any]) -> None:
        self.path = None if folder is None else Path(folder) / f"{name}.pt"
        self.settings = settings
        self.state: dict[str, Any] = {}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.state = self._read(self.path)

    def save(self, **state: Any) -> None:
        """Replaces the file by one with this state."""
        self.state = state
        if self.path is not None:
            content = {"settings": self.settings, "state": state}
            _files.write_atomically(self.path, lambda file: torch.save(content, file))

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            settings, state = content["settings"], content["state"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError) as error:
            raise ValueError(f"folder: {path} is no readable run ({type(error).__name__}); delete it") from error
        differing = [
            f"{name} was {settings.get(name)!r} and is {self.settings.get(name)!r}"
            for name in sorted({*settings, *self.settings})
            if settings.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"folder: {path} belongs to a run with other settings: {'; '.join(differing)}; give it those, or name "
                "another folder"
            )
        return state


def model_settings(make_model: Callable[[], nn.Module]) -> str:
    """A network by its printed form and the shapes of its parameters, without a trace in the random states."""
    with fixed_random():
        model = make_model()
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    return content_hash([re.sub("0x[0-9a-f]+", "", repr(model)), str(shapes)])


def data_settings(data: Dataset, labels: Tensor) -> dict[str, Any]:
    """The data set by its contents."""
    return {"data": content_hash(list(data[:4])), "labels": content_hash(labels)}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the sample standard deviation: 0 of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def mean_text(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean ± standard deviation as text; of a single value itself."""
    mean, deviation = mean_and_deviation(values)
    text = f"{scale * mean:.{digits}f}"
    return f"{text} ± {scale * deviation:.{digits}f}" if len(values) > 1 else text


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation of fractions, in per cent."""
    return mean_text(values, 100)


def labels_of_runs(data: Dataset, labels: Tensor | Sequence[Tensor] | None, runs: int) -> list[Tensor]:
    """The labels of each run: the data set's own, the same for all, or one tensor a run."""
    if labels is None:
        labels = data.train_labels
    each = [labels] * runs if isinstance(labels, Tensor) else list(labels)
    if len(each) != runs:
        raise ValueError(f"labels: got {len(each)} tensors for {runs} runs")
    for tensor in each:
        _checks.check_tensor("labels", tensor)
        if tensor.shape != data.train_labels.shape or tensor.is_floating_point():
            wanted = f"classes of shape {tuple(data.train_labels.shape)}"
            raise ValueError(f"labels: got shape {tuple(tensor.shape)} of {tensor.dtype}, wanted {wanted}")
    return each
