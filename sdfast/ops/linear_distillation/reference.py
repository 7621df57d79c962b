"""The definition of the linear form: both classifiers' logits, whole, and the distillation loss of them."""

from torch import Tensor

from sdfast.ops.distillation.description import Description
from sdfast.ops.distillation.reference import distillation_reference
from sdfast.ops.linear_self_distillation.reference import linear_logits


def linear_distillation_reference(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (C, H)
    bias: Tensor | None,  # (C,)
    teacher_hidden: Tensor,  # (N, H')
    teacher_weight: Tensor,  # (C, H')
    teacher_bias: Tensor | None,  # (C,)
    labels: Tensor | None,  # (N,) int64
    alpha: Tensor | None,  # () or (N,)
    row_weight: Tensor | None,  # (N,)
    description: Description,
) -> tuple[Tensor, Tensor]:
    """Returns (loss, state) as `distillation_reference` does."""
    logits = linear_logits(hidden, weight, bias)
    teacher = linear_logits(teacher_hidden, teacher_weight, teacher_bias).to(logits.dtype)
    return distillation_reference(logits, teacher, None, None, labels, alpha, row_weight, description)
