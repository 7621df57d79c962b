"""PS-KD: the network of the epoch before teaches the one of today, more and more."""

from torch import Tensor

from sdfast import _checks
from sdfast.baselines.banked import BankMethod
from sdfast.ops.prediction_bank import PredictionBank
from sdfast.ops.self_distillation import LossStats, self_distillation_loss


def ps_kd(num_samples: int, num_classes: int, final_weight: float = 0.8) -> "ProgressiveSelfKnowledge":
    """Cross entropy of (1 − a_t) y + a_t · p of the epoch before, with a_t = a_T · t / T in epoch t = 1 … T.

    Args:
        num_samples: Of the training set.
        num_classes: Of the logits.
        final_weight: a_T, in [0, 1].

    Returns:
        The method.

    Reference:
        Kim et al. 2021, "Self-Knowledge Distillation with Progressive Refinement of Targets", equations 4 to 6.
    """
    _checks.check_share("final_weight", final_weight)
    return ProgressiveSelfKnowledge(PredictionBank(num_samples, num_classes, momentum=0), final_weight)


class ProgressiveSelfKnowledge(BankMethod):
    """See `ps_kd`."""

    def __init__(self, bank: PredictionBank, final_weight: float) -> None:
        super().__init__("ps-kd", bank, final_weight=final_weight)
        self.final_weight = final_weight

    def alpha(self) -> float:
        """The weight of the given label in this epoch."""
        return 1 - self.final_weight * (self.epoch + 1) / self.epochs

    def compute(self, logits: Tensor, labels: Tensor, indices: Tensor | None) -> tuple[Tensor, LossStats]:
        """The loss; a sample without a prediction is learned from its label."""
        return self_distillation_loss(  # type: ignore[return-value]
            logits, labels, self.alpha(), source=self.rows(indices), label_fn="softmax", return_stats=True
        )
