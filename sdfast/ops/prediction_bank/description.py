"""The numbers that stand for a bank's settings in its operation, shared by the reference and the kernels."""

from typing import NamedTuple


class BankDescription(NamedTuple):
    """What a call fixes beside the loss's own description, in the order of the operation's schema.

    Attributes:
        momentum: β of the running mean.
        bias_correction: Whether the n-th prediction weighs (1 − β) / (1 − βⁿ) and not 1 − β.
        write_first: Whether the target is read after this batch's own prediction has gone in.
        warm_up: How many predictions of a sample only go in before the first comes out.
        unique: Whether an index seen twice in a batch is an error.
        update: Whether anything is written.
        strength: λ of early-learning regularisation; 0 without.
        clamp: Where a prediction is cut off before regularisation, [clamp, 1 − clamp]; 0 leaves it alone.
    """

    momentum: float
    bias_correction: bool
    write_first: bool
    warm_up: int
    unique: bool
    update: bool
    strength: float = 0.0
    clamp: float = 0.0


ORDERS = ("read_then_write", "write_then_read")
