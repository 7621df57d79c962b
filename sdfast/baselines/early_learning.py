"""Early-learning regularisation: what a network believed early holds it back from memorising."""

from torch import Tensor

from sdfast import _checks
from sdfast.baselines.banked import BankMethod
from sdfast.baselines.method import stats_of_labels
from sdfast.ops.prediction_bank import PredictionBank, elr_loss
from sdfast.ops.self_distillation import LossStats


def elr(num_samples: int, num_classes: int, strength: float = 7.0, momentum: float = 0.9) -> "EarlyLearning":
    """Cross entropy + λ · log(1 − ⟨t, p⟩), t ← β t + (1 − β) p from t = 0, written before it is read.

    The defaults are the paper's for CIFAR-100; for CIFAR-10 it takes λ = 3 and β = 0.7. p is cut off at 1e-4 and
    1 − 1e-4, as in the authors' code. The loss is unbounded below: its curve says little.

    Args:
        num_samples: Of the training set.
        num_classes: Of the logits.
        strength: λ.
        momentum: β.

    Returns:
        The method.

    Reference:
        Liu, Niles-Weed, Razavian, Fernandez-Granda 2020, "Early-Learning Regularization Prevents Memorization of Noisy
        Labels", equation 6 and algorithm 1.
    """
    bank = PredictionBank(num_samples, num_classes, momentum, order="write_then_read", bias_correction=False)
    return EarlyLearning(bank, strength)


class EarlyLearning(BankMethod):
    """See `elr`."""

    def __init__(self, bank: PredictionBank, strength: float) -> None:
        if not _checks.is_number(strength) or not 0 <= strength <= _checks.LARGEST:
            raise ValueError(f"strength: got {strength!r}, wanted a finite number >= 0")
        super().__init__("elr", bank, strength=strength, momentum=bank.momentum)
        self.strength = strength

    def compute(self, logits: Tensor, labels: Tensor, indices: Tensor | None) -> tuple[Tensor, LossStats]:
        """The loss; the statistics are those of learning from the labels."""
        loss = elr_loss(logits, labels, self.rows(indices), strength=self.strength, clamp=1e-4)
        return loss, stats_of_labels(logits, labels)
