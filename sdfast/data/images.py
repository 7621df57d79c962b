"""Batches of pictures that stay on the device as uint8, and are cropped, mirrored and shifted there."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdfast.data.batches import Batches
from sdfast.data.fingerprint import content_hash
from sdfast.data.parts import Dataset

__all__ = ["ImageBatches", "evaluation_batches", "training_batches"]

PADDING = 4  # of the papers' augmentation


class ImageBatches(Batches):
    """Mini-batches of uint8 pictures kept on one device, with the papers' augmentation.

    A batch is ``(picture / 255 - mean) / std`` in float32 of pictures that are, each by draws of its own, shifted by up
    to `padding` pixels in each direction with black beside them (a random crop of the padded picture), and mirrored
    with probability ½. Order, shifts and mirrors are a function of (seed, epoch) and the picture's row alone: the same
    on every device, whatever the batch size, and after a resume.

    Args:
        inputs: (N, channels, height, width) uint8.
        labels: (N, ...).
        batch_size: Rows in a batch; the last one may be smaller.
        padding: Pixels of the shift; 0 for none.
        flip: Mirror left and right at random.
        mean: One number a channel, in [0, 1], subtracted; ``None`` is that of `inputs`.
        std: One a channel, divided by; ``None`` divides by nothing.
        shuffle: Draw a new order every epoch.
        seed: Of all draws, non-negative.
        device: Where the pictures are kept; ``None`` leaves them on that of `inputs`.
        drop_last: Leave a smaller last batch out.
        with_indices: Yield (inputs, labels, indices) with the rows' numbers, not (inputs, labels).

    Raises:
        TypeError: `inputs` are no uint8 pictures, or `labels` no tensor.
        ValueError: Sizes do not fit, or an option is impossible; the message names it.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        padding: int = PADDING,
        flip: bool = True,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        shuffle: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
        drop_last: bool = False,
        with_indices: bool = False,
    ) -> None:
        if isinstance(inputs, Tensor) and (inputs.dtype is not torch.uint8 or inputs.dim() != 4):
            shape = tuple(inputs.shape)
            raise TypeError(f"inputs: got {inputs.dtype} of {shape}, wanted uint8 (N, channels, height, width)")
        super().__init__(
            inputs, labels, batch_size, shuffle=shuffle, seed=seed, device=device, drop_last=drop_last,
            with_indices=with_indices,
        )  # fmt: skip
        height, width = self.inputs.shape[2:]
        if isinstance(padding, bool) or not isinstance(padding, int) or not 0 <= padding < min(height, width):
            raise ValueError(f"padding: got {padding!r}, wanted an integer from 0 to {min(height, width) - 1}")
        self.padding = padding
        self.flip = bool(flip)
        self.mean = picture_mean(self.inputs) if mean is None else _per_channel("mean", mean, self.inputs)
        self.std = _per_channel("std", [1.0] * self.inputs.shape[1] if std is None else std, self.inputs)
        if not bool((self.std > 0).all()):
            raise ValueError(f"std: got {self.std.tolist()}, wanted positive numbers")
        padded = F.pad(self.inputs, (padding,) * 4)
        self.inputs = padded[:, :, padding : padding + height, padding : padding + width]
        self._windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, channels, 2p+1, 2p+1, height, width)
        self._scale = (1 / (255 * self.std)).to(torch.float32)[:, None, None]
        self._shift = (-self.mean / self.std).to(torch.float32)[:, None, None]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        draws = self._draws(self.epoch)
        for rows in self._rows():
            batch = (self._pictures(rows, draws), self.labels[rows])
            yield (*batch, rows) if self.with_indices else batch

    def fingerprint(self) -> str:
        """A short hash of contents and augmentation, by which a checkpoint knows its data again."""
        options = [self.padding, self.flip, self.mean.tolist(), self.std.tolist()]
        return content_hash([self.inputs, self.labels, options])

    def _draws(self, epoch: int) -> tuple[Tensor, Tensor] | None:
        """Each row's (vertical, horizontal) offset into the padded picture, and whether it is mirrored."""
        if not self.padding and not self.flip:
            return None
        mixed = int(np.random.SeedSequence([self.seed, epoch, 1]).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator("cpu").manual_seed(mixed)  # on the CPU, as the order
        count = len(self.inputs)
        offsets = torch.randint(2 * self.padding + 1, (2, count), generator=generator, device="cpu")
        mirrored = torch.rand(count, generator=generator, device="cpu") < (0.5 if self.flip else 0.0)
        device = self.inputs.device
        return offsets.to(device, non_blocking=True), mirrored.to(device, non_blocking=True)

    def _pictures(self, rows: Tensor, draws: tuple[Tensor, Tensor] | None) -> Tensor:
        if draws is None:
            pixels = self.inputs[rows]
        else:
            offsets, mirrored = draws
            vertical, horizontal = offsets[:, rows]
            pixels = self._windows[rows, :, vertical, horizontal]
            if self.flip:
                pixels = torch.where(mirrored[rows][:, None, None, None], pixels.flip(3), pixels)
        return torch.addcmul(self._shift, pixels.to(torch.float32), self._scale)


def training_batches(
    data: Dataset,
    labels: Tensor,
    batch_size: int,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    augment: bool = True,
) -> Batches:
    """The training part as batches with indices; uint8 pictures with the papers' augmentation.

    Args:
        data: Of which the training inputs are taken.
        labels: (N, ...) to learn from, such as noisy ones.
        batch_size: Rows in a batch.
        seed: Of order and augmentation.
        device: Where the tensors are kept.
        augment: Shift pictures by up to 4 pixels and mirror them; nothing else is.

    Returns:
        `ImageBatches` for uint8 pictures, else `Batches`.
    """
    if data.train_inputs.dtype is not torch.uint8:
        return Batches(data.train_inputs, labels, batch_size, seed=seed, device=device, with_indices=True)
    return ImageBatches(
        data.train_inputs, labels, batch_size, padding=PADDING if augment else 0, flip=augment, seed=seed,
        device=device, with_indices=True,
    )  # fmt: skip


def evaluation_batches(
    data: Dataset, part: str = "test", labels: Tensor | None = None, *, device: torch.device | str | None = None
) -> Batches:
    """A part as large batches in its own order, without augmentation, the training part's mean subtracted.

    Args:
        data: Of which the part is taken.
        part: ``"test"`` or ``"train"``.
        labels: Instead of the part's own.
        device: Where the tensors are kept.

    Returns:
        `ImageBatches` for uint8 pictures, else `Batches`.
    """
    inputs, own = (data.test_inputs, data.test_labels) if part == "test" else (data.train_inputs, data.train_labels)
    labels = own if labels is None else labels
    if inputs.dtype is not torch.uint8:
        return Batches(inputs, labels, 4096, shuffle=False, device=device)
    mean = picture_mean(data.train_inputs)
    return ImageBatches(inputs, labels, 1024, padding=0, flip=False, mean=mean, shuffle=False, device=device)


def picture_mean(pictures: Tensor) -> Tensor:
    """The mean of each channel of uint8 pictures, in [0, 1], float64 (float32 where a device knows no doubles)."""
    wide = torch.float32 if pictures.device.type == "mps" else torch.float64
    sums = pictures.sum((0, 2, 3), dtype=torch.int64)
    return sums.to(wide) / (255 * pictures.numel() / pictures.shape[1])


def _per_channel(name: str, values: Sequence[float] | Tensor, pictures: Tensor) -> Tensor:
    wide = torch.float32 if pictures.device.type == "mps" else torch.float64
    given = torch.as_tensor(values, dtype=wide, device=pictures.device)
    if given.shape != pictures.shape[1:2] or not bool(given.isfinite().all()):
        raise ValueError(
            f"{name}: got {given.tolist()}, wanted a finite number for each of {pictures.shape[1]} channels"
        )
    return given
