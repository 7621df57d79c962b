"""One's own data from a folder: NumPy archives, or a folder of pictures for each class."""

import math
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdfast.data import vision
from sdfast.data.parts import Dataset

__all__ = ["load_folder"]

PARTS = ("train", "test")


def load_folder(folder: str | os.PathLike, *, test_fraction: float | None = None, seed: int = 0) -> Dataset:
    """Reads a data set of one's own.

    The folder holds either of

    - ``train.npz`` and ``test.npz``, or one ``*.npz`` that is then split; each with arrays ``inputs`` and ``labels``;
    - ``train/`` and ``test/``, or the classes themselves, which are then split; in each, one folder of pictures per
      class, all of one size (read by torchvision).

    Inputs of uint8 with four dimensions are pictures (N, channels, height, width) and stay uint8; all others become
    float32. Labels are integers from 0 on.

    Args:
        folder: With the files.
        test_fraction: Share of the test part where there is none, in (0, 1); by default 0.25.
        seed: Of that split.

    Returns:
        The data set, named after the folder.

    Raises:
        ValueError: The folder does not hold that; the message says what is wrong with which file.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ValueError(f"folder: there is no folder {place}")
    archives = sorted(place.glob("*.npz"))
    if archives:
        parts, classes = _archives(place, archives), None
    else:
        parts, classes = _class_folders(place)
    if "test" in parts and test_fraction is not None:
        raise ValueError(f"test_fraction: got {test_fraction}, but {place} has a test part of its own")
    if "test" not in parts:
        parts = _split(*parts["train"], 0.25 if test_fraction is None else test_fraction, seed, place)
    (train_inputs, train_labels), (test_inputs, test_labels) = parts["train"], parts["test"]
    if train_inputs.shape[1:] != test_inputs.shape[1:] or train_inputs.dtype != test_inputs.dtype:
        shapes = f"{tuple(train_inputs.shape)} of {train_inputs.dtype} and {tuple(test_inputs.shape)}"
        raise ValueError(f"folder: {place}: training and test inputs differ: {shapes} of {test_inputs.dtype}")
    count = classes or int(max(train_labels.max(), test_labels.max())) + 1
    if count < 2:
        raise ValueError(f"folder: {place} has one class, wanted at least two")
    return Dataset(train_inputs, train_labels, test_inputs, test_labels, count, place.resolve().name)


def _archives(place: Path, archives: list[Path]) -> dict[str, tuple[Tensor, Tensor]]:
    names = {path.stem: path for path in archives}
    if "train" in names:
        return {part: _archive(names[part]) for part in PARTS if part in names}
    if len(archives) > 1:
        found = ", ".join(path.name for path in archives)
        raise ValueError(f"folder: {place} holds {found}, wanted train.npz and test.npz, or one archive")
    return {"train": _archive(archives[0])}


def _archive(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = {"inputs", "labels"} - set(archive)
            if missing:
                raise ValueError(f"has no array {', '.join(sorted(missing))}, only {', '.join(sorted(archive))}")
            inputs, labels = archive["inputs"], archive["labels"]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"folder: {path}: {error}") from error
    if inputs.ndim < 2 or labels.ndim != 1 or len(inputs) != len(labels) or not len(labels):
        raise ValueError(
            f"folder: {path}: got inputs {inputs.shape} and labels {labels.shape}, wanted (N, ...) and (N,)"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"folder: {path}: got labels of {labels.dtype}, wanted integers from 0 on")
    if inputs.dtype.kind not in "fiub":
        raise ValueError(f"folder: {path}: got inputs of {inputs.dtype}, wanted numbers")
    pictures = inputs.dtype == np.uint8 and inputs.ndim == 4
    kept = torch.from_numpy(np.ascontiguousarray(inputs if pictures else inputs.astype(np.float32)))
    return kept, torch.from_numpy(labels.astype(np.int64))


def _class_folders(place: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    folders = {path.name: path for path in sorted(place.iterdir()) if path.is_dir()}
    if not folders:
        raise ValueError(f"folder: {place} holds no .npz file and no folders of pictures")
    parts = {part: folders[part] for part in PARTS if part in folders} if "train" in folders else {"train": place}
    read = {part: _pictures(path) for part, path in parts.items()}
    classes = {part: names for part, (_, names) in read.items()}
    if len({tuple(names) for names in classes.values()}) > 1:
        raise ValueError(f"folder: {place}: the classes differ: {classes['train']} in train, {classes['test']} in test")
    return {part: tensors for part, (tensors, _) in read.items()}, len(classes["train"])


def _pictures(place: Path) -> tuple[tuple[Tensor, Tensor], list[str]]:
    try:
        pictures = vision.torchvision_datasets().ImageFolder(place)
    except FileNotFoundError as error:
        raise ValueError(f"folder: {place}: {error}") from error
    first, inputs = None, []
    for path, _ in pictures.samples:
        try:
            pixels = np.array(pictures.loader(path), dtype=np.uint8)
        except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: of a PNG with broken chunks
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"folder: {path} is no readable picture: {reason}") from error
        first = pixels.shape if first is None else first
        if pixels.shape != first:
            raise ValueError(f"folder: {path} has {pixels.shape} pixels, the first {first}; make all of one size")
        inputs.append(pixels)
    stacked = torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2).contiguous()
    return (stacked, torch.tensor(pictures.targets, dtype=torch.int64)), pictures.classes


def _split(inputs: Tensor, labels: Tensor, fraction: float, seed: int, place: Path) -> dict[str, tuple[Tensor, Tensor]]:
    test_rows = math.ceil(fraction * len(labels))
    if not 0 < test_rows < len(labels):
        raise ValueError(f"test_fraction: got {fraction}, which leaves no row of the {len(labels)} in {place} to train")
    order = torch.randperm(len(labels), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    rows = {"test": order[:test_rows], "train": order[test_rows:]}
    return {part: (inputs[chosen], labels[chosen]) for part, chosen in rows.items()}
