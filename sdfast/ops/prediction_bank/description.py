"""The numbers that stand for a bank's settings in its operation, shared by the reference and the kernels.

`csrc/prediction_bank/description.h` takes apart what is packed here.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the two folders import each other
    from sdfast.ops.self_distillation.description import Packed


class BankDescription(NamedTuple):
    """What a call fixes beside the loss's own description.

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

# A bank's settings as the operation takes them: flags above the loss's own in its `codes`, with `warm_up` above them;
# `momentum`; and (strength, clamp), where one of them is not 0.
PackedBank = tuple[float, int, int, list[float] | None, float, list[float] | None]

BIAS_CORRECTION, WRITE_FIRST, UNIQUE, UPDATE, LATE = 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14
WARM_UP_BIT = 15
LONGEST_WARM_UP = 2**31 - 1  # as many predictions as a bank counts


def packed(loss: "Packed", bank: BankDescription, late: bool = False) -> PackedBank:
    """Both descriptions as the operation takes them; what is wanted of it stands in the loss's codes."""
    alpha_value, codes, ignore_index, numbers = loss
    momentum, bias_correction, write_first, warm_up, unique, update, strength, clamp = bank
    codes |= (
        BIAS_CORRECTION * bias_correction | WRITE_FIRST * write_first | UNIQUE * unique | UPDATE * update
        | LATE * late | min(warm_up, LONGEST_WARM_UP) << WARM_UP_BIT
    )  # fmt: skip
    return alpha_value, codes, ignore_index, numbers, momentum, [strength, clamp] if strength or clamp else None


def unpacked_bank(codes: int, momentum: float, regularisation: list[float] | None) -> BankDescription:
    """The description that `packed` made this of."""
    strength, clamp = regularisation or (0.0, 0.0)
    return BankDescription(
        momentum, bool(codes & BIAS_CORRECTION), bool(codes & WRITE_FIRST), codes >> WARM_UP_BIT,
        bool(codes & UNIQUE), bool(codes & UPDATE), strength, clamp,
    )  # fmt: skip
