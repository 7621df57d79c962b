"""Data sets by name, split into a training and a test part."""

import math
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sdfast.data import folder as own_folder
from sdfast.data import vision
from sdfast.data.parts import Dataset

__all__ = ["DATASETS", "Dataset", "binary_task", "load_dataset", "register"]

DEFAULT_FOLDER = "data"
DEFAULT_TEST_FRACTION = 0.25


class Kind(NamedTuple):
    """What a data set is read from.

    Attributes:
        splits: Its test part is drawn, by test_fraction and seed.
        in_folder: It lies in a folder.
        downloads: torchvision can fetch it.
    """

    splits: bool
    in_folder: bool
    downloads: bool


# name -> loader(test_fraction, seed)
DATASETS: dict[str, Callable[[float, int], Dataset]] = {}


def register(name: str) -> Callable[[Callable[[float, int], Dataset]], Callable[[float, int], Dataset]]:
    """Decorator: `load_dataset(name)` calls the function with (test_fraction, seed), and `DATASETS` lists it.

    Args:
        name: Of the data set; one that is there already is replaced.

    Returns:
        The decorator, which gives the function back as it is.
    """

    def add(loader: Callable[[float, int], Dataset]) -> Callable[[float, int], Dataset]:
        DATASETS[name] = loader
        return loader

    return add


def dataset_names() -> list[str]:
    """All that `load_dataset` knows."""
    return sorted({*DATASETS, *vision.SOURCES, "folder"})


def kind_of(name: object) -> Kind:
    """What the data set of that name is read from.

    Raises:
        ValueError: There is none of that name.
    """
    if isinstance(name, str) and name in DATASETS:
        return Kind(splits=True, in_folder=False, downloads=False)
    if isinstance(name, str) and name in vision.SOURCES:
        return Kind(splits=False, in_folder=True, downloads=True)
    if name == "folder":
        return Kind(splits=True, in_folder=True, downloads=False)
    raise ValueError(f"name: got {name!r}, wanted one of {', '.join(map(repr, dataset_names()))}")


def load_dataset(
    name: str,
    *,
    test_fraction: float | None = None,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    download: bool = False,
) -> Dataset:
    """A data set with a training and a test part.

    Args:
        name: ``"digits"``: scikit-learn's 1797 images of 8×8 pixels, divided by 16, as rows of 64;
            ``"digit_pictures"``: the same as pictures (1, 8, 8). ``"cifar10"``, ``"cifar100"``, ``"fashion_mnist"``: as
            torchvision stores them, uint8 pictures with a test part of their own. ``"folder"``: one's own data, see
            `sdfast.data.load_folder`. `register` adds others.
        test_fraction: Share of the test part, in (0, 1), where it is drawn; by default 0.25.
        seed: Of that draw.
        folder: Where cifar10, cifar100 and fashion_mnist lie, by default ``"data"``; and the folder of ``"folder"``.
        download: Let torchvision fetch what is not in the folder yet.

    Returns:
        The data set, on the CPU.

    Raises:
        ValueError: There is no data set of that name or not in that folder, or an option is impossible or does not go
            with it.
        ImportError: torchvision is missing, or does not work beside this torch.
        OSError: The download failed.
    """
    kind = kind_of(name)
    if test_fraction is not None and (not isinstance(test_fraction, int | float) or not 0 < test_fraction < 1):
        raise ValueError(f"test_fraction: got {test_fraction!r}, wanted a number in (0, 1)")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed!r}, wanted an integer in [0, 2**32)")
    if not kind.splits and test_fraction is not None:
        raise ValueError(f"test_fraction: got {test_fraction}, but {name} has a test part of its own")
    if folder is not None and not kind.in_folder:
        raise ValueError(f"folder: got {os.fspath(folder)!r}, but {name} is not read from one")
    if download and not kind.downloads:
        raise ValueError(f"download: {name} is nothing that torchvision can fetch")
    if kind.downloads:
        return vision.load(name, DEFAULT_FOLDER if folder is None else folder, download)
    if name == "folder":
        if folder is None:
            raise ValueError("folder: got None, wanted the folder of your data")
        return own_folder.load_folder(folder, test_fraction=test_fraction, seed=seed)
    fraction = DEFAULT_TEST_FRACTION if test_fraction is None else float(test_fraction)
    return DATASETS[name](fraction, seed)


def binary_task(data: Dataset, positive: Iterable[int]) -> Dataset:
    """The same inputs with two classes: 1 where the class is one of `positive`, else 0.

    ``2 * labels - 1`` are the ±1 labels of mean squared error. Dong et al. 2019 take CIFAR-10 and {2, 7}.

    Args:
        data: With its own classes.
        positive: Of these.

    Returns:
        The binary data set.

    Raises:
        ValueError: A class is none of `data`'s, or all or none of them are positive.
    """
    chosen = sorted(set(positive))
    if not all(isinstance(label, int) and 0 <= label < data.num_classes for label in chosen):
        raise ValueError(f"positive: got {chosen}, wanted classes of {data.name}, 0 to {data.num_classes - 1}")
    if not 0 < len(chosen) < data.num_classes:
        raise ValueError(f"positive: got {len(chosen)} of {data.num_classes} classes, wanted some but not all")

    def relabel(labels: Tensor) -> Tensor:
        return torch.isin(labels, torch.tensor(chosen, device=labels.device)).to(torch.int64)

    name = f"{data.name} {{{', '.join(map(str, chosen))}}}"
    labels = {"train_labels": relabel(data.train_labels), "test_labels": relabel(data.test_labels)}
    return data._replace(**labels, num_classes=2, name=name)


@register("digits")
def _load_digits(test_fraction: float, seed: int) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    test_rows = math.ceil(test_fraction * len(labels))  # as scikit-learn rounds
    if test_rows == len(labels):
        raise ValueError(f"test_fraction: got {test_fraction}, which leaves no row of {len(labels)} for training")
    parts = train_test_split(pixels / 16, labels, test_size=test_fraction, random_state=seed)
    train_inputs, test_inputs = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    train_labels, test_labels = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    return Dataset(train_inputs, train_labels, test_inputs, test_labels, 10, "digits")


@register("digit_pictures")
def _load_digit_pictures(test_fraction: float, seed: int) -> Dataset:
    data = _load_digits(test_fraction, seed)
    pictures = {name: getattr(data, name).reshape(-1, 1, 8, 8) for name in ("train_inputs", "test_inputs")}
    return data._replace(**pictures, name="digit_pictures")
