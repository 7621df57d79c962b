"""Data sets by name, split into a training and a test part."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DATASETS", "Dataset", "load_dataset", "register"]


class Dataset(NamedTuple):
    """A classification data set on the CPU, with clean labels.

    Attributes:
        train_inputs: (N, ...) float32.
        train_labels: (N,) int64 class indices.
        test_inputs: (M, ...) float32.
        test_labels: (M,) int64.
        num_classes: How many classes there are.
        name: Under which `load_dataset` finds it.
    """

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    num_classes: int
    name: str


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


def load_dataset(name: str, *, test_fraction: float = 0.25, seed: int = 0) -> Dataset:
    """A data set split at random into a training and a test part.

    Args:
        name: ``"digits"``: scikit-learn's 1797 images of 8×8 pixels, divided by 16, as rows of 64. `register` adds
            others.
        test_fraction: Share of the test part, in (0, 1).
        seed: Of the split.

    Returns:
        The data set, on the CPU.

    Raises:
        ValueError: There is no data set of that name, or `test_fraction` or `seed` is impossible.
    """
    if not isinstance(name, str) or name not in DATASETS:
        raise ValueError(f"name: got {name!r}, wanted one of {', '.join(map(repr, sorted(DATASETS)))}")
    if not isinstance(test_fraction, int | float) or not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction: got {test_fraction!r}, wanted a number in (0, 1)")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed!r}, wanted an integer in [0, 2**32)")
    return DATASETS[name](float(test_fraction), seed)


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
