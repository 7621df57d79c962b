"""The modules of the losses with a teacher or a classifier's weight; `sdfast.nn` holds them all."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sdfast import _checks, _dispatch
from sdfast.ops.distillation import distillation_loss
from sdfast.ops.distillation.arguments import Teacher
from sdfast.ops.linear_chunks import WORKSPACE
from sdfast.ops.linear_distillation import linear_distillation_loss
from sdfast.ops.linear_self_distillation import linear_self_distillation_loss
from sdfast.ops.self_distillation import AdaptiveAlpha, ClipLabel, LossStats


class LossModule(nn.Module):
    """Keeps its options as attributes of their names, and shows those that differ from the defaults."""

    _names: ClassVar[tuple[str, ...]]

    def _keep(self, values: dict[str, Any]) -> None:
        if values["backend"] is not None:
            _checks.check_option("backend", values["backend"], _dispatch.BACKENDS)
        for name in self._names:
            setattr(self, name, values[name])

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def _keep_alpha(self, alpha: Any) -> None:
        if not isinstance(alpha, Tensor):
            self.alpha = alpha
        elif alpha.dim() != 0:
            shape = _checks.shape_text(alpha)
            raise ValueError(f"alpha: got shape {shape}, wanted () here; pass one a row at the call")
        else:
            self.register_buffer("alpha", alpha)

    def _alpha_on_cpu(self) -> Any:
        """The constructor's α as a trial call takes it: no process group need exist yet."""
        if isinstance(self.alpha, AdaptiveAlpha):
            return AdaptiveAlpha(self.alpha.ratio)
        return self.alpha.cpu() if isinstance(self.alpha, Tensor) else self.alpha

    def extra_repr(self) -> str:
        """The options that differ from the constructor's defaults."""
        defaults = type(self).__init__.__kwdefaults__ or {}
        shown = {**({"alpha": self.alpha} if hasattr(self, "alpha") else {}), **self._options()}
        texts = [f"{k}={v!r}" for k, v in shown.items() if k not in defaults or v != defaults[k]]
        weight = getattr(self, "class_weight", None)
        return ", ".join(texts + ([] if weight is None else [f"class_weight={_checks.shape_text(weight)}"]))


