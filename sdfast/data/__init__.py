"""Data for learning with wrong labels: label noise, data sets, batches and pictures that live on the device."""

from sdfast.data.batches import Batches
from sdfast.data.datasets import DATASETS, Dataset, binary_task, dataset_names, load_dataset, register
from sdfast.data.folder import load_folder
from sdfast.data.images import ImageBatches, evaluation_batches, training_batches
from sdfast.data.noise import NoisyLabels, flip_labels

__all__ = [
    "DATASETS",
    "Batches",
    "Dataset",
    "ImageBatches",
    "NoisyLabels",
    "binary_task",
    "dataset_names",
    "evaluation_batches",
    "flip_labels",
    "load_dataset",
    "load_folder",
    "register",
    "training_batches",
]
