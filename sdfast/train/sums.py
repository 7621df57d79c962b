"""What an epoch adds up over its batches, without a wait for the device and with few operations a step."""

import math
import time

import torch
from torch import Tensor

from sdfast.ops.self_distillation import LossStats
from sdfast.train.history import EpochRecord

# Columns, each a mean over the rows that count in a batch.
MEANS = ("loss", "accuracy", "alpha", "agreement")
_COLUMNS = [2, 0, 4]  # of the state: accuracy, α, agreement
AT_ONCE = 64  # steps whose numbers are added together: a small operation takes longer to launch than to run
MASKED_ROWS = 2**20  # rows of the masks that wait for that


class EpochSums:
    """Rows that count, each of `MEANS` times the rows it stands for, and clean (correct, known) rows, on the device.

    Args:
        device: Of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self._wide = torch.float32 if device.type == "mps" else torch.float64  # which knows no doubles
        self._device = device
        self._sums = torch.zeros(len(MEANS) + 3, dtype=self._wide, device=device)
        self._losses: list[Tensor] = []
        self._stats: list[Tensor] = []  # a state a step, or the three means of it that count
        self._kept: list[Tensor | int] = []
        self._masked = 0
        self._clean: list[Tensor] = []

    def add(
        self, kept: Tensor | int, loss: Tensor, stats: LossStats | Tensor, clean: tuple[Tensor, Tensor] | None
    ) -> None:
        """Adds a batch.

        Args:
            kept: Which rows count, a mask; or how many do.
            loss: Their mean.
            stats: Of the batch, or the state that holds them.
            clean: Rows that are right by the true labels, and rows whose true label is known.
        """
        self._kept.append(kept)
        self._losses.append(loss.detach())
        if isinstance(stats, Tensor):
            self._stats.append(stats)
        else:
            self._stats += (stats.accuracy, stats.alpha, stats.agreement)
        if clean is not None:
            self._clean += clean
        self._masked += kept.numel() if isinstance(kept, Tensor) else 0
        if len(self._kept) == AT_ONCE or self._masked > MASKED_ROWS:
            self._flush()

    def total(self) -> list[float]:
        """The sums, as the host sees them."""
        self._flush()
        return self._sums.tolist()

    @torch.no_grad()
    def _flush(self) -> None:
        if not self._kept:
            return
        kept = self._counts().to(self._wide)
        stats = torch.stack(self._stats)
        columns = [stats[:, at] for at in _COLUMNS] if stats.dim() == 2 else stats.reshape(-1, len(_COLUMNS)).unbind(1)
        means = torch.stack([torch.stack(self._losses), *columns], 1).to(self._wide)
        self._sums[0] += kept.sum()
        self._sums[1 : 1 + len(MEANS)] += (means * kept[:, None]).sum(0)
        if self._clean:
            self._sums[1 + len(MEANS) :] += torch.stack(self._clean).reshape(-1, 2).to(self._wide).sum(0)
        self._losses, self._stats, self._kept, self._clean = [], [], [], []
        self._masked = 0

    def _counts(self) -> Tensor:
        """How many rows of each batch count."""
        masks = [kept for kept in self._kept if isinstance(kept, Tensor)]
        if not masks:
            return torch.tensor(self._kept, device=self._device)
        if len(masks) == len(self._kept) and all(mask.shape == masks[0].shape for mask in masks):
            return torch.stack(masks).flatten(1).sum(1)
        return torch.stack([torch.as_tensor(kept, device=self._device).sum() for kept in self._kept])


def epoch_record(
    epoch: int, sums: list[float], clean_known: bool, eval_accuracy: float | None, rate: float, began: float
) -> EpochRecord:
    """The record of an epoch (from 0) that began at that time of `time.perf_counter`, of what `EpochSums` added up."""
    kept, *weighted, clean_correct, clean_kept = sums
    means = {name: value / kept if kept else math.nan for name, value in zip(MEANS, weighted, strict=True)}
    clean = clean_correct / clean_kept if clean_known and clean_kept else None
    return EpochRecord(
        epoch=epoch + 1,
        clean_accuracy=clean,
        eval_accuracy=eval_accuracy,
        learning_rate=rate,
        seconds=time.perf_counter() - began,
        **means,
    )
