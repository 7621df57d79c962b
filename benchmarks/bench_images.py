"""One pass over uint8 pictures with the papers' augmentation: pad by 4 and crop, mirror, divide, subtract the mean.

`sdfast.data.ImageBatches` against a DataLoader of two persistent workers whose transforms are torchvision's, or written
in NumPy. A pass without draws is checked against the arithmetic of the definition before anything is timed.
"""

import functools
import importlib
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Case, interleaved, measure
from sdfast.data import ImageBatches

PEERS = {"best DataLoader": "DataLoader"}
TARGETS = {"5120 CIFAR pictures, batch 128": {"sdfast": (0.2,)}}
GROUPS = list(TARGETS)
ROWS = ("sdfast", "DataLoader: torchvision", "DataLoader: NumPy")

BATCH, PADDING, WORKERS = 128, 4, 2


@functools.lru_cache(maxsize=1)
def pictures(group):
    """As many as the group's name says."""
    count = int(group.split()[0])
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (count,))


@functools.lru_cache
def torchvision_transforms():
    """torchvision.transforms, also of a build for another torch.

    Beside a CPU-only torch the import of a build for CUDA stops where it describes two operators for detection, which
    no transform needs. They are declared, and the import is tried again.
    """
    try:
        return importlib.import_module("torchvision.transforms")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    transforms = importlib.import_module("torchvision.transforms")
    transforms.operators_for_the_import = library  # which end with it
    return transforms


class NumpyPictures(Dataset):
    """Each picture padded, cropped, mirrored and shifted by NumPy."""

    def __init__(self, pixels, labels, mean):
        self.pixels, self.labels, self.mean = pixels.numpy(), labels.numpy(), mean.numpy()[:, None, None]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        padded = np.pad(self.pixels[index], ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
        top, left, mirror = torch.randint(2 * PADDING + 1, (3,)).tolist()
        picture = padded[:, top : top + 32, left : left + 32]
        picture = picture[:, :, ::-1] if mirror % 2 else picture
        return picture.astype(np.float32) / np.float32(255) - self.mean, self.labels[index]


class TorchvisionPictures(Dataset):
    """PIL pictures through torchvision's transforms, as its own data sets give them."""

    def __init__(self, pixels, labels, mean):
        from PIL import Image

        transforms = torchvision_transforms()

        self.pictures = [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).numpy()]
        self.labels = labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, PADDING),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean.tolist(), [1.0, 1.0, 1.0]),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(self.pictures[index]), self.labels[index]


def one_pass(batches):
    """How many pictures came."""
    return sum(len(inputs) for inputs, _ in batches)


def prepare(group, name):
    """A row's pass, checked."""
    pixels, labels = pictures(group)
    plain = ImageBatches(pixels, labels, BATCH, padding=0, flip=False, shuffle=False)
    got = torch.cat([inputs for inputs, _ in plain])
    torch.testing.assert_close(got.double(), pixels.double() / 255 - plain.mean[:, None, None], rtol=0, atol=1e-6)
    if name == "sdfast":
        batches = ImageBatches(pixels, labels, BATCH, padding=PADDING)
    else:
        try:
            kind = TorchvisionPictures if "torchvision" in name else NumpyPictures
            data = kind(pixels, labels, plain.mean.float())
        except ImportError as error:
            pytest.skip(str(error))
        batches = DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    if one_pass(batches) != len(labels):
        raise SystemExit(f"bench_images: {name} left pictures out")
    floor = pixels.numel() * (1 + 4)  # each pixel read once as a byte, written once as a float32
    return Case(lambda: one_pass(batches), floor_bytes=floor, rounds=3, about={"dtype": "float32"})


@interleaved(GROUPS, ROWS)
def test_pass(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)
