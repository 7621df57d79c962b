"""What the network experiments share: the data of a seed, its noise, its network."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdfast.data import Dataset, flip_labels, load_dataset
from sdfast.data.datasets import kind_of
from sdfast.models.registry import flat_mlp, model_builder
from sdfast.train.records import mean_and_deviation


def load_task(settings: Any, seed: int, noise: float, dataset: str | None = None) -> tuple[Dataset, Tensor]:
    """The data set of the settings, split by the seed where it is split, and its training labels with noise."""
    name = settings.dataset if dataset is None else dataset
    folder: dict[str, Any] = {}
    if kind_of(name).in_folder:
        folder = {"folder": settings.data, "download": settings.download}
    data = load_dataset(name, seed=seed, **folder)
    noisy = flip_labels(data.train_labels, noise, data.num_classes, generator=torch.Generator().manual_seed(seed))
    return data, noisy.labels


def network(data: Dataset, model: str, hidden: Sequence[int] = ()) -> Callable[[], nn.Module]:
    """Makes a fresh network for the data set: an ``mlp`` of these hidden widths, or any other by name."""
    shape = tuple(data.train_inputs.shape[1:])
    if model == "mlp":
        return lambda: flat_mlp(shape, hidden, data.num_classes)
    build = model_builder(model)
    return lambda: build(shape, data.num_classes)


def checkpoint(settings: Any, folder: Path, name: str) -> str | None:
    """Where a training of hours continues from; those of seconds write nothing."""
    if not settings.checkpoints:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{name}.pt")


def points(values: Sequence[float]) -> str:
    """Mean ± standard deviation of fractions, in per cent."""
    mean, deviation = mean_and_deviation(values)
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}" if len(values) > 1 else f"{100 * mean:.1f}"
