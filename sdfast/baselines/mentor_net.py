"""MentorNet with its predefined curriculum: the rows of a batch whose loss is below a moving percentile."""

import torch
from torch import Tensor

from sdfast import _checks
from sdfast.baselines.method import Method
from sdfast.ops.self_distillation import LossStats, self_distillation_loss


def mentor_net(percentile: float = 0.7, decay: float = 0.95, burn_in: float = 0.2) -> "MentorNet":
    """The mean cross entropy of the rows whose own is at most λ, self-paced learning.

    λ is the moving average over batches of the losses' percentile: λ ← decay · λ + (1 − decay) · percentile, that of
    the first batch at first. In the first share `burn_in` of the epochs all rows are learned from while λ settles. The
    paper's other mentor, a network that learns the weights from a part of the data whose labels are known, is not here.

    Args:
        percentile: Of the losses of a batch, in (0, 1]: about the share of right labels.
        decay: Of the moving average, in [0, 1).
        burn_in: A share of the epochs.

    Returns:
        The method.

    Reference:
        Jiang, Zhou, Leung, Li, Fei-Fei 2018, "MentorNet: Learning Data-Driven Curriculum for Very Deep Neural Networks
        on Corrupted Labels", sections 3 and 4 (the predefined curriculum; algorithm 2's moving percentile).
    """
    _checks.check_share("percentile", percentile)
    if percentile == 0:
        raise ValueError("percentile: got 0, wanted a number in (0, 1]: no row would be learned from")
    _checks.check_share("decay", decay)
    if decay == 1:
        raise ValueError("decay: got 1, wanted a number in [0, 1): the threshold would never move")
    _checks.check_share("burn_in", burn_in)
    return MentorNet(percentile, decay, burn_in)


class MentorNet(Method):
    """See `mentor_net`.

    Attributes:
        threshold: () λ; NaN before the first batch.
    """

    threshold: Tensor

    def __init__(self, percentile: float, decay: float, burn_in: float) -> None:
        super().__init__("mentor-net", percentile=percentile, decay=decay, burn_in=burn_in)
        self.percentile, self.decay, self.burn_in = percentile, decay, burn_in
        self.register_buffer("threshold", torch.tensor(torch.nan))

    def compute(self, logits: Tensor, labels: Tensor, indices: Tensor | None) -> tuple[Tensor, LossStats]:
        """The loss; a batch in training mode moves the threshold first."""
        losses, stats = self_distillation_loss(logits, labels, 1.0, reduction="none", return_stats=True)
        kept = labels != -100
        moves = self.training and torch.is_grad_enabled()
        threshold = self._moved(losses.detach(), kept) if moves else self.threshold
        easy = kept if self.epoch < self.burn_in * self.epochs else kept & ~(losses > threshold)
        return losses.where(easy, 0).sum() / easy.sum().clamp(min=1), stats

    def _moved(self, losses: Tensor, kept: Tensor) -> Tensor:
        """The threshold after this batch; one without a row, or with a loss that is not finite, moves nothing."""
        found = torch.nanquantile(torch.where(kept, losses, torch.nan).to(self.threshold.dtype), self.percentile)
        moved = torch.where(self.threshold.isnan(), found, self.decay * self.threshold + (1 - self.decay) * found)
        self.threshold = torch.where(found.isfinite(), moved, self.threshold)
        return self.threshold
