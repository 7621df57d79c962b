"""What operands of a product are rounded to, and how long a sum stays in float32."""

import torch
from torch import Tensor

TERMS = 4096  # of a sum in float32, before it is promoted

# name -> mantissa bits that operands are rounded to (None: their own)
PRECISIONS: dict[str, int | None] = {"float32": None, "float64": None, "bf16x3": 7, "tf32": 10, "bf16": 7}


def rounded(tensor: Tensor, bits: int) -> Tensor:
    """Float32 numbers rounded to a mantissa of `bits` bits, to nearest even; what is not finite stays."""
    drop = 23 - bits
    whole = tensor.contiguous().view(torch.int32)
    kept = (whole + ((whole >> drop) & 1) + (2 ** (drop - 1) - 1)) & ~(2**drop - 1)
    return torch.where(tensor.isfinite(), kept.view(torch.float32), tensor)


def terms(tensor: Tensor, precision: str) -> list[Tensor]:
    """An operand as the sum of the numbers that are multiplied in its place.

    Args:
        tensor: (rows, K).
        precision: Of `PRECISIONS`.

    Returns:
        One tensor, or for ``"bf16x3"`` its leading and its following bits.
    """
    if precision == "float64":
        return [tensor.double()]
    bits = PRECISIONS[precision]
    tensor = tensor.float()
    if bits is None:
        return [tensor]
    high = rounded(tensor, bits)
    return [high, rounded(tensor - high, bits)] if precision == "bf16x3" else [high]


# Which terms of either side are multiplied: of bf16x3 all but the product of the two remainders.
PAIRS = {name: ((0, 0), (0, 1), (1, 0)) if name == "bf16x3" else ((0, 0),) for name in PRECISIONS}
