"""What the network experiments share: the data of a seed, its noise, its network."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdfast.data import Dataset, binary_task, flip_labels, load_dataset
from sdfast.data.datasets import kind_of
from sdfast.data.images import evaluation_batches
from sdfast.models.registry import flat_mlp, model_builder
from sdfast.train.records import percent

points = percent  # as the experiments call it


def load_task(settings: Any, seed: int, noise: float, dataset: str | None = None) -> tuple[Dataset, Tensor]:
    """The data set of the settings, split by the seed where it is split, and its training labels with noise."""
    name = settings.dataset if dataset is None else dataset
    folder: dict[str, Any] = {}
    if kind_of(name).in_folder:
        folder = {"folder": settings.data, "download": settings.download}
    data = load_dataset(name, seed=seed, **folder)
    noisy = flip_labels(data.train_labels, noise, data.num_classes, generator=torch.Generator().manual_seed(seed))
    return data, noisy.labels


def load_signs(settings: Any, seed: int, noise: float = 0.0) -> tuple[Dataset, Tensor, Tensor]:
    """The classes ``settings.positive`` against the rest, for a network of one output: as ±1 (N, 1), given and true."""
    data, _ = load_task(settings, seed, 0.0)
    data = binary_task(data, settings.positive)
    noisy = flip_labels(data.train_labels, noise, 2, generator=torch.Generator().manual_seed(seed))
    return data._replace(num_classes=1), as_signs(noisy.labels), as_signs(data.train_labels)


def as_signs(labels: Tensor) -> Tensor:
    """Classes 0 and 1 (N,) as -1 and 1 (N, 1)."""
    return 2.0 * labels[:, None].to(torch.float32) - 1


def draw_rows(count: int, rows: int, seed: int) -> Tensor:
    """Some of `count` rows, as many as there are at most, in their order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:rows].sort().values


def prepared(data: Dataset, inputs: Tensor) -> Tensor:
    """Inputs of the data set as its networks take them: pictures as floats, the training part's mean subtracted."""
    part = data._replace(test_inputs=inputs, test_labels=torch.zeros(len(inputs), dtype=torch.int64))
    return torch.cat([batch for batch, _ in evaluation_batches(part)])


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
