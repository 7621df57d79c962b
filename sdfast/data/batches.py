"""Batches of tensors that stay on the device."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sdfast import _checks, _devices
from sdfast.data.fingerprint import content_hash

__all__ = ["Batches"]


class Batches:
    """Mini-batches of tensors kept, shuffled and gathered on one device.

    The order is a function of (seed, epoch) alone, the same on every device. Each pass takes the next epoch's order;
    `set_epoch` chooses one.

    Args:
        inputs: (N, ...).
        labels: (N, ...).
        batch_size: Rows in a batch; the last one may be smaller.
        shuffle: Draw a new order every epoch.
        seed: Of the order, non-negative.
        device: Where the tensors are kept; ``None`` leaves them on that of `inputs`.
        drop_last: Leave a smaller last batch out.
        with_indices: Yield (inputs, labels, indices) with the rows' numbers, not (inputs, labels).

    Raises:
        TypeError: `inputs` or `labels` is no tensor.
        ValueError: Sizes do not fit, or an option is impossible; the message names it.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
        drop_last: bool = False,
        with_indices: bool = False,
    ) -> None:
        for name, value in (("inputs", inputs), ("labels", labels)):
            _checks.check_tensor(name, value)
        if inputs.dim() == 0 or labels.dim() == 0 or len(inputs) != len(labels):
            shapes = f"inputs {_checks.shape_text(inputs)} and labels {_checks.shape_text(labels)}"
            raise ValueError(f"labels: got {shapes}, wanted as many rows in both")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size!r}, wanted an integer >= 1")
        if len(inputs) < (batch_size if drop_last else 1):
            raise ValueError(f"inputs: {len(inputs)} rows make no batch of {batch_size} (drop_last={drop_last})")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed: got {seed!r}, wanted an integer >= 0")
        place = inputs.device if device is None else _devices.usable(device)
        self.inputs = inputs.to(place)
        self.labels = labels.to(place)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.with_indices = with_indices
        self.epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.inputs), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for rows in self._rows():
            batch = (self.inputs[rows], self.labels[rows])
            yield (*batch, rows) if self.with_indices else batch

    def set_epoch(self, epoch: int) -> None:
        """The next pass takes this epoch's order."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch: got {epoch!r}, wanted an integer >= 0")
        self.epoch = epoch

    def order(self, epoch: int) -> Tensor:
        """The row numbers in an epoch's order, on the device."""
        if not self.shuffle:
            return torch.arange(len(self.inputs), device=self.inputs.device)
        # Drawn on the CPU: a GPU's generator would give another order than the CPU's.
        mixed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator("cpu").manual_seed(mixed)
        order = torch.randperm(len(self.inputs), generator=generator, device="cpu")
        return order.to(self.inputs.device, non_blocking=True)

    def fingerprint(self) -> str:
        """A short hash of the tensors' contents, by which a checkpoint knows its data again."""
        return content_hash([self.inputs, self.labels])

    def _rows(self) -> Iterator[Tensor]:
        """The row numbers of each batch of the next epoch."""
        order = self.order(self.epoch)
        self.epoch += 1
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]
