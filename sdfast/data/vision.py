"""CIFAR-10, CIFAR-100 and Fashion-MNIST, read and fetched by torchvision, kept as uint8."""

import importlib
import importlib.util
import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdfast.data.parts import Dataset


class Source(NamedTuple):
    """Where torchvision keeps a data set.

    Attributes:
        class_name: In ``torchvision.datasets``.
        files: The folder of its files, inside that of all.
        num_classes: How many classes it has.
    """

    class_name: str
    files: str
    num_classes: int


SOURCES = {
    "cifar10": Source("CIFAR10", "cifar-10-batches-py", 10),
    "cifar100": Source("CIFAR100", "cifar-100-python", 100),
    "fashion_mnist": Source("FashionMNIST", "FashionMNIST/raw", 10),
}

# All that torchvision has been seen to raise on damaged files.
_UNREADABLE = (RuntimeError, ValueError, AssertionError, EOFError, LookupError, pickle.UnpicklingError)


def torchvision_datasets() -> Any:
    """The module ``torchvision.datasets``.

    Returns:
        The module.

    Raises:
        ImportError: torchvision is not installed, or does not load beside this torch; the message says which.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise ImportError('torchvision is not installed: pip install "sdfast[vision]"')
    try:
        return importlib.import_module("torchvision.datasets")
    except (RuntimeError, ImportError, AttributeError) as error:  # AttributeError: of a second try, half imported
        raise ImportError(
            f"torchvision is installed but does not load beside torch {torch.__version__}: {error}; most likely it was "
            "built for another torch, such as a CUDA one beside a CPU-only torch: install both from one index"
        ) from error


def load(name: str, folder: str | os.PathLike, download: bool) -> Dataset:
    """Reads one of `SOURCES`.

    Args:
        name: Of `SOURCES`.
        folder: In which torchvision looks for it.
        download: Fetch it if it is not there.

    Returns:
        uint8 pictures (N, channels, height, width), on the CPU.

    Raises:
        ValueError: It is not in that folder, or damaged.
        OSError: It could not be fetched.
        ImportError: There is no working torchvision.
    """
    source = SOURCES[name]
    place = Path(folder)
    files = place / source.files
    reader = getattr(torchvision_datasets(), source.class_name)
    if not files.is_dir() and not download:
        raise ValueError(
            f"folder: there is no {name} in {place} (looked for {files}); add download=True, or name the folder that "
            "holds it"
        )
    if download:
        _fetch(reader, name, place, files)
    try:
        train, test = (reader(place, train=part) for part in (True, False))
    except _UNREADABLE as error:
        raise ValueError(f"folder: {files} is incomplete or damaged: {_first_line(error)}") from error
    return Dataset(
        _pictures(train.data), torch.as_tensor(train.targets, dtype=torch.int64),
        _pictures(test.data), torch.as_tensor(test.targets, dtype=torch.int64), source.num_classes, name,
    )  # fmt: skip


def _fetch(reader: Any, name: str, place: Path, files: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        reader(place, train=True, download=True)
    except (OSError, *_UNREADABLE) as error:
        raise OSError(
            f"download: could not fetch {name} into {place}: {_first_line(error)}; without a network, put its files "
            f"into {files} by hand"
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _pictures(data: np.ndarray | Tensor) -> Tensor:
    """Channels first: CIFAR comes as (N, H, W, 3) of NumPy, Fashion-MNIST as (N, H, W) of torch."""
    pixels = torch.as_tensor(data)
    return (pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)).contiguous()
