"""The named shapes of the loss benchmarks, those of a CPU or of a GPU, as the device is.

``SDFAST_BENCH_TINY=1`` takes the GPU's groups on any device and no size above 40: a dry run of every line.
"""

import os
from typing import NamedTuple

import torch

TINY = os.environ.get("SDFAST_BENCH_TINY") == "1"
ON_GPU = TINY or torch.cuda.is_available()
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def sized(*sizes: int) -> tuple[int, ...]:
    """The sizes, or in a dry run small ones."""
    return tuple(min(size, 40) for size in sizes) if TINY else sizes


class LossShape(NamedTuple):
    """Of the logits."""

    rows: int
    classes: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of one tensor of them."""
        return self.rows * self.classes * self.dtype.itemsize

    def checked_rows(self) -> int:
        """As many as are checked against float64: all, unless that takes gigabytes."""
        return min(self.rows, max(1, (1 << 26) // self.classes))

    def tolerance(self) -> dict[str, float]:
        """On gradients of a mean, which are of the size 1 / rows; a composition rounds its logarithms to bfloat16."""
        if self.dtype == torch.float32:
            return {"rtol": 1e-4, "atol": 1e-7}
        return {"rtol": 0.1, "atol": 0.05 / self.checked_rows()}


def loss_shape(name: str) -> LossShape:
    """Of a group's name: ``128x10``, or ``32768x1000 bf16``."""
    size, _, dtype = name.partition(" ")
    return LossShape(*sized(*map(int, size.split("x"))), DTYPES[dtype or "float32"])


# 128x10: an MLP on ten classes, all launch cost; x1000: ImageNet; 32000 and more: vocabularies, out of every cache.
_LOSSES_ON_CPU = ("128x10", "128x100", "1024x1000", "4096x1000", "512x32000", "1024x50257")
_LOSSES_ON_GPU = (
    "128x10", "128x100", "1024x1000", "4096x1000", "32768x1000", "4096x32000", "4096x128256",
    "128x10 bf16", "4096x1000 bf16", "32768x256 bf16", "32768x512 bf16", "32768x1000 bf16", "16384x8192 bf16",
    "8192x32000 bf16", "8192x128256 bf16", "4096x152064 bf16", "4096x262144 bf16",
)  # fmt: skip
LOSS_SHAPES = {name: loss_shape(name) for name in (_LOSSES_ON_GPU if ON_GPU else _LOSSES_ON_CPU)}
# The least share of the measured copy rate, of logits read once and the gradient written once.
COPY_SHARES = {"32768x256 bf16": 0.6, "32768x512 bf16": 0.75, "32768x1000 bf16": 0.8} | {
    name: 0.9 for name in _LOSSES_ON_GPU if name.endswith("bf16") and loss_shape(name).classes >= sized(8000)[0]
}
if TINY:
    COPY_SHARES = dict.fromkeys(COPY_SHARES, 0.9)


class LinearShape(NamedTuple):
    """Hidden states (rows, width) and a weight (classes, width)."""

    rows: int
    width: int
    classes: int
    dtype: torch.dtype

    def tolerance(self) -> dict[str, float]:
        """On the gradients of a mean over 256 rows."""
        return {"rtol": 1e-3, "atol": 1e-7} if self.dtype == torch.float32 else {"rtol": 0.1, "atol": 2e-4}


def _linear(classes: int) -> LinearShape:
    return LinearShape(*sized(8192, 4096, classes), torch.bfloat16)


if ON_GPU:
    LINEAR_SHAPES = {f"8192x4096x{n} bf16": _linear(n) for n in (32000, 128256, 152064, 262144)}
else:
    LINEAR_SHAPES = {"2048x512x32000": LinearShape(2048, 512, 32000, torch.float32)}
