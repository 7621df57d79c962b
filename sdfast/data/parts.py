"""What a data set is."""

from typing import NamedTuple

from torch import Tensor


class Dataset(NamedTuple):
    """A classification data set on the CPU, with clean labels.

    Attributes:
        train_inputs: (N, ...) float32, or (N, channels, height, width) uint8 pictures.
        train_labels: (N,) int64 class indices.
        test_inputs: (M, ...) of the same dtype.
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
