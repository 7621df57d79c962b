"""How one network is trained: what the experiments and the rounds keep fixed from network to network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from sdfast import _checks, _devices
from sdfast.data.batches import Batches
from sdfast.data.images import evaluation_batches, training_batches
from sdfast.data.parts import Dataset
from sdfast.ops.self_distillation import AdaptiveAlpha, ClipLabel
from sdfast.train.history import History
from sdfast.train.self_distiller import SelfDistiller

__all__ = ["Recipe"]

SCHEDULES = ("cosine", "constant")
FUSED_ON = ("cpu", "cuda")  # where torch has SGD as one kernel, not a loop over small tensors


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum and a schedule of its learning rate, on batches that stay on the device.

    Attributes:
        epochs: Passes over the training data.
        batch_size: Rows in a step.
        learning_rate: At the start.
        momentum: Of SGD.
        weight_decay: Of SGD.
        schedule: ``"cosine"``, falling to 0 at the last epoch, or ``"constant"``.
        augment: Shift and mirror uint8 pictures; other inputs are never changed.
        device: Where to train.
        amp: As in `SelfDistiller`.
        compile: Train through ``torch.compile``.
    """

    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    augment: bool = True
    device: str = "cpu"
    amp: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, wanted an integer >= 1")
        for name in ("learning_rate", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not _checks.is_number(value) or not 0 <= value < float("inf"):
                raise ValueError(f"{name}: got {value!r}, wanted a finite number >= 0")
        _checks.check_option("schedule", self.schedule, SCHEDULES)
        _devices.usable(self.device)

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """SGD of the model's parameters, which are on the device already; one kernel updates them all.

        Args:
            model: To train.

        Returns:
            The optimizer.
        """
        return torch.optim.SGD(
            model.parameters(), lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay,
            fused=torch.device(self.device).type in FUSED_ON,
        )  # fmt: skip

    def distiller(
        self,
        model: nn.Module,
        *,
        alpha: float | AdaptiveAlpha = 1.0,
        loss: str = "cross_entropy",
        label_fn: str | ClipLabel = "hardmax",
    ) -> SelfDistiller:
        """The trainer of a fresh network; α = 1 is plain training.

        Args:
            model: To train.
            alpha: Weight of the given label.
            loss: As in `sdfast.self_distillation_loss`.
            label_fn: As there.

        Returns:
            The trainer.
        """
        model = model.to(self.device)
        optimizer = self.optimizer(model)
        scheduler = CosineAnnealingLR(optimizer, self.epochs) if self.schedule == "cosine" else None
        return SelfDistiller(
            model, optimizer, alpha=alpha, loss=loss, label_fn=label_fn, scheduler=scheduler, device=self.device,
            amp=self.amp, compile=self.compile,
        )  # fmt: skip

    def batches(self, data: Dataset, labels: Tensor, seed: int) -> Batches:
        """The training part with these labels, and indices."""
        return training_batches(data, labels, self.batch_size, seed=seed, device=self.device, augment=self.augment)

    def train(
        self,
        make_model: Callable[[], nn.Module],
        data: Dataset,
        labels: Tensor,
        seed: int,
        *,
        alpha: float | AdaptiveAlpha = 1.0,
        loss: str = "cross_entropy",
        evaluate: bool = True,
        callbacks: Sequence[Callable[[SelfDistiller, History], object]] = (),
        checkpoint: str | None = None,
    ) -> tuple[SelfDistiller, History]:
        """Trains one network from its initial weights.

        Args:
            make_model: Called without arguments, torch's generator seeded.
            data: Its training inputs are learned, its test part is evaluated.
            labels: To learn: (N,) classes or (N, C) targets.
            seed: Of weights, order and augmentation.
            alpha: Weight of the given label.
            loss: As in `sdfast.self_distillation_loss`.
            evaluate: Measure the test accuracy after every epoch.
            callbacks: As in `SelfDistiller.fit`.
            checkpoint: As in `SelfDistiller.fit`.

        Returns:
            The trainer, its model trained, and the history.
        """
        torch.manual_seed(seed)
        distiller = self.distiller(make_model(), alpha=alpha, loss=loss)
        classes = labels.dim() == 1
        history = distiller.fit(
            self.batches(data, labels, seed),
            self.epochs,
            eval=evaluation_batches(data, device=self.device) if evaluate else None,
            callbacks=callbacks,
            checkpoint=checkpoint,
            progress=False,
            clean_labels=data.train_labels if classes else None,
        )
        return distiller, history


def derived_seed(*parts: int) -> int:
    """One seed from several numbers, below 2**32."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def logits_of(model: nn.Module, batches: Batches) -> Tensor:
    """The logits (N, C) of all rows in the order of the batches, float32 on the CPU, the model in evaluation mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [model(inputs).to("cpu", torch.float32) for inputs, *_ in batches]
    finally:
        model.train(training)
    return torch.cat(parts)


def accuracy(model: nn.Module, batches: Batches) -> float:
    """The share of rows of unshuffled batches whose largest logit is their label's."""
    return share(logits_of(model, batches).argmax(1) == batches.labels.cpu())


def share(hits: Tensor) -> float:
    """How many of some booleans are true, as a fraction."""
    return float(hits.double().mean())
