"""The definition of the linear form: the logits, whole, and the self-distillation loss of them."""

import torch
from torch import Tensor

from sdfast.ops.self_distillation.description import Description, accumulation_dtype
from sdfast.ops.self_distillation.reference import self_distillation_reference


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, C) logits of (N, H) hidden states, in the accumulation dtype: those of halves are not rounded to them."""
    real = accumulation_dtype(hidden.dtype)
    return torch.nn.functional.linear(hidden.to(real), weight.to(real), None if bias is None else bias.to(real))


def linear_self_distillation_reference(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (C, H)
    bias: Tensor | None,  # (C,)
    labels: Tensor,  # (N,) int64
    alpha: Tensor | None,  # () or (N,)
    class_weight: Tensor | None,  # (C,)
    row_weight: Tensor | None,  # (N,)
    description: Description,
) -> tuple[Tensor, Tensor]:
    """Returns (loss, state) as `self_distillation_reference` does."""
    logits = linear_logits(hidden, weight, bias)
    return self_distillation_reference(logits, labels, alpha, None, class_weight, row_weight, description)
