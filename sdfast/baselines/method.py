"""What a method is to the trainer: a loss of a batch, with whatever it remembers of the batches before."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdfast.ops.self_distillation import LossStats, self_distillation_loss


class Method(nn.Module):
    """A way to learn from labels that may be wrong: ``method(logits, labels, indices)`` is the loss of a batch.

    What it remembers of earlier batches is in its `state_dict`. In a loop of one's own call `set_epoch` before each
    epoch; `sdfast.train.SelfDistiller` does.

    Attributes:
        needs_indices: Whether `forward` wants indices.
        looks_into_model: Whether `watch` hooks onto modules, which compiled code would not call.

    Args:
        name: As the command line knows it.
        loss: ``loss(logits, labels, return_stats=True)``, where the method needs no more than that.
        options: What it was made with, for its printed form and the checkpoints.
    """

    needs_indices = False
    looks_into_model = False

    def __init__(self, name: str, loss: Callable[..., Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.name = name
        self.options = options
        self.epoch, self.epochs = 0, 1
        self._loss = loss

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Tells which epoch begins.

        Args:
            epoch: Its number, from 0.
            epochs: Of the whole training.
        """
        self.epoch, self.epochs = epoch, epochs

    def watch(self, model: nn.Module) -> None:
        """Tells which model is trained; a method that looks into it does so here."""

    def forward(
        self, logits: Tensor, labels: Tensor, indices: Tensor | None = None, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, LossStats]:
        """The mean loss of a batch.

        Args:
            logits: (N, C), or what `predictions` takes them from.
            labels: (N,) class indices.
            indices: (N,) which training sample each row is, where the method keeps something of each.
            return_stats: Return (loss, `sdfast.LossStats`).

        Returns:
            The loss, or (loss, stats).

        Raises:
            ValueError: The method needs indices, and there are none.
        """
        if self.needs_indices and indices is None:
            raise ValueError(
                f"indices: the method {self.name} keeps something of each training sample and wants its index, got "
                "None; use Batches(…, with_indices=True) or a data set of (inputs, label, index)"
            )
        loss, stats = self.compute(logits, labels, indices)
        return (loss, stats) if return_stats else loss

    def compute(self, logits: Tensor, labels: Tensor, indices: Tensor | None) -> tuple[Tensor, LossStats]:
        """The loss and its statistics."""
        return self._loss(logits, labels, return_stats=True)  # type: ignore[misc]

    def predictions(self, logits: Tensor) -> Tensor:
        """The (N, C) logits whose accuracy counts, of what the model gave in training."""
        return logits

    def extra_repr(self) -> str:
        """The name and the options."""
        return ", ".join([repr(self.name), *(f"{name}={value!r}" for name, value in self.options.items())])


@torch.no_grad()
def stats_of_labels(logits: Tensor, labels: Tensor) -> LossStats:
    """The statistics of learning from the labels alone."""
    _, stats = self_distillation_loss(logits.detach(), labels, 1.0, return_stats=True)
    return stats


def row_entropies(logits: Tensor) -> Tensor:
    """(N,) −Σ p log p, with its gradient."""
    log_p = logits.float().log_softmax(-1) if logits.element_size() == 2 else logits.log_softmax(-1)
    return -(log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p)).sum(-1)


def mean_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Its mean over the rows kept."""
    kept = labels != -100
    return torch.where(kept, row_entropies(logits), 0).sum() / kept.sum().clamp(min=1)
