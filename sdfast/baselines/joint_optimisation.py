"""Joint optimisation of network and labels, with a prior that keeps the labels from becoming all the same."""

import torch
from torch import Tensor

from sdfast import _checks
from sdfast.baselines.banked import BankMethod
from sdfast.baselines.method import mean_entropy
from sdfast.ops.prediction_bank import PredictionBank
from sdfast.ops.self_distillation import LossStats, self_distillation_loss


def joint_optimisation(
    num_samples: int,
    num_classes: int,
    prior_weight: float = 1.2,
    entropy_weight: float = 0.8,
    momentum: float = 0.9,
    warm_up: int = 10,
) -> "JointOptimisation":
    """KL(t ‖ p) + a · KL(prior ‖ mean p of the batch) + b · entropy of p, t the mean of past predictions, prior 1 / C.

    In the first `warm_up` epochs t = y. The paper replaces the labels after each epoch by the mean of the last ten
    epochs' predictions, after 70 epochs at a high learning rate, and trains a second network on them; here t is an
    exponential mean, and there is one network.

    Args:
        num_samples: Of the training set.
        num_classes: Of the logits.
        prior_weight: a.
        entropy_weight: b.
        momentum: Of the mean.
        warm_up: Epochs.

    Returns:
        The method.

    Reference:
        Tanaka, Ikami, Yamasaki, Aizawa 2018, "Joint Optimization Framework for Learning with Noisy Labels",
        equations 3 to 9.
    """
    for name, value in (("prior_weight", prior_weight), ("entropy_weight", entropy_weight)):
        if not _checks.is_number(value) or not 0 <= value <= _checks.LARGEST:
            raise ValueError(f"{name}: got {value!r}, wanted a finite number >= 0")
    bank = PredictionBank(num_samples, num_classes, momentum, warm_up=warm_up)
    return JointOptimisation(bank, prior_weight, entropy_weight)


class JointOptimisation(BankMethod):
    """See `joint_optimisation`."""

    def __init__(self, bank: PredictionBank, prior_weight: float, entropy_weight: float) -> None:
        super().__init__(
            "joint-optimisation", bank, prior_weight=prior_weight, entropy_weight=entropy_weight,
            momentum=bank.momentum, warm_up=bank.warm_up,
        )  # fmt: skip
        self.prior_weight, self.entropy_weight = prior_weight, entropy_weight

    def compute(self, logits: Tensor, labels: Tensor, indices: Tensor | None) -> tuple[Tensor, LossStats]:
        """The loss with both regularisers; the warm-up is the bank's."""
        loss, stats = self_distillation_loss(
            logits, labels, 0.0, source=self.rows(indices), label_fn="softmax", loss="kl", return_stats=True
        )
        kept = labels != -100
        p = logits.softmax(-1, dtype=torch.float32 if logits.element_size() == 2 else None)
        mean = torch.where(kept[:, None], p, 0).sum(0) / kept.sum().clamp(min=1)
        prior = 1 / logits.shape[-1]
        collapse = (prior * (prior / mean.clamp(min=1e-12)).log()).sum()  # KL(prior ‖ mean)
        collapse = torch.where(kept.any(), collapse, 0)
        return loss + self.prior_weight * collapse + self.entropy_weight * mean_entropy(logits, labels), stats
