"""ProSelfLC: the network's own prediction replaces the label where it is sure, and the more the later it is."""

import math

from torch import Tensor

from sdfast import _checks
from sdfast.baselines.method import Method, row_entropies
from sdfast.ops.self_distillation import LossStats, self_distillation_loss


def pro_self_lc(sharpness: float = 8.0) -> "ProgressiveSelfLabelCorrection":
    """(1 − ε) · CE(y, p) + ε · entropy of p, with ε = g(t) · (1 − entropy of p / log C), differentiated throughout.

    The trust in the network grows with time, g(t) = 1 / (1 + exp(−B · (t / T − 1/2))) in epoch t of T, and for each
    sample with its confidence. As in the authors' code neither the target (1 − ε) y + ε p nor ε is a constant to the
    gradient; they count iterations or epochs, this counts epochs.

    Args:
        sharpness: B, positive: how suddenly the trust comes.

    Returns:
        The method.

    Reference:
        Wang, Hua, Kodirov, Clifton, Robertson 2021, "ProSelfLC: Progressive Self Label Correction for Training Robust
        Deep Neural Networks".
    """
    return ProgressiveSelfLabelCorrection(sharpness)


class ProgressiveSelfLabelCorrection(Method):
    """See `pro_self_lc`."""

    def __init__(self, sharpness: float) -> None:
        if not _checks.is_number(sharpness) or not 0 < sharpness <= _checks.LARGEST:
            raise ValueError(f"sharpness: got {sharpness!r}, wanted a finite number > 0")
        super().__init__("pro-self-lc", sharpness=sharpness)
        self.sharpness = sharpness

    def trust(self) -> float:
        """G of this epoch."""
        return 1 / (1 + math.exp(-self.sharpness * (self.epoch / self.epochs - 0.5)))

    def compute(self, logits: Tensor, labels: Tensor, indices: Tensor | None) -> tuple[Tensor, LossStats]:
        """The loss; the statistics are those of learning from the labels."""
        given, stats = self_distillation_loss(logits, labels, 1.0, reduction="none", return_stats=True)
        entropy = row_entropies(logits)
        share = self.trust() * (1 - entropy / math.log(max(logits.shape[-1], 2)))
        kept = labels != -100
        rows = ((1 - share) * given + share * entropy).where(kept, 0)
        return rows.sum() / kept.sum().clamp(min=1), stats
