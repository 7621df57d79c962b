"""The numbers that stand for the options of the loss, shared by its reference, its operations and its kernels.

`csrc/self_distillation/kernel.h` repeats the tables.
"""

from typing import NamedTuple

import torch

LABEL_FUNCTIONS = {"softmax": 0, "hardmax": 1, "identity": 2, "clip": 3}
LOSSES = {"cross_entropy": 0, "kl": 1, "mse": 2, "brier": 3}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
MIXINGS = {"arithmetic": 0, "geometric": 1}

# The `state` output: (alpha, denominator, accuracy, target entropy, agreement), what the backward and the statistics
# need of the batch; empty where neither does. Without statistics only the first two are defined.
STATE_SIZE = 5


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums, losses and weights have for logits of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Description(NamedTuple):
    """What a call fixes for all rows, as the operations take it."""

    alpha_value: float
    adaptive: bool
    label_fn: int
    label_parameter: float
    loss: int
    reduction: int
    ignore_index: int
    label_smoothing: float
    mixing: int = MIXINGS["arithmetic"]
    target_power: float = 1.0  # 1 / target temperature
    row_power: float = 0.0  # q of a row's weight p_label^q; 0 is no weight
