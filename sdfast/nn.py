"""The losses as modules, which only forward to the functions of the same name."""

import torch
from torch import Tensor, nn

from sdfast import _checks, _dispatch
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

__all__ = ["ELRLoss", "SelfDistillationLoss"]


class SelfDistillationLoss(nn.Module):
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

    class_weight: Tensor | None

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
        if backend is not None:
            _checks.check_option("backend", backend, _dispatch.BACKENDS)
        if isinstance(alpha, Tensor):
            if alpha.dim() != 0:
                shape = _checks.shape_text(alpha)
                raise ValueError(f"alpha: got shape {shape}, wanted () here; pass one a row at the call")
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha
        if class_weight is not None:
            _checks.check_floating("class_weight", class_weight)
            if class_weight.dim() != 1:
                raise ValueError(f"class_weight: got shape {_checks.shape_text(class_weight)}, wanted (classes,)")
        self.register_buffer("class_weight", class_weight)
        if isinstance(row_weight, Tensor):
            raise ValueError("row_weight: got a tensor, wanted a rule here; pass one a row at the call")
        self.row_weight = row_weight
        self.label_fn = label_fn
        self.temperature = temperature
        self.mixing = mixing
        self.target_temperature = target_temperature
        self.loss = loss
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.return_stats = return_stats
        self.backend = backend
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
        return self_distillation_loss(
            logits,
            labels,
            self.alpha if alpha is None else alpha,
            source=source,
            class_weight=self.class_weight,
            row_weight=self.row_weight if row_weight is None else row_weight,
            return_stats=self.return_stats,
            backend=self.backend,
            **self._options(),
        )

    def extra_repr(self) -> str:
        """The options that differ from the function's defaults."""
        defaults = SelfDistillationLoss.__init__.__kwdefaults__ or {}
        values = {
            **self._options(),
            "row_weight": self.row_weight,
            "return_stats": self.return_stats,
            "backend": self.backend,
        }
        shown = [f"alpha={self.alpha!r}"] + [f"{k}={v!r}" for k, v in values.items() if v != defaults[k]]
        if self.class_weight is not None:
            shown.append(f"class_weight={_checks.shape_text(self.class_weight)}")
        return ", ".join(shown)

    def _options(self) -> dict:
        names = (
            "label_fn", "temperature", "mixing", "target_temperature", "loss", "ignore_index", "label_smoothing",
            "reduction",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

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
        rule = None if isinstance(self.row_weight, SmallLoss) else self.row_weight
        # With a source: whether calls will bring one is not known yet, so none is warned that it lacks it.
        self_distillation_loss(
            logits, given, alpha, source=logits, class_weight=self.class_weight, row_weight=rule, backend="reference",
            **self._options(),
        )  # fmt: skip


class ELRLoss(nn.Module):
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
        if backend is not None:
            _checks.check_option("backend", backend, _dispatch.BACKENDS)
        self.bank = bank
        self.register_buffer("class_weight", class_weight)
        self.strength = strength
        self.clamp = clamp
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.backend = backend
        device = bank.seen.device
        weight = None if class_weight is None else class_weight.to(device)
        logits, label = (
            torch.zeros(1, bank.num_classes, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        with torch.no_grad():  # the bank is only read
            elr_loss(logits, label, bank.rows(label), class_weight=weight, backend="reference", **self._options())

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
            logits,
            labels,
            self.bank.rows(indices),
            class_weight=self.class_weight,
            row_weight=row_weight,
            backend=self.backend,
            **self._options(),
        )

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())

    def _options(self) -> dict:
        names = ("strength", "clamp", "ignore_index", "label_smoothing", "reduction")
        return {name: getattr(self, name) for name in names}
