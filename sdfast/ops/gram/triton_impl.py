"""The Triton backend of the Gram products: a program owns a tile of the total, so each entry is read and written once.

Of a triangle only the tiles on and below the diagonal are launched. Sums stay in the float32 of the tensor cores for at
most `TERMS` terms, and are then added to the tile's total in its own dtype. Proved by the interpreter; it has not run
on a GPU, and the tile sizes are not measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdfast import _devices
from sdfast.ops.gram.precision import PRECISIONS, TERMS

TILE = 64
STEP = 32  # terms of one product of tiles

_REAL = {torch.float32: tl.float32, torch.float64: tl.float64}
_CODES = {name: code for code, name in enumerate(PRECISIONS)}
FLOAT64 = tl.constexpr(_CODES["float64"])
BF16X3 = tl.constexpr(_CODES["bf16x3"])
TF32 = tl.constexpr(_CODES["tf32"])
BF16 = tl.constexpr(_CODES["bf16"])


@triton.jit
def rounded(x, DROP: tl.constexpr):
    """Float32 without its last DROP bits, to nearest even; what is not finite stays."""
    whole = x.to(tl.int32, bitcast=True)
    kept = (whole + ((whole >> DROP) & 1) + ((1 << (DROP - 1)) - 1)) & (-(1 << DROP))
    finite = (whole & 0x7F800000) != 0x7F800000
    return tl.where(finite, kept.to(tl.float32, bitcast=True), x)


@triton.jit
def multiply(total, left, right, PRECISION: tl.constexpr, HALF: tl.constexpr):
    """Total + left @ right of operands rounded to the precision, (I, STEP) and (STEP, J)."""
    if PRECISION == BF16X3:
        high = rounded(left, 16)
        low = rounded(left - high, 16)
        other_high = rounded(right, 16)
        other_low = rounded(right - other_high, 16)
        total = tl.dot(low.to(HALF), other_high.to(HALF), total)
        total = tl.dot(high.to(HALF), other_low.to(HALF), total)
        total = tl.dot(high.to(HALF), other_high.to(HALF), total)
    elif PRECISION == BF16:
        total = tl.dot(rounded(left, 16).to(HALF), rounded(right, 16).to(HALF), total)
    elif PRECISION == TF32:
        total = tl.dot(rounded(left, 13), rounded(right, 13), total, input_precision="tf32")
    else:
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=total.dtype)
    return total


@triton.jit
def tile_product(
    left, right, i, j, left_rows, right_rows, left_stride, left_step, right_stride, right_step, first, last,
    PRECISION: tl.constexpr, PROMOTE: tl.constexpr, T: tl.constexpr, K: tl.constexpr, OPERAND: tl.constexpr,
    HALF: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Columns `first` to `last` of left @ right.T for the rows i and j."""
    total = tl.zeros([T, T], REAL)
    for chunk in range(first, last, PROMOTE):
        part = tl.zeros([T, T], OPERAND)
        for start in range(chunk, tl.minimum(chunk + PROMOTE, last), K):
            k = start + tl.arange(0, K).to(tl.int64)
            seen = k < last
            rows = tl.load(
                left + i[:, None] * left_stride + k[None, :] * left_step,
                mask=(i < left_rows)[:, None] & seen[None, :],
                other=0.0,
            ).to(OPERAND)  # (T, K)
            columns = tl.load(
                right + j[None, :] * right_stride + k[:, None] * right_step,
                mask=(j < right_rows)[None, :] & seen[:, None],
                other=0.0,
            ).to(OPERAND)  # (K, T)
            part = multiply(part, rows, columns, PRECISION, HALF)
        total += part.to(REAL)
    return total


