"""Data for learning with wrong labels: label noise, small data sets, batches that live on the device."""

from sdfast.data.batches import Batches
from sdfast.data.datasets import DATASETS, Dataset, load_dataset, register
from sdfast.data.noise import NoisyLabels, flip_labels

__all__ = ["DATASETS", "Batches", "Dataset", "NoisyLabels", "flip_labels", "load_dataset", "register"]
