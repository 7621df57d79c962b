"""The definition of the distillation loss in plain PyTorch. No speed tricks: every backend is judged by this.

Runs on (N, C) logits in any floating dtype, halves promoted to float32, and under every torch transform.
"""

import torch
from torch import Tensor

from sdfast.ops.distillation.description import DIVERGENCES, REDUCTIONS, TEACHER_FORMS, Description


def distillation_reference(
    logits: Tensor,  # (N, C)
    teacher: Tensor,  # (N, C), or (N, k) log-probabilities
    indices: Tensor | None,  # (N, k) int64
    tail: Tensor | None,  # (N,)
    labels: Tensor | None,  # (N,) int64, or (N, C) probabilities
    alpha: Tensor | None,  # () or (N,)
    row_weight: Tensor | None,  # (N,)
    description: Description,
) -> tuple[Tensor, Tensor]:
    """Returns (loss, state): the loss reduced as asked, and what `description.STATE_SIZE` describes."""
    d = description
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    dtype, classes = logits.dtype, logits.shape[-1]
    kept = torch.ones_like(logits[:, 0], dtype=torch.bool)
    if labels is not None and labels.dim() == 1:
        kept = labels != d.ignore_index
    a = (logits.new_full((), d.alpha_value) if alpha is None else alpha.to(dtype)).expand(len(logits))  # (N,)
    # Masked before any arithmetic: what a row does not use must not reach its gradient through 0 * NaN.
    logits = torch.where(kept[:, None], logits, 0)
    teacher = torch.where((kept & (a != 1))[:, None], teacher.to(dtype).detach(), 0)

    log_p = (logits / d.temperature).log_softmax(-1)
    log_q = teacher_log_probabilities(teacher, indices, tail, log_p.detach(), d)
    distilled = d.temperature**2 * row_divergence(log_p, log_q, d.divergence)
    if labels is None:
        rows = (1 - a) * distilled
    else:
        given = _label_distribution(labels, classes, dtype)
        given = (1 - d.label_smoothing) * given + d.label_smoothing / classes if d.label_smoothing else given
        hard = -times(given, logits.log_softmax(-1)).sum(-1)
        hard = torch.where(a == 0, 0, a * torch.where(a == 0, 0, hard))  # -inf logits of a label that counts nothing
        rows = torch.where(a == 1, hard, hard + (1 - a) * distilled)
    rows = torch.where(kept, rows if row_weight is None else rows * row_weight, 0)
    count = kept.sum().clamp(min=1).to(dtype)
    denominator = count if d.reduction == REDUCTIONS["mean"] else torch.ones_like(count)
    value = rows if d.reduction == REDUCTIONS["none"] else rows.sum() / denominator
    return value, denominator.reshape(1)


def times(weight: Tensor, value: Tensor) -> Tensor:
    """Their product, but 0 where the weight is 0, though the value be infinite."""
    return torch.where(weight == 0, 0, weight * torch.where(weight == 0, 0, value))


def row_divergence(log_p: Tensor, log_q: Tensor, divergence: int) -> Tensor:
    """D(q, p) of each row, from log-probabilities (N, C) of student p and teacher q."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == DIVERGENCES["kl"]:
        return times(q, log_q - log_p).sum(-1)
    if divergence == DIVERGENCES["reverse_kl"]:
        return times(p, log_p - log_q).sum(-1)
    m = (p + q) / 2
    log_m = torch.where(m == 0, 1, m).log()
    return ((times(q, log_q - log_m) + times(p, log_p - log_m)) / 2).sum(-1)


def teacher_log_probabilities(
    teacher: Tensor, indices: Tensor | None, tail: Tensor | None, log_p: Tensor, d: Description
) -> Tensor:
    """Log q, (N, C), from any form of the teacher; `log_p` are the student's, without gradient."""
    if d.teacher_form == TEACHER_FORMS["logits"]:
        return (teacher / d.teacher_temperature).log_softmax(-1)
    if d.teacher_form == TEACHER_FORMS["log_probabilities"] or indices is None or tail is None:
        return teacher
    classes, k = log_p.shape[-1], indices.shape[-1]
    listed = (indices[:, :, None] == torch.arange(classes, device=indices.device)).sum(1)  # (N, C)
    log_tail = tail.to(log_p.dtype).log()[:, None]
    if d.teacher_form == TEACHER_FORMS["top_k_uniform"]:
        others = (log_tail - torch.tensor(max(classes - k, 1), dtype=log_p.dtype).log()).expand_as(log_p)
    else:
        unlisted_mass = torch.where(listed > 0, -torch.inf, log_p).logsumexp(-1, keepdim=True)
        others = torch.where(log_tail == -torch.inf, -torch.inf, log_p + (log_tail - unlisted_mass))
    log_q = torch.where(listed > 0, 0, others).scatter(-1, indices.clamp(0, classes - 1), teacher)
    # Unchecked bad lists (on a GPU) poison their row.
    bad = (listed.sum(-1) != k) | (listed > 1).any(-1) | ~((tail >= 0) & (tail <= 1))
    return torch.where(bad[:, None], torch.nan, log_q)


def _label_distribution(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    if labels.dim() == 2:
        return labels.to(dtype)
    one_hot = (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)
    in_range = (labels >= 0) & (labels < classes)
    return torch.where(in_range[:, None], one_hot, torch.nan)  # an unchecked bad label poisons its row
