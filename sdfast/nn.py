"""The losses as modules, which only forward to the functions of the same name."""

import torch
from torch import Tensor

from sdfast import _checks
from sdfast.nn_teachers import DistillationLoss, LinearDistillationLoss, LinearSelfDistillationLoss, LossModule
from sdfast.ops.prediction_bank import BankRows, PredictionBank, elr_loss
from sdfast.ops.self_distillation import (
    AdaptiveAlpha,
    ClassPrior,
    ClipLabel,
    GeneralizedCrossEntropy,
    LossStats,
    SmallLoss,
    self_distillation_loss,
)
from sdfast.ops.self_distillation.weights import RowWeight

__all__ = [
    "DistillationLoss",
    "ELRLoss",
    "LinearDistillationLoss",
    "LinearSelfDistillationLoss",
    "SelfDistillationLoss",
]


class SelfDistillationLoss(LossModule):
    """`sdfast.self_distillation_loss` with its options in the constructor.

    Options that do not exist or do not go together are refused here already, not at the first batch.

    Args:
        alpha: Weight of the given label: a number, a 0-d tensor or `sdfast.AdaptiveAlpha`. A call may override it.
        label_fn: As in the function, and so are all that follow.
        temperature: Of the softmax.
        mixing: ``"arithmetic"`` or ``"geometric"``.
        target_temperature: Sharpens the mixed target.
        loss: ``"cross_entropy"``, ``"kl"``, ``"mse"`` or ``"brier"``.
        ignore_index: Rows with this index label count for nothing.
        label_smoothing: Of the given label, before mixing.
        class_weight: (C,); a buffer, so it moves with the module.
        row_weight: A rule: ``"gce"``, `sdfast.GeneralizedCrossEntropy` or `sdfast.SmallLoss`. A call may override it.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        return_stats: Return (loss, `sdfast.LossStats`).
        backend: ``None`` for the best one available.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option does not exist, or does not go with the others; the message names it.
    """

    _names = (
        "label_fn", "temperature", "mixing", "target_temperature", "loss", "ignore_index", "label_smoothing",
        "row_weight", "reduction", "return_stats", "backend",
    )  # fmt: skip
    class_weight: Tensor | None
    ignore_index: int

    def __init__(
        self,
        alpha: float | Tensor | AdaptiveAlpha,
        *,
        label_fn: str | ClipLabel = "hardmax",
        temperature: float = 1.0,
        mixing: str = "arithmetic",
        target_temperature: float = 1.0,
        loss: str = "cross_entropy",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        row_weight: str | GeneralizedCrossEntropy | SmallLoss | None = None,
        reduction: str = "mean",
        return_stats: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._keep(locals())
        self._keep_alpha(alpha)
        if class_weight is not None:
            _checks.check_floating("class_weight", class_weight)
            if class_weight.dim() != 1:
                raise ValueError(f"class_weight: got shape {_checks.shape_text(class_weight)}, wanted (classes,)")
        self.register_buffer("class_weight", class_weight)
        if isinstance(row_weight, Tensor):
            raise ValueError("row_weight: got a tensor, wanted a rule here; pass one a row at the call")
        self._refuse_impossible_options()

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        alpha: float | Tensor | AdaptiveAlpha | None = None,
        source: Tensor | ClassPrior | BankRows | None = None,
        row_weight: RowWeight = None,
    ) -> Tensor | tuple[Tensor, LossStats]:
        """The loss of the logits.

        Args:
            logits: (..., C), classes last.
            labels: (...) class indices or (..., C) probabilities.
            alpha: Instead of the constructor's, for this call; here also one a row.
            source: (..., C) logits to learn from instead of the model's own, ``bank.rows(indices)`` or a
                `sdfast.ClassPrior`.
            row_weight: (...), a factor on each row's loss, or a rule; instead of the constructor's.

        Returns:
            The loss, or (loss, stats) with `return_stats`.
        """
        options = self._options()
        if row_weight is not None:
            options["row_weight"] = row_weight
        return self_distillation_loss(
            logits, labels, self.alpha if alpha is None else alpha, source=source, class_weight=self.class_weight,
            **options,
        )  # fmt: skip

    def _refuse_impossible_options(self) -> None:
        classes = 2 if self.class_weight is None else len(self.class_weight)
        device = "cpu" if self.class_weight is None else self.class_weight.device
        logits = torch.zeros(1, classes, device=device)
        alpha = self.alpha
        if isinstance(alpha, AdaptiveAlpha):  # its process group need not exist yet
            alpha = AdaptiveAlpha(alpha.ratio)
        elif isinstance(alpha, Tensor):
            alpha = alpha.to(device)
        # Probability labels go with every option but that weight, which wants indices.
        given = torch.zeros(1, dtype=torch.int64, device=device)
        if self.mixing == "geometric" and self.row_weight is None:
            given = torch.full((1, classes), 1 / classes, device=device)
        options = {**self._options(), "return_stats": False, "backend": "reference"}
        if isinstance(self.row_weight, SmallLoss):
            options["row_weight"] = None
        # With a source: whether calls will bring one is not known yet, so none is warned that it lacks it.
        self_distillation_loss(logits, given, alpha, source=logits, class_weight=self.class_weight, **options)


class ELRLoss(LossModule):
    """`sdfast.elr_loss` with its bank and options in the constructor.

    Options that do not exist or do not go together are refused here already, not at the first batch. The bank is a
    submodule, so its rows are in the state dict.

    Args:
        bank: The predictions of the training set.
        strength: λ of the regularisation.
        clamp: Where probabilities are cut off, as in the function, and so are all that follow.
        ignore_index: Rows with this index label count for nothing.
        label_smoothing: Of the given label, in the cross entropy.
        class_weight: (C,); a buffer, so it moves with the module.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: ``None`` for the best one available.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option does not exist, or does not go with the others; the message names it.
    """

    _names = ("strength", "clamp", "ignore_index", "label_smoothing", "reduction", "backend")
    class_weight: Tensor | None

    def __init__(
        self,
        bank: PredictionBank,
        *,
        strength: float = 7.0,
        clamp: float = 1e-4,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(bank, PredictionBank):
            raise TypeError(f"bank: got {type(bank).__name__}, wanted a sdfast.PredictionBank")
        self._keep(locals())
        self.bank = bank
        if class_weight is not None:
            _checks.check_floating("class_weight", class_weight)
        self.register_buffer("class_weight", class_weight)
        device = bank.seen.device
        weight = None if class_weight is None else class_weight.to(device)
        logits, label = (
            torch.zeros(1, bank.num_classes, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        with torch.no_grad():  # the bank is only read
            options = {**self._options(), "backend": "reference"}
            elr_loss(logits, label, bank.rows(label), class_weight=weight, **options)

    def forward(self, logits: Tensor, labels: Tensor, indices: Tensor, *, row_weight: Tensor | None = None) -> Tensor:
        """The loss of the logits, whose predictions go into the bank.

        Args:
            logits: (..., C), classes last.
            labels: (...) class indices or (..., C) probabilities.
            indices: (...) integers, which sample each row is of.
            row_weight: (...), a factor on each row's loss.

        Returns:
            The loss.
        """
        return elr_loss(
            logits, labels, self.bank.rows(indices), class_weight=self.class_weight, row_weight=row_weight,
            **self._options(),
        )  # fmt: skip
