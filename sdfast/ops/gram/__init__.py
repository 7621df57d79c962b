"""Products of gradients, added to a Gram matrix: of rows, and of the factors of layers with a single position."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdfast import _checks, _dispatch
from sdfast.ops.gram import blocked, op
from sdfast.ops.gram.precision import PRECISIONS, TERMS
from sdfast.ops.gram.reference import hadamard_reference, product_reference

__all__ = ["PRECISIONS", "TERMS", "add_gram", "add_hadamard_gram"]

_UNSERVED = ("cuda",)  # the GPU kernels are Triton's


def add_gram(
    total: Tensor, left: Tensor, right: Tensor | None = None, *, precision: str = "float32", backend: str | None = None
) -> Tensor:
    """Adds products of rows: ``total += left @ right.T``; without `right` the lower triangle of ``left @ left.T``.

    Operands are rounded to the precision (``"bf16x3"``: to a sum of two bfloat16 numbers, whose products but the
    smallest are taken); sums stay in float32 for at most `TERMS` terms and are then added to the total in its own
    dtype. With a float64 total the error does not grow with the number of columns.

    Args:
        total: (I, J) float32 or float64, entries of a row side by side; added to in place. Without `right` entries
            above the diagonal stay as they are.
        left: (I, K) float32 or float64, of any strides.
        right: (J, K), or ``None``.
        precision: ``"float32"``, ``"float64"`` (with a float64 total), ``"bf16x3"``, ``"tf32"`` or ``"bf16"``.
        backend: ``None`` for the best one available, or ``"cpu"``, ``"triton"``, ``"reference"``.

    Returns:
        `total`.

    Raises:
        TypeError: A dtype cannot be used.
        ValueError: Shapes, strides, devices or the precision do not fit; the message names the argument.
        NotImplementedError: The backend asked for cannot serve the call; the message says why.
    """
    other = left if right is None else right
    _check_total(total, precision)
    for name, side, size in (("left", left, 0), ("right", other, 1)):
        _check_side(name, side, total.shape[size], total)
    if left.shape[1] != other.shape[1]:
        raise ValueError(f"right: got {other.shape[1]} columns, wanted {left.shape[1]} as left has")
    _check_triangle(total, right is None)
    left, other = left.detach(), other.detach()
    chosen = _dispatch.choose(backend, total.device.type, _UNSERVED)
    if chosen == "triton":
        op.product_triton(total, left, other, precision, right is None)
    elif chosen == "cpu":
        blocked.add_product(total, left, other, precision, right is None)
    else:
        exact = product_reference(left, other, precision)
        total += (exact.tril() if right is None else exact).to(total.dtype)
    return total


def add_hadamard_gram(
    total: Tensor,
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor] | None = None,
    *,
    splits: Sequence[tuple[int, int]],
    biases: Sequence[bool] | None = None,
    precision: str = "float32",
    backend: str | None = None,
) -> Tensor:
    """Adds the Gram matrix of weight gradients b ⊗ a of layers with one position, which are never formed.

    Equals ``total += Σ_l (A_l @ A'_l.T + bias_l) * (B_l @ B'_l.T)``, since ⟨b ⊗ a, b' ⊗ a'⟩ = ⟨a, a'⟩ ⟨b, b'⟩, and the
    gradient of a bias is b alone. Without `right` the lower triangle.

    Args:
        total: See `add_gram`.
        left: A (I, Σ d) and B (I, Σ p): the layers' inputs and output gradients, layer beside layer.
        right: The same for J, or ``None``.
        splits: (d, p) of each layer, in order.
        biases: Whether each layer has a bias, counted as 1; ``None``: none has.
        precision: Of both products; see `add_gram`.
        backend: See `add_gram`.

    Returns:
        `total`.

    Raises:
        TypeError: A dtype cannot be used.
        ValueError: Shapes, strides, devices or the precision do not fit; the message names the argument.
        NotImplementedError: The backend asked for cannot serve the call; the message says why.
    """
    other = left if right is None else right
    _check_total(total, precision)
    layers = [(int(width), int(outputs)) for width, outputs in splits]
    if any(size < 1 for pair in layers for size in pair):
        raise ValueError(f"splits: got {layers}, wanted positive (d, p) of each layer")
    biased = [False] * len(layers) if biases is None else [bool(bias) for bias in biases]
    if len(biased) != len(layers):
        raise ValueError(f"biases: got {len(biased)} of them, wanted one for each of the {len(layers)} layers")
    for name, sides, size in (("left", left, 0), ("right", other, 1)):
        for place in (0, 1):
            part = f"{name}[{place}]"
            _check_side(part, sides[place], total.shape[size], total)
            columns = sum(pair[place] for pair in layers)
            if sides[place].shape[1] != columns:
                raise ValueError(f"{part}: got {sides[place].shape[1]} columns, wanted {columns}, the sum over splits")
    _check_triangle(total, right is None)
    left, other = (left[0].detach(), left[1].detach()), (other[0].detach(), other[1].detach())
    chosen = _dispatch.choose(backend, total.device.type, _UNSERVED)
    if chosen != "cpu" and any(biased):  # a bias is a column of ones in A
        ones = [_with_ones(side[0], layers, biased) for side in (left, other)]
        left, other = (ones[0], left[1]), (ones[1], other[1])
        layers = [(width + bias, outputs) for (width, outputs), bias in zip(layers, biased, strict=True)]
    if chosen == "triton":
        widths, outputs = [pair[0] for pair in layers], [pair[1] for pair in layers]
        op.hadamard_triton(total, *left, *other, widths, outputs, precision, right is None)
    elif chosen == "cpu":
        blocked.add_hadamard(total, left, other, layers, biased, precision, right is None)
    else:
        exact = hadamard_reference(left, other, layers, precision)
        total += (exact.tril() if right is None else exact).to(total.dtype)
    return total


def _with_ones(side: Tensor, layers: Sequence[tuple[int, int]], biased: Sequence[bool]) -> Tensor:
    """A with a column of ones behind each layer that has a bias."""
    parts = zip(side.split([width for width, _ in layers], 1), biased, strict=True)
    return torch.cat([block for part, bias in parts for block in (part, *([part.new_ones(len(part), 1)] * bias))], 1)


def _check_total(total: Tensor, precision: str) -> None:
    _checks.check_option("precision", precision, PRECISIONS)
    _checks.check_full_precision("total", total)
    if total.dim() != 2:
        raise ValueError(f"total: got shape {_checks.shape_text(total)}, wanted (rows, columns)")
    if total.requires_grad:
        raise ValueError("total: requires grad, but it is added to in place; pass total.detach()")
    rows, columns = total.shape
    if (columns > 1 and total.stride(1) != 1) or (rows > 1 and total.stride(0) < columns):
        raise ValueError(f"total: got strides {total.stride()}, wanted rows that do not overlap, entries side by side")
    if precision == "float64" and total.element_size() != 8:
        raise TypeError(f"total: got {_checks.dtype_name(total)}, wanted float64 for precision='float64'")


def _check_side(name: str, side: Tensor, rows: int, total: Tensor) -> None:
    _checks.check_full_precision(name, side)
    if side.device != total.device:
        raise ValueError(f"{name}: is on {side.device}, wanted {total.device} as total")
    if side.dim() != 2 or side.shape[0] != rows:
        raise ValueError(
            f"{name}: got shape {_checks.shape_text(side)}, wanted ({rows}, columns) for a total "
            f"{_checks.shape_text(total)}"
        )


def _check_triangle(total: Tensor, triangle: bool) -> None:
    if triangle and total.shape[0] != total.shape[1]:
        raise ValueError(f"total: got shape {_checks.shape_text(total)}, wanted a square one where right is None")
