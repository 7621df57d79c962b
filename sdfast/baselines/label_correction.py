"""Labels that turn into the network's own predictions once it has learned: SELC, self-adaptive training."""

import torch
from torch import Tensor

from sdfast import _checks
from sdfast.baselines.banked import BankMethod
from sdfast.ops.prediction_bank import PredictionBank
from sdfast.ops.self_distillation import LossStats, self_distillation_loss


def selc(labels: Tensor, num_classes: int, momentum: float = 0.9, warm_up: int = 10) -> "LabelCorrection":
    """Cross entropy of t alone, t ← β t + (1 − β) p from t = y, after `warm_up` epochs of plain cross entropy.

    The paper finds the end of the warm-up by a clustering of the losses; here it is a number.

    Args:
        labels: (num_samples,) given labels of the training set.
        num_classes: Of the logits.
        momentum: β.
        warm_up: Epochs.

    Returns:
        The method.

    Reference:
        Lu, He 2022, "SELC: Self-Ensemble Label Correction Improves Learning with Noisy Labels", equations 3 to 5.
    """
    return LabelCorrection("selc", labels, num_classes, momentum, warm_up)


def self_adaptive_training(
    labels: Tensor, num_classes: int, momentum: float = 0.9, warm_up: int = 10
) -> "LabelCorrection":
    """As `selc`, with the rows weighted by w = max_c t_c: Σ_i w_i · CE(t_i, p_i) / Σ_i w_i.

    The paper's warm-up is 60 epochs of 200.

    Args:
        labels: (num_samples,) given labels of the training set.
        num_classes: Of the logits.
        momentum: β.
        warm_up: Epochs.

    Returns:
        The method.

    Reference:
        Huang, Zhang, Zhang 2020, "Self-Adaptive Training: beyond Empirical Risk Minimization", algorithm 1.
    """
    return LabelCorrection("self-adaptive-training", labels, num_classes, momentum, warm_up, confidence_weights=True)


class LabelCorrection(BankMethod):
    """See `selc` and `self_adaptive_training`."""

    def __init__(
        self,
        name: str,
        labels: Tensor,
        num_classes: int,
        momentum: float,
        warm_up: int,
        *,
        confidence_weights: bool = False,
    ) -> None:
        _checks.check_tensor("labels", labels)
        _checks.check_least("warm_up", warm_up, 0)
        bank = PredictionBank(
            len(labels), num_classes, momentum, order="write_then_read", bias_correction=False, device=labels.device
        )
        bank.start_from(labels)
        super().__init__(name, bank, momentum=bank.momentum, warm_up=warm_up)
        self.warm_up = warm_up
        self.confidence_weights = confidence_weights

    def compute(self, logits: Tensor, labels: Tensor, indices: Tensor | None) -> tuple[Tensor, LossStats]:
        """The loss, plain cross entropy in the warm-up."""
        if self.epoch < self.warm_up:
            return self_distillation_loss(logits, labels, 1.0, return_stats=True)  # type: ignore[return-value]
        rows = self.rows(indices)
        if not self.confidence_weights:
            return self_distillation_loss(  # type: ignore[return-value]
                logits, labels, 0.0, source=rows, label_fn="softmax", return_stats=True
            )
        with torch.no_grad():  # what the kernel is about to write, which the weights' sum has to know beforehand
            predicted = logits.softmax(-1, dtype=torch.float32 if logits.element_size() == 2 else None)
            target = torch.lerp(predicted, rows.probabilities().to(predicted.dtype), self.bank.momentum)
            weight = torch.where(labels == -100, 0, target.amax(-1))
            divisor = torch.where(weight.sum() == 0, 1, weight.sum())
        loss, stats = self_distillation_loss(
            logits, labels, 0.0, source=rows, label_fn="softmax", row_weight=weight, reduction="sum", return_stats=True
        )
        return loss / divisor, stats