class DistillationLoss(LossModule):
    """`sdfast.distillation_loss` with its options in the constructor, which refuses those that cannot be.

    Args:
        alpha: Weight of the label's cross entropy: a number or a 0-d tensor; ``None``: 0.5 with labels, 0 without. A
            call may override it.
        temperature: T, as in the function, and so are all that follow.
        teacher_temperature: Of the teacher's logits alone.
        divergence: ``"kl"``, ``"reverse_kl"`` or ``"js"``.
        ignore_index: Rows with this index label count for nothing.
        label_smoothing: Of the label.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: ``None`` for the best one available.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option does not exist; the message names it.
    """

    _names = (
        "temperature", "teacher_temperature", "divergence", "ignore_index", "label_smoothing", "reduction", "backend",
    )  # fmt: skip

    def __init__(
        self,
        *,
        alpha: float | Tensor | None = None,
        temperature: float = 4.0,
        teacher_temperature: float | None = None,
        divergence: str = "kl",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._keep(locals())
        self._keep_alpha(alpha)
        options = {**self._options(), "backend": "reference"}
        distillation_loss(
            torch.zeros(1, 2),
            torch.zeros(1, 2),
            torch.zeros(1, dtype=torch.int64),
            alpha=self._alpha_on_cpu(),
            **options,
        )

    def forward(
        self,
        logits: Tensor,
        teacher_logits: Teacher,
        labels: Tensor | None = None,
        *,
        alpha: float | Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of the logits.

        Args:
            logits: (..., C), classes last.
            teacher_logits: (..., C) logits, `sdfast.LogProbabilities` or `sdfast.TopK`.
            labels: (...) class indices or (..., C) probabilities.
            alpha: Instead of the constructor's, for this call; here also one a row.
            row_weight: (...), a factor on each row's loss.

        Returns:
            The loss.
        """
        return distillation_loss(
            logits, teacher_logits, labels, alpha=self.alpha if alpha is None else alpha, row_weight=row_weight,
            **self._options(),
        )  # fmt: skip


class LinearDistillationLoss(LossModule):
    """`sdfast.linear_distillation_loss` with its options in the constructor, which refuses those that cannot be.

    Args:
        alpha: As in `DistillationLoss`, and so are the next six.
        temperature: T.
        teacher_temperature: Of the teacher alone.
        divergence: ``"kl"``, ``"reverse_kl"`` or ``"js"``.
        ignore_index: Rows with this label count for nothing.
        label_smoothing: Of the label.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        chunk_rows: Rows of a chunk; ``None``: as many as fit.
        workspace: Bytes for the chunks.
        backend: ``None`` for the best one available.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option does not exist; the message names it.
    """

    _names = (*DistillationLoss._names, "chunk_rows", "workspace")

    def __init__(
        self,
        *,
        alpha: float | Tensor | None = None,
        temperature: float = 4.0,
        teacher_temperature: float | None = None,
        divergence: str = "kl",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        chunk_rows: int | None = None,
        workspace: int = WORKSPACE,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._keep(locals())
        self._keep_alpha(alpha)
        options = {**self._options(), "backend": "reference"}
        label = torch.zeros(1, dtype=torch.int64)
        one = torch.zeros(1, 1)
        linear_distillation_loss(one, one, one, one, label, alpha=self._alpha_on_cpu(), **options)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        alpha: float | Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of the hidden states.

        Args:
            hidden: (..., H).
            weight: (C, H).
            teacher_hidden: (..., H').
            teacher_weight: (C, H').
            labels: (...) class indices.
            bias: (C,).
            teacher_bias: (C,).
            alpha: Instead of the constructor's, for this call; here also one a row.
            row_weight: (...), a factor on each row's loss.

        Returns:
            The loss.
        """
        return linear_distillation_loss(
            hidden, weight, teacher_hidden, teacher_weight, labels, bias=bias, teacher_bias=teacher_bias,
            alpha=self.alpha if alpha is None else alpha, row_weight=row_weight, **self._options(),
        )  # fmt: skip


class LinearSelfDistillationLoss(LossModule):
    """`sdfast.linear_self_distillation_loss` with its options in the constructor, which refuses those that cannot be.

    Args:
        alpha: Weight of the given label: a number, a 0-d tensor or `sdfast.AdaptiveAlpha`. A call may override it.
        label_fn: As in the function, and so are all that follow.
        temperature: Of the softmax.
        loss: ``"cross_entropy"``, ``"kl"``, ``"mse"`` or ``"brier"``.
        ignore_index: Rows with this label count for nothing.
        label_smoothing: Of the given label, before mixing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        return_stats: Return (loss, `sdfast.LossStats`).
        chunk_rows: Rows of a chunk; ``None``: as many as fit.
        workspace: Bytes for the chunk.
        backend: ``None`` for the best one available.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option does not exist, or does not go with the others; the message names it.
    """

    _names = (
        "label_fn", "temperature", "loss", "ignore_index", "label_smoothing", "reduction", "return_stats", "chunk_rows",
        "workspace", "backend",
    )  # fmt: skip

    def __init__(
        self,
        alpha: float | Tensor | AdaptiveAlpha,
        *,
        label_fn: str | ClipLabel = "hardmax",
        temperature: float = 1.0,
        loss: str = "cross_entropy",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        return_stats: bool = False,
        chunk_rows: int | None = None,
        workspace: int = WORKSPACE,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._keep(locals())
        self._keep_alpha(alpha)
        options = {**self._options(), "backend": "reference"}
        label = torch.zeros(1, dtype=torch.int64)
        linear_self_distillation_loss(torch.zeros(1, 1), torch.zeros(2, 1), label, self._alpha_on_cpu(), **options)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        alpha: float | Tensor | AdaptiveAlpha | None = None,
        class_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossStats]:
        """The loss of the hidden states.

        Args:
            hidden: (..., H).
            weight: (C, H).
            labels: (...) class indices.
            bias: (C,).
            alpha: Instead of the constructor's, for this call; here also one a row.
            class_weight: (C,).
            row_weight: (...), a factor on each row's loss.

        Returns:
            The loss, or (loss, stats) with `return_stats`.
        """
        return linear_self_distillation_loss(
            hidden, weight, labels, self.alpha if alpha is None else alpha, bias=bias, class_weight=class_weight,
            row_weight=row_weight, **self._options(),
        )  # fmt: skip
