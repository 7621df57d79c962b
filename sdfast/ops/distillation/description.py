"""The numbers that stand for the options of the loss, shared by its reference, its operations and its kernels.

`csrc/distillation/kernel.h` repeats the tables.
"""

from typing import NamedTuple

from sdfast.ops.self_distillation.description import REDUCTIONS

__all__ = ["DIVERGENCES", "REDUCTIONS", "STATE_SIZE", "TEACHER_FORMS", "Description"]

DIVERGENCES = {"kl": 0, "reverse_kl": 1, "js": 2}
TEACHER_FORMS = {"logits": 0, "log_probabilities": 1, "top_k_bucket": 2, "top_k_uniform": 3}

# The `state` output: what the mean divides by, which the backward needs; empty where the forward wrote the gradient.
STATE_SIZE = 1


class Description(NamedTuple):
    """What a call fixes for all rows, as the operations take it."""

    alpha_value: float
    temperature: float
    teacher_temperature: float
    divergence: int
    teacher_form: int
    reduction: int
    ignore_index: int
    label_smoothing: float
