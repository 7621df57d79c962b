"""Co-teaching: two networks, each learning from the rows that the other finds easy."""

from typing import Any

import torch
from torch import Tensor, nn

from sdfast import _checks
from sdfast.baselines.method import Method, stats_of_labels
from sdfast.ops.self_distillation import LossStats, SmallLoss, self_distillation_loss


def co_teaching(forget_rate: float, warm_up: int = 10) -> "CoTeaching":
    """Each of two networks' cross entropy over the rows of a batch on which the other's is smallest.

    The share of rows is 1 − forget_rate · min(t / warm_up, 1) in epoch t, and a network's loss the mean over its rows.
    The model is `TwoNetworks`, whose logits in training are (2, N, C); one optimizer holds the parameters of both. The
    authors' code divides by the number of rows a second time, which this does not.

    Args:
        forget_rate: τ, the share of wrong labels as far as it is known, in [0, 1).
        warm_up: T_k, the epochs in which the share falls.

    Returns:
        The method.

    Reference:
        Han et al. 2018, "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels",
        algorithm 1.
    """
    return CoTeaching(forget_rate, warm_up)


class TwoNetworks(nn.Module):
    """Two networks of one task: both logits, (2, N, C), in training mode, and the first one's in evaluation mode.

    Args:
        first: Maps inputs to (N, C) logits.
        second: The same with other initial weights.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits."""
        if not self.training:
            return self.first(inputs)
        return torch.stack([self.first(inputs), self.second(inputs)])


class CoTeaching(Method):
    """See `co_teaching`."""

    def __init__(self, forget_rate: float, warm_up: int) -> None:
        if not _checks.is_number(forget_rate) or not 0 <= forget_rate < 1:
            raise ValueError(f"forget_rate: got {forget_rate!r}, wanted a number in [0, 1)")
        _checks.check_least("warm_up", warm_up, 1)
        super().__init__("co-teaching", forget_rate=forget_rate, warm_up=warm_up)
        self.forget_rate, self.warm_up = forget_rate, warm_up

    def keep(self) -> float:
        """The share of rows learned from in this epoch."""
        return 1 - self.forget_rate * min(self.epoch / self.warm_up, 1)

    def compute(self, logits: Tensor, labels: Tensor, indices: Tensor | None) -> tuple[Tensor, LossStats]:
        """The sum of the two networks' losses; the statistics are the first one's."""
        if logits.dim() != 3 or len(logits) != 2:
            shape = _checks.shape_text(logits)
            raise ValueError(f"logits: got shape {shape}, wanted (2, N, C), as of TwoNetworks in training mode")
        first, second = logits
        kept = (labels != -100).sum()
        wanted = SmallLoss(self.keep()).rows_of(kept).clamp(min=1)
        total = logits.new_zeros(())
        for own, peer in ((first, second), (second, first)):
            rule = SmallLoss(self.keep(), logits=peer)
            loss: Any = self_distillation_loss(own, labels, 1.0, row_weight=rule, reduction="sum")
            total = total + loss / wanted
        return total, stats_of_labels(first, labels)

    def predictions(self, logits: Tensor) -> Tensor:
        """The first network's."""
        return logits[0]