@triton.jit
def tile_of(program, columns, TRIANGLE: tl.constexpr):
    """(row, column) of a program's tile: of a triangle row by row, up to the diagonal."""
    if TRIANGLE:
        # The largest row with row (row + 1) / 2 <= program; the square root may be off by one either way.
        row = ((tl.sqrt(8.0 * program.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int64)
        row = tl.where(row * (row + 1) // 2 > program, row - 1, row)
        row = tl.where((row + 1) * (row + 2) // 2 <= program, row + 1, row)
        column = program - row * (row + 1) // 2
    else:
        row = program // columns
        column = program % columns
    return row, column


@triton.jit
def add_tile(total, product, i, j, rows, columns, stride, TRIANGLE: tl.constexpr):
    """Adds to the total, of a triangle on and below the diagonal only."""
    kept = (i < rows)[:, None] & (j < columns)[None, :]
    if TRIANGLE:
        kept &= j[None, :] <= i[:, None]
    to = total + i[:, None] * stride + j[None, :]
    before = tl.load(to, mask=kept, other=0.0)
    tl.store(to, before + product.to(before.dtype), mask=kept)


@triton.jit
def product_kernel(
    total,  # (I, J)
    left,  # (I, K)
    right,  # (J, K)
    rows, columns, width, total_stride, left_stride, left_step, right_stride, right_step,
    TRIANGLE: tl.constexpr, PRECISION: tl.constexpr, PROMOTE: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
    OPERAND: tl.constexpr, HALF: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    # Computed: one tile of total += left @ right.T.
    # Fused: the rounding or splitting of the operands, the promotion of the sums, the triangle, the addition.
    # Never materialised: rounded operands, the product.
    row, column = tile_of(tl.program_id(0).to(tl.int64), tl.cdiv(columns, T), TRIANGLE)
    i = row * T + tl.arange(0, T)
    j = column * T + tl.arange(0, T)
    product = tile_product(
        left, right, i, j, rows, columns, left_stride, left_step, right_stride, right_step, 0, width, PRECISION,
        PROMOTE, T, K, OPERAND, HALF, REAL,
    )  # fmt: skip
    add_tile(total, product, i, j, rows, columns, total_stride, TRIANGLE)


@triton.jit
def hadamard_kernel(
    total,  # (I, J)
    left_a,  # (I, Σ d)
    left_b,  # (I, Σ p)
    right_a,  # (J, Σ d)
    right_b,  # (J, Σ p)
    splits,  # (2, layers + 1) int64: where each layer's columns begin in A and in B, and at last their end
    rows, columns, layers, total_stride, left_a_stride, left_a_step, left_b_stride, left_b_step, right_a_stride,
    right_a_step, right_b_stride, right_b_step,
    TRIANGLE: tl.constexpr, PRECISION: tl.constexpr, PROMOTE: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
    OPERAND: tl.constexpr, HALF: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    # Computed: one tile of total += the sum over all layers of (A A'ᵀ) ∘ (B B'ᵀ).
    # Fused: both products of every layer, their Hadamard product, the sum over layers, the triangle, the addition.
    # Never materialised: a matrix of the size of the total.
    row, column = tile_of(tl.program_id(0).to(tl.int64), tl.cdiv(columns, T), TRIANGLE)
    i = row * T + tl.arange(0, T)
    j = column * T + tl.arange(0, T)
    result = tl.zeros([T, T], REAL)
    for layer in range(layers):
        similar = tile_product(
            left_a, right_a, i, j, rows, columns, left_a_stride, left_a_step, right_a_stride, right_a_step,
            tl.load(splits + layer), tl.load(splits + layer + 1), PRECISION, PROMOTE, T, K, OPERAND, HALF, REAL,
        )  # fmt: skip
        result += similar * tile_product(
            left_b, right_b, i, j, rows, columns, left_b_stride, left_b_step, right_b_stride, right_b_step,
            tl.load(splits + layers + 1 + layer), tl.load(splits + layers + 2 + layer), PRECISION, PROMOTE, T, K,
            OPERAND, HALF, REAL,
        )  # fmt: skip
    add_tile(total, result, i, j, rows, columns, total_stride, TRIANGLE)


def _programs(total: Tensor, triangle: bool) -> tuple[int]:
    rows, columns = (triton.cdiv(size, TILE) for size in total.shape)
    return (rows * (rows + 1) // 2 if triangle else rows * columns,)


def _options(total: Tensor, precision: str, triangle: bool) -> tuple:
    operand = tl.float64 if precision == "float64" else tl.float32
    # The interpreter's tl.dot has no bfloat16; the rounded operands are the same numbers in float32.
    half = tl.float32 if total.device.type == "cpu" else tl.bfloat16
    return triangle, _CODES[precision], TERMS, TILE, STEP, operand, half, _REAL[total.dtype]


def product(
    total: Tensor,  # (I, J)
    left: Tensor,  # (I, K)
    right: Tensor,  # (J, K)
    precision: str,
    triangle: bool,
) -> None:
    """`_gram_product_triton`: total += left @ right.T."""
    if total.numel() == 0:
        return
    with _devices.current(total):
        product_kernel[_programs(total, triangle)](
            total, left, right, *total.shape, left.shape[1], total.stride(0), *left.stride(), *right.stride(),
            *_options(total, precision, triangle),
        )  # fmt: skip


def hadamard(
    total: Tensor,  # (I, J)
    left_a: Tensor,  # (I, Σ d)
    left_b: Tensor,  # (I, Σ p)
    right_a: Tensor,  # (J, Σ d)
    right_b: Tensor,  # (J, Σ p)
    widths: list[int],
    outputs: list[int],
    precision: str,
    triangle: bool,
) -> None:
    """`_gram_hadamard_triton`: total += Σ_l (A_l A'_lᵀ) ∘ (B_l B'_lᵀ)."""
    if total.numel() == 0:
        return
    sizes = torch.tensor([[0, *widths], [0, *outputs]], dtype=torch.int64)
    with _devices.current(total):
        hadamard_kernel[_programs(total, triangle)](
            total, left_a, left_b, right_a, right_b, sizes.cumsum(1).to(total.device), *total.shape, len(widths),
            total.stride(0), *left_a.stride(), *left_b.stride(), *right_a.stride(), *right_b.stride(),
            *_options(total, precision, triangle),
        )  # fmt: skip
