"""Labels that the network's past predictions contradict are left out: SELF, PES, and pruning by confident learning."""

from typing import Any

import torch
from torch import Tensor

from sdfast import _checks
from sdfast.baselines.banked import BankMethod
from sdfast.ops.prediction_bank import PredictionBank
from sdfast.ops.prediction_bank.inspection import check_all_labels
from sdfast.ops.self_distillation import LossStats, self_distillation_loss


def self_ensemble_filtering(
    num_samples: int, num_classes: int, momentum: float = 0.9, warm_up: int = 10
) -> "SelfEnsembleFiltering":
    """The mean cross entropy of the rows whose label is the largest entry of t, the mean of past predictions.

    A sample's first `warm_up` predictions only go in, and all its labels are learned from meanwhile. The paper also
    averages the weights, and learns from the rows left out by a consistency loss; here they are not learned from.

    Args:
        num_samples: Of the training set.
        num_classes: Of the logits.
        momentum: Of the mean.
        warm_up: Epochs.

    Returns:
        The method.

    Reference:
        Nguyen, Mummadi, Ngo, Nguyen, Beggel, Brox 2020, "SELF: Learning to Filter Noisy Labels with Self-Ensembling".
    """
    _checks.check_least("warm_up", warm_up, 1)
    bank = PredictionBank(num_samples, num_classes, momentum)
    return SelfEnsembleFiltering("self-ensemble-filtering", bank, warm_up, momentum=momentum)


def confident_samples(num_samples: int, num_classes: int, warm_up: int = 10) -> "SelfEnsembleFiltering":
    """The mean cross entropy of the rows whose label is what the network predicted an epoch before.

    How progressive early stopping (PES) selects its confident samples. The paper stops early too, layer by layer, by
    training the later layers anew for fewer epochs, and averages predictions over augmentations; here the network
    trains as a whole, and all labels are learned from in the first `warm_up` epochs.

    Args:
        num_samples: Of the training set.
        num_classes: Of the logits.
        warm_up: Epochs.

    Returns:
        The method.

    Reference:
        Bai, Yang, Han, Yang, Li, Mao, Niu, Liu 2021, "Understanding and Improving Early Stopping for Learning with
        Noisy Labels", section 3.
    """
    _checks.check_least("warm_up", warm_up, 1)
    return SelfEnsembleFiltering("confident-samples", PredictionBank(num_samples, num_classes, momentum=0), warm_up)


def confident_learning(
    labels: Tensor, num_classes: int, momentum: float = 0.9, warm_up: int = 10
) -> "ConfidentLearning":
    """The mean cross entropy of the rows of a batch that the confident joint does not take for wrong, after `warm_up`.

    Of the classes whose probability of a sample is at least its mean over the samples so labelled, the largest is the
    one it is counted for; where that is another than its label, the sample is left out. Looked at when an epoch begins.
    The paper takes the probabilities out of sample, from networks that have not seen the sample; here they are the mean
    of past predictions, of a network that has, which is why the warm-up should end before it has learned the noise.

    Args:
        labels: (num_samples,) given labels of the training set.
        num_classes: Of the logits.
        momentum: Of the mean.
        warm_up: Epochs.

    Returns:
        The method.

    Reference:
        Northcutt, Jiang, Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels", section 3.
    """
    _checks.check_tensor("labels", labels)
    _checks.check_least("warm_up", warm_up, 1)
    bank = PredictionBank(len(labels), num_classes, momentum, device=labels.device)
    return ConfidentLearning(bank, check_all_labels(bank, labels), warm_up)


class LabelFiltering(BankMethod):
    """Cross entropy of the rows of a batch that are kept, divided by their number."""

    def __init__(self, name: str, bank: PredictionBank, warm_up: int, **options: Any) -> None:
        super().__init__(name, bank, **options, warm_up=warm_up)
        self.warm_up = warm_up

    def believed(self, labels: Tensor, indices: Tensor) -> Tensor:
        """(N,) whether each row of a batch is learned from; the rows whose label is ignored may be anything."""
        raise NotImplementedError

    def compute(self, logits: Tensor, labels: Tensor, indices: Tensor | None) -> tuple[Tensor, LossStats]:
        """The loss; its predictions go into the bank, which no target is made from."""
        kept = labels != -100
        chosen = torch.where(kept, indices, 0)  # type: ignore[arg-type]
        weight = (kept & self.believed(labels, chosen)).to(torch.float32)
        loss, stats = self_distillation_loss(
            logits, labels, 1.0, source=self.rows(indices), row_weight=weight, reduction="sum", return_stats=True
        )
        return loss / weight.sum().clamp(min=1), stats


class SelfEnsembleFiltering(LabelFiltering):
    """See `self_ensemble_filtering` and `confident_samples`."""

    def believed(self, labels: Tensor, indices: Tensor) -> Tensor:
        """Whether the bank agrees with the label, or has not seen enough to disagree."""
        agrees = self.bank.probabilities(indices).argmax(-1) == labels
        return agrees | (self.bank.seen[indices] < self.warm_up)


class ConfidentLearning(LabelFiltering):
    """See `confident_learning`.

    Attributes:
        labels: (num_samples,) as given.
        pruned: (num_samples,) which samples are left out in this epoch.
    """

    labels: Tensor
    pruned: Tensor

    def __init__(self, bank: PredictionBank, labels: Tensor, warm_up: int) -> None:
        super().__init__("confident-learning", bank, warm_up, momentum=bank.momentum)
        self.register_buffer("labels", labels.clone(), persistent=False)
        self.register_buffer("pruned", torch.zeros_like(labels, dtype=torch.bool))

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Looks at the bank, once the warm-up is over.

        Args:
            epoch: Its number, from 0.
            epochs: Of the whole training.
        """
        super().set_epoch(epoch, epochs)
        if epoch >= self.warm_up:
            self.pruned = confidently_wrong(self.bank.probabilities(), self.labels) & (self.bank.seen > 0)

    def believed(self, labels: Tensor, indices: Tensor) -> Tensor:
        """Whether the sample is not among the pruned."""
        return ~self.pruned[indices]


def confidently_wrong(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Which samples the confident joint counts for another class than their label.

    Args:
        probabilities: (N, C).
        labels: (N,) class indices.

    Returns:
        (N,) booleans.

    Reference:
        Northcutt, Jiang, Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels", equations 1 to 2.
    """
    classes = probabilities.shape[1]
    counts = torch.bincount(labels, minlength=classes)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    thresholds = own.new_zeros(classes).scatter_add(0, labels, own) / counts  # NaN where a class has no sample
    confident = torch.where(probabilities >= thresholds, probabilities, -1.0)
    return (confident.amax(1) >= 0) & (confident.argmax(1) != labels)
