"""The numbers that stand for the options of the loss, shared by its reference, its operations and its kernels.

`csrc/self_distillation/kernel.h` repeats the tables.
"""

from typing import Any, NamedTuple

import torch

LABEL_FUNCTIONS = {"softmax": 0, "hardmax": 1, "identity": 2, "clip": 3}
LOSSES = {"cross_entropy": 0, "kl": 1, "mse": 2, "brier": 3}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
MIXINGS = {"arithmetic": 0, "geometric": 1}

# The `state` output: (alpha, denominator, accuracy, target entropy, agreement), what the backward and the statistics
# need of the batch; empty where neither does. Without statistics only the first two are defined.
STATE_SIZE = 5
# The trainer's `return_stats`: the state as it is. To make five numbers of it takes longer than the loss itself after a
# training step, which leaves nothing of Python's code in the caches.
AS_STATE: Any = object()


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


# A description as the operations take it: (alpha_value, codes, ignore_index, numbers). The dispatcher's time grows with
# every argument, which shows at 128 x 10, so the codes share an integer, as `csrc/self_distillation/description.h`
# takes it apart, and the numbers come only where one of them is not `PLAIN`.
Packed = tuple[float, int, int, list[float] | None]

LABEL_FUNCTION_BIT, LOSS_BIT, REDUCTION_BIT, MIXING_BIT = 0, 2, 4, 6
ADAPTIVE, WANT_GRADIENT, WANT_STATS = 1 << 7, 1 << 8, 1 << 9
PLAIN = (1.0, 0.0, 1.0, 0.0)  # label_parameter, label_smoothing, target_power, row_power


def packed_codes(label_fn: int, loss: int, reduction: int, mixing: int) -> int:
    """The four codes in one integer."""
    return label_fn << LABEL_FUNCTION_BIT | loss << LOSS_BIT | reduction << REDUCTION_BIT | mixing << MIXING_BIT


def packed_numbers(*numbers: float) -> list[float] | None:
    """`numbers` in the order of `PLAIN`, or ``None`` for those."""
    return None if numbers == PLAIN else [float(number) for number in numbers]


def packed(d: Description, want_gradient: bool = False, want_stats: bool = False) -> Packed:
    """The description as the operations take it, with what is wanted of the forward."""
    codes = packed_codes(d.label_fn, d.loss, d.reduction, d.mixing)
    codes |= ADAPTIVE * d.adaptive | WANT_GRADIENT * want_gradient | WANT_STATS * want_stats
    numbers = packed_numbers(d.label_parameter, d.label_smoothing, d.target_power, d.row_power)
    return d.alpha_value, codes, d.ignore_index, numbers


def unpacked(alpha_value: float, codes: int, ignore_index: int, numbers: list[float] | None) -> Description:
    """The description that `packed` made this of."""
    parameter, smoothing, target_power, row_power = PLAIN if numbers is None else numbers
    return Description(
        alpha_value, bool(codes & ADAPTIVE), codes >> LABEL_FUNCTION_BIT & 3, parameter, codes >> LOSS_BIT & 3,
        reduction_of(codes), ignore_index, smoothing, codes >> MIXING_BIT & 1, target_power, row_power,
    )  # fmt: skip


def reduction_of(codes: int) -> int:
    """The reduction's code among the packed ones."""
    return codes >> REDUCTION_BIT & 3
