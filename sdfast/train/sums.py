"""What an epoch adds up over its batches, without a wait for the device and with few operations a step."""

import torch
from torch import Tensor

from sdfast.ops.self_distillation import LossStats

# Columns, each a mean over the rows that count in a batch.
MEANS = ("loss", "accuracy", "alpha", "agreement")
AT_ONCE = 64  # steps whose numbers are added together: a small operation takes longer to launch than to run


class EpochSums:
    """Rows that count, each of `MEANS` times the rows it stands for, and clean (correct, known) rows, on the device.

    Args:
        device: Of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self._wide = torch.float32 if device.type == "mps" else torch.float64  # which knows no doubles
        self._device = device
        self._sums = torch.zeros(len(MEANS) + 3, dtype=self._wide, device=device)
        self._means: list[Tensor] = []
        self._kept: list[Tensor | int] = []
        self._clean: list[Tensor] = []

    def add(self, kept: Tensor | int, loss: Tensor, stats: LossStats, clean: tuple[Tensor, Tensor] | None) -> None:
        """Adds a batch: how many rows count, their mean loss and statistics, and clean (correct, known) rows."""
        self._kept.append(kept)
        self._means += (loss.detach(), stats.accuracy, stats.alpha, stats.agreement)
        if clean is not None:
            self._clean += clean
        if len(self._kept) == AT_ONCE:
            self._flush()

    def total(self) -> list[float]:
        """The sums, as the host sees them."""
        self._flush()
        return self._sums.tolist()

    @torch.no_grad()
    def _flush(self) -> None:
        if not self._kept:
            return
        counts = [kept if isinstance(kept, Tensor) else torch.tensor(kept, device=self._device) for kept in self._kept]
        kept = torch.stack(counts).to(self._wide)
        means = torch.stack(self._means).reshape(-1, len(MEANS)).to(self._wide)
        self._sums[0] += kept.sum()
        self._sums[1 : 1 + len(MEANS)] += (means * kept[:, None]).sum(0)
        if self._clean:
            self._sums[1 + len(MEANS) :] += torch.stack(self._clean).reshape(-1, 2).to(self._wide).sum(0)
        self._kept, self._means, self._clean = [], [], []
