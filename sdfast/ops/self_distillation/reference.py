"""The definition of the self-distillation loss in plain PyTorch. No speed tricks: every backend is judged by this.

Runs on (N, C) logits in any floating dtype, halves promoted to float32, and under every torch transform.
"""

import torch
from torch import Tensor

from sdfast.ops.self_distillation.description import LABEL_FUNCTIONS, LOSSES, MIXINGS, REDUCTIONS, Description


def batch_accuracy(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Counts (correct, kept) rows: argmax of the logits against the labels; a row with a NaN logit is never correct."""
    kept = _kept(labels, ignore_index)
    if logits.shape[-1] == 1 and labels.dim() == 2:  # +-1 labels of a one-column regression: the signs
        right = (logits[:, 0] > 0) == (labels[:, 0] > 0)
    else:
        right = logits.argmax(-1) == _label_index(labels)
    right = right & ~logits.isnan().any(-1) & kept
    return right.sum(), kept.sum()


def self_distillation_reference(
    logits: Tensor,  # (N, C)
    labels: Tensor,  # (N,) int64, or (N, C) probabilities or regression targets
    alpha: Tensor | None,  # () or (N,)
    source: Tensor | None,  # (N, C)
    class_weight: Tensor | None,  # (C,)
    row_weight: Tensor | None,  # (N,)
    description: Description,
) -> tuple[Tensor, Tensor]:
    """Returns (loss, state): the loss reduced as asked, and what `op.STATE_SIZE` describes."""
    alpha_value, adaptive, label_fn, label_parameter, loss, reduction, ignore_index, label_smoothing = description[:8]
    mixing, target_power, row_power = description[8:]
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    classes, dtype = logits.shape[-1], logits.dtype
    kept = _kept(labels, ignore_index)
    # Masked before any arithmetic: a NaN in an ignored row must not reach a gradient through 0 * NaN.
    logits = torch.where(kept[:, None], logits, 0)
    correct, count = batch_accuracy(logits.detach(), labels, ignore_index)
    accuracy = correct.to(dtype) / count.clamp(min=1)
    if adaptive:
        alpha = 1 - (alpha_value * accuracy).clamp(0, 1)
    elif alpha is None:
        alpha = logits.new_full((), alpha_value)
    row_alpha = alpha.to(dtype).expand(len(logits))  # (N,)

    given = _label_distribution(labels, classes, dtype)  # (N, C)
    if label_smoothing:
        given = (1 - label_smoothing) * given + label_smoothing / classes
    source = (logits if source is None else source.to(dtype)).detach()
    a = row_alpha[:, None]
    if mixing == MIXINGS["geometric"]:
        mixed = _geometric_mean(given, (source / label_parameter).log_softmax(-1), a)
    else:
        mixed = a * given + (1 - a) * _label_function(source, label_fn, label_parameter)
    target = torch.where(a == 1, given, mixed).detach()  # (N, C)
    if target_power != 1:
        target = (target.log() * target_power).softmax(-1)

    rows = _row_losses(logits, target, class_weight, loss)
    if row_power:
        own = (row_power * _label_log_probability(logits.detach(), labels)).exp()
        rows = torch.where((own == 0) & rows.isposinf(), 0, rows * own)  # the limit of p^q (-log p), not 0 * inf
    rows = torch.where(kept, rows if row_weight is None else rows * row_weight, 0)  # (N,)
    if class_weight is not None and labels.dim() == 1:
        index = torch.where(kept, labels, 0).clamp(0, classes - 1)
        denominator = torch.where(kept, class_weight.to(dtype)[index], 0).sum()
    else:
        denominator = count.to(dtype)
    denominator = (
        torch.where(count == 0, 1, denominator) if reduction == REDUCTIONS["mean"] else torch.ones_like(denominator)
    )
    value = rows if reduction == REDUCTIONS["none"] else rows.sum() / denominator

    def mean_over_kept(quantity: Tensor) -> Tensor:
        return torch.where(kept, quantity.to(dtype), 0).sum() / count.clamp(min=1)

    entropy = -torch.where(target == 0, 0, target * target.log()).sum(-1)
    mean_alpha = mean_over_kept(row_alpha) if alpha.dim() else alpha.to(dtype)
    agreement = mean_over_kept(_target_agrees(target, labels))
    state = torch.stack([mean_alpha, denominator, accuracy, mean_over_kept(entropy), agreement])
    return value, state.detach()


def _kept(labels: Tensor, ignore_index: int) -> Tensor:
    if labels.dim() == 2:
        return torch.ones_like(labels[:, 0], dtype=torch.bool)
    return labels != ignore_index


def _label_index(labels: Tensor) -> Tensor:
    return labels if labels.dim() == 1 else labels.argmax(-1)


def _label_distribution(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    if labels.dim() == 2:
        return labels.to(dtype)
    one_hot = (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)
    in_range = (labels >= 0) & (labels < classes)
    return torch.where(in_range[:, None], one_hot, torch.nan)  # an unchecked bad label poisons its row


def _label_function(source: Tensor, label_fn: int, parameter: float) -> Tensor:
    if label_fn == LABEL_FUNCTIONS["softmax"]:
        return (source / parameter).softmax(-1)
    if label_fn == LABEL_FUNCTIONS["hardmax"]:
        one_hot = (source.argmax(-1)[:, None] == torch.arange(source.shape[-1], device=source.device)).to(source.dtype)
        return torch.where(source.isnan().any(-1, keepdim=True), torch.nan, one_hot)
    if label_fn == LABEL_FUNCTIONS["clip"]:
        return (4 * source / (1 - 2 * parameter)).clamp(-1, 1)
    return source


def _geometric_mean(given: Tensor, log_believed: Tensor, a: Tensor) -> Tensor:
    """given^a believed^(1 - a), normalised."""
    log_given = torch.where(a == 0, 0, a * given.log())  # without weight a zero forbids nothing
    return (log_given + (1 - a) * log_believed).softmax(-1)


def _label_log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    index = labels.clamp(0, logits.shape[-1] - 1)[:, None]
    return logits.log_softmax(-1).gather(-1, index)[:, 0]


def _row_losses(logits: Tensor, target: Tensor, class_weight: Tensor | None, loss: int) -> Tensor:
    if loss == LOSSES["mse"]:
        return (logits - target).square().mean(-1)
    if loss == LOSSES["brier"]:
        return (logits.softmax(-1) - target).square().sum(-1)
    weighted = target if class_weight is None else target * class_weight.to(target.dtype)
    # A class without target mass adds nothing, though its logit be -inf; a row of NaN stays NaN through `normalizer`.
    log_p = logits.log_softmax(-1)
    normalizer = log_p.logsumexp(-1).detach() * 0
    rows = -torch.where(weighted == 0, 0, weighted * torch.where(weighted == 0, 0, log_p)).sum(-1) + normalizer
    if loss == LOSSES["kl"]:
        rows = rows + torch.where(target == 0, 0, weighted * target.log()).sum(-1)
    return rows


def _target_agrees(target: Tensor, labels: Tensor) -> Tensor:
    if target.shape[-1] == 1 and labels.dim() == 2:
        return (target[:, 0] > 0) == (labels[:, 0] > 0)
    return (target.argmax(-1) == _label_index(labels)) & ~target.isnan().any(-1)
