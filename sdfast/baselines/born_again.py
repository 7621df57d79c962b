"""Born-again networks: in the second half of the epochs the network starts anew, taught by what it was."""

from typing import Any

import torch
from torch import Tensor, nn

from sdfast import _checks
from sdfast.baselines.banked import BankMethod
from sdfast.baselines.method import stats_of_labels
from sdfast.ops.distillation import distillation_loss
from sdfast.ops.prediction_bank import PredictionBank
from sdfast.ops.self_distillation import LossStats, self_distillation_loss


def born_again(num_samples: int, num_classes: int, alpha: float = 0.5, temperature: float = 1.0) -> "BornAgain":
    """Cross entropy for the first half of the epochs; then Hinton's distillation of a network that begins again.

    After ⌊epochs / 2⌋ epochs the model takes the weights it had when `watch` saw it, and learns by
    α · cross entropy + (1 − α) · T² · KL(q_T ‖ p_T), q being the last prediction the teacher made of each sample while
    it learned. The optimizer and its learning rate go on; give each half a schedule of its own where that matters, or
    train teacher and student apart with `sdfast.train.teacher_sweep` and `distill_rounds`.

    Args:
        num_samples: Of the training set.
        num_classes: Of the logits.
        alpha: The label's weight in the second half, in [0, 1].
        temperature: T of teacher and student.

    Returns:
        The method.

    Reference:
        Furlanello, Lipton, Tschannen, Itti, Anandkumar 2018, "Born Again Neural Networks"; Hinton, Vinyals, Dean 2015,
        "Distilling the Knowledge in a Neural Network".
    """
    _checks.check_share("alpha", alpha)
    if not _checks.is_number(temperature) or not 1e-10 <= temperature <= 1e10:
        raise ValueError(f"temperature: got {temperature!r}, wanted a number > 0, between 1e-10 and 1e10")
    return BornAgain(PredictionBank(num_samples, num_classes, momentum=0), alpha, temperature)


class BornAgain(BankMethod):
    """See `born_again`."""

    def __init__(self, bank: PredictionBank, alpha: float, temperature: float) -> None:
        super().__init__("born-again", bank, alpha=alpha, temperature=temperature)
        self.alpha, self.temperature = alpha, temperature
        self._models: list[nn.Module] = []  # in a list, so that its weights are none of the method's
        self._first: dict[str, Tensor] = {}

    def watch(self, model: nn.Module) -> None:
        """Remembers the model, and the weights that its second life begins with."""
        self._models = [model]
        self._first = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def learns_from_teacher(self) -> bool:
        """Whether this epoch is one of the second half."""
        return 0 < self.epochs // 2 <= self.epoch

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Begins the model again, at the first epoch of the second half.

        Args:
            epoch: Its number, from 0.
            epochs: Of the whole training.

        Raises:
            RuntimeError: No model was watched.
        """
        super().set_epoch(epoch, epochs)
        if epoch == epochs // 2 > 0:
            if not self._models:
                raise RuntimeError(
                    "born-again: knows no model to begin again; call method.watch(model) before training"
                )
            self._models[0].load_state_dict(self._first)

    def compute(self, logits: Tensor, labels: Tensor, indices: Tensor | None) -> tuple[Tensor, LossStats]:
        """The loss; a sample that the teacher never predicted is learned from its label."""
        if not self.learns_from_teacher():
            return self_distillation_loss(  # type: ignore[return-value]
                logits, labels, 1.0, source=self.rows(indices), label_fn="softmax", return_stats=True
            )
        chosen = torch.where(labels != -100, indices, 0)  # type: ignore[arg-type]
        taught = self.bank.seen[chosen] > 0
        teacher = self.bank.probabilities(chosen).log()  # logits of a softmax at temperature 1
        teacher = torch.where(taught[:, None], teacher, 0.0)
        alpha = torch.where(taught, self.alpha, 1.0).to(teacher.dtype)
        loss = distillation_loss(logits, teacher, labels, alpha=alpha, temperature=self.temperature)
        return loss, stats_of_labels(logits, labels)

    def get_extra_state(self) -> dict[str, Any]:
        """The weights of the beginning."""
        return {"first": self._first}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes up those of a run that was cut short."""
        self._first = dict(state["first"])
