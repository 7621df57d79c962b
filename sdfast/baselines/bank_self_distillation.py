"""Self-distillation from the bank: what the network said of a sample before, not what it says now."""

from torch import Tensor

from sdfast.baselines.banked import BankMethod
from sdfast.ops.prediction_bank import PredictionBank
from sdfast.ops.self_distillation import AdaptiveAlpha, LossStats, self_distillation_loss


def bank_self_distillation(
    num_samples: int, num_classes: int, ratio: float = 1.0, momentum: float = 0.9, warm_up: int = 10
) -> "BankSelfDistillation":
    """Cross entropy of α y + (1 − α) hardmax(t), t the mean of past predictions, 1 − α = ratio · accuracy of the batch.

    With ``momentum=0`` t is the prediction of the epoch before, of which the paper's text speaks where its algorithm 1
    takes the current one. Each sample's first `warm_up` predictions only go in, and it is learned from its label: a
    hard target from the first epochs would lock their mistakes in.

    Args:
        num_samples: Of the training set.
        num_classes: Of the logits.
        ratio: λ, non-negative.
        momentum: Of the mean, in [0, 1).
        warm_up: Epochs.

    Returns:
        The method.

    Reference:
        Dong, Hou, Lu, Zhang 2019, "Distillation ≈ Early Stopping?", section 3.2; Laine, Aila 2017, "Temporal
        Ensembling for Semi-Supervised Learning" (the mean).
    """
    return BankSelfDistillation(PredictionBank(num_samples, num_classes, momentum, warm_up=warm_up), ratio)


class BankSelfDistillation(BankMethod):
    """See `bank_self_distillation`."""

    def __init__(self, bank: PredictionBank, ratio: float) -> None:
        super().__init__(
            "bank-self-distillation", bank, ratio=ratio, momentum=bank.momentum, warm_up=bank.warm_up
        )  # fmt: skip
        self.alpha = AdaptiveAlpha(ratio)

    def compute(self, logits: Tensor, labels: Tensor, indices: Tensor | None) -> tuple[Tensor, LossStats]:
        """The loss; the warm-up is the bank's."""
        return self_distillation_loss(  # type: ignore[return-value]
            logits, labels, self.alpha, source=self.rows(indices), label_fn="hardmax", return_stats=True
        )
