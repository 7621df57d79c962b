"""What a kernel's operator costs, in FLOPs counted from its blocks: a product with a vector, and the matrix itself."""

from typing import NamedTuple

from sdfast.ntk.blocks import Group
from sdfast.ntk.plan import Entry


class Costs(NamedTuple):
    """FLOPs and bytes of an operator H of n rows.

    Attributes:
        product: FLOPs of a product with one vector, the gradients being there.
        matrix: FLOPs of all entries of H, the gradients being there.
        collect: FLOPs that every block product spends on gradients that are not kept; 0 where they are.
        matrix_bytes: Of H.
    """

    product: float
    matrix: float
    collect: float
    matrix_bytes: int


def costs_of(
    groups: list[Group], entries: dict[str, Entry], samples: int, classes: int, form: str, itemsize: int, kept: bool
) -> Costs:
    """Counts them.

    Rows of gradients (C·n, w) take 4Cnw for J Jᵀ v and, one triangle of H, Cn²w for the matrix (C²n²w for the blocks of
    all pairs of outputs). Factors A (n, T, d), B (C, n, T, p) take 4CnTdp and n²T²(d + Cp) (C²p). Gradients that are
    not kept cost a forward and a backward pass, at least 6 FLOPs for each entry, sample and output.

    Args:
        groups: Of the operator.
        entries: Of the plan, by parameter.
        samples: n.
        classes: C.
        form: Of the outputs.
        itemsize: Bytes of a number.
        kept: Whether the gradients are held.

    Returns:
        The costs.
    """
    coupled = classes**2 if form == "full" else classes
    width = sum(group.width for group in groups)
    product, matrix = 4.0 * classes * samples * width, 1.0 * coupled * samples**2 * width
    collect = 6.0 * classes * samples * width
    for name in (name for group in groups for name in group.factored):
        positions, inputs, outputs = entries[name].factors or (0, 0, 0)
        spread = samples * positions * outputs * (inputs or 1)  # tokens are looked up, not multiplied
        product += 4.0 * classes * spread
        matrix += 1.0 * (samples * positions) ** 2 * (inputs + coupled * outputs)
        collect += 6.0 * classes * spread
    rows = samples * (classes if form == "full" else 1)
    return Costs(product, matrix, 0.0 if kept else collect, itemsize * rows**2)
