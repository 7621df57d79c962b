"""The Triton backend of the gradients per sample: kernels and launches.

A program owns one tile of one sample's result, so nothing is reduced between programs and the tile is written once, in
its place in the row. Proved by the interpreter; it has not run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdfast import _devices

TILE = 64  # outputs, and columns of the weight, of a program
POSITIONS = 32  # of a step

_REAL = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def convolution_kernel(
    input,  # (n, r, groups · ci, D, H, W)
    gradient,  # (n, r, groups · co, D', H', W')
    out,  # (n, width)
    is0, is1, is2, is3, is4, is5,
    gs0, gs1, gs2, gs3, gs4, gs5,
    out_stride,
    groups, inputs, outputs,
    in0, in1, in2,
    rows, out0, out1, out2,
    stride0, stride1, stride2,
    padding0, padding1, padding2,
    dilation0, dilation1, dilation2,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    M: tl.constexpr, J: tl.constexpr, P: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    # Computed: one tile (output channels, input channels x kernel positions) of one sample's weight gradient.
    # Fused: padding, stride and dilation as addresses, the sum over positions, the place in the row.
    # Never materialised: an unfolded or padded input.
    unit = tl.program_id(0).to(tl.int64)  # sample and group
    sample = unit // groups
    group = unit % groups
    o = tl.program_id(1).to(tl.int64) * M + tl.arange(0, M)  # (M,)
    j = tl.program_id(2).to(tl.int64) * J + tl.arange(0, J)  # (J,), as the weight has them
    taps: tl.constexpr = K0 * K1 * K2
    columns = inputs * taps
    tap = j % taps
    x_tap = tap % K2
    y_tap = (tap // K2) % K1
    z_tap = tap // (K1 * K2)
    input_pointers = input + sample * is0 + (group * inputs + j // taps) * is2
    gradient_pointers = gradient + sample * gs0 + (group * outputs + o) * gs2
    positions = rows * out0 * out1 * out2
    total = tl.zeros([M, J], REAL)
    for start in range(0, positions, P):
        t = start + tl.arange(0, P).to(tl.int64)
        x = t % out2
        y = (t // out2) % out1
        z = (t // (out2 * out1)) % out0
        row = t // (out2 * out1 * out0)
        inside = t < positions
        given = tl.load(
            gradient_pointers[:, None] + (row * gs1 + z * gs3 + y * gs4 + x * gs5)[None, :],
            mask=(o < outputs)[:, None] & inside[None, :],
            other=0.0,
        )  # (M, P)
        from_z = (z * stride0 - padding0)[:, None] + (z_tap * dilation0)[None, :]  # (P, J)
        from_y = (y * stride1 - padding1)[:, None] + (y_tap * dilation1)[None, :]
        from_x = (x * stride2 - padding2)[:, None] + (x_tap * dilation2)[None, :]
        seen = inside[:, None] & (j < columns)[None, :]
        seen &= (from_z >= 0) & (from_z < in0) & (from_y >= 0) & (from_y < in1) & (from_x >= 0) & (from_x < in2)
        patch = tl.load(
            input_pointers[None, :] + (row * is1)[:, None] + from_z * is3 + from_y * is4 + from_x * is5,
            mask=seen,
            other=0.0,
        )  # (P, J)
        if M == 1:  # depthwise: no product of matrices
            total += tl.sum(tl.trans(given) * patch, 0)[None, :]
        else:
            total += tl.dot(given, patch, input_precision="ieee", out_dtype=REAL)
    to = out + sample * out_stride + (group * outputs + o)[:, None] * columns + j[None, :]
    kept = (o < outputs)[:, None] & (j < columns)[None, :]
    if ACCUMULATE:
        total += tl.load(to, mask=kept, other=0.0)
    tl.store(to, total, mask=kept)


def _tile(count: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(count)))


def convolution(
    input: Tensor,  # (n, r, groups · ci, D, H, W)
    gradient: Tensor,  # (n, r, groups · co, D', H', W')
    out: Tensor,  # (n, width)
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    accumulate: bool,
) -> None:
    """`_sample_convolution_triton`: writes the weight gradients of all samples."""
    inputs, outputs = input.shape[2] // groups, gradient.shape[2] // groups
    if out.numel() == 0:
        return
    columns = out.shape[1] // (groups * outputs)
    tile = (1 if outputs == 1 else _tile(outputs, TILE), _tile(columns, TILE))
    grid = (len(input) * groups, triton.cdiv(outputs, tile[0]), triton.cdiv(columns, tile[1]))
    with _devices.current(out):
        convolution_kernel[grid](
            input, gradient, out, *input.stride(), *gradient.stride(), out.stride(0), groups, inputs, outputs,
            *input.shape[3:], input.shape[1], *gradient.shape[3:], *stride, *padding, *dilation, *kernel, accumulate,
            *tile, POSITIONS, _REAL[out.dtype],
        )  # fmt: skip


@triton.jit
def channels_kernel(
    input,  # (n, r, channels, positions), or None
    gradient,  # (n, r, channels, positions)
    mean,  # (n, r, channels)
    rstd,  # (n, r, channels)
    weight,  # (n, channels) out, or None
    bias,  # (n, channels) out, or None
    xs0, xs1, xs2, xs3,
    gs0, gs1, gs2, gs3,
    ms0, ms1, ms2,
    ss0, ss1, ss2,
    weight_stride, bias_stride,
    rows, channels, positions,
    ACCUMULATE: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    # Computed: C channels of one sample: sums over rows and positions of g (x - mean) rstd, and of g.
    # Fused: both sums, the normalisation, the place in the row.
    # Never materialised: the normalised input.
    sample = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * C + tl.arange(0, C)
    inside = c < channels
    scaled = tl.zeros([C], REAL)
    plain = tl.zeros([C], REAL)
    for row in range(rows):
        part = tl.zeros([C], REAL)
        center = tl.zeros([C], REAL)
        if input is not None:
            center = tl.load(mean + sample * ms0 + row * ms1 + c * ms2, mask=inside, other=0.0)
        for start in range(0, positions, P):
            t = start + tl.arange(0, P).to(tl.int64)
            seen = inside[:, None] & (t < positions)[None, :]
            given = tl.load(
                gradient + sample * gs0 + row * gs1 + c[:, None] * gs2 + t[None, :] * gs3, mask=seen, other=0.0
            )
            plain += tl.sum(given, 1)
            if input is not None:
                x = tl.load(
                    input + sample * xs0 + row * xs1 + c[:, None] * xs2 + t[None, :] * xs3, mask=seen, other=0.0
                )
                part += tl.sum(given * (x - center[:, None]), 1)
        if input is not None:
            scaled += part * tl.load(rstd + sample * ss0 + row * ss1 + c * ss2, mask=inside, other=0.0)
    if weight is not None:
        to = weight + sample * weight_stride + c
        if ACCUMULATE:
            scaled += tl.load(to, mask=inside, other=0.0)
        tl.store(to, scaled, mask=inside)
    if bias is not None:
        to = bias + sample * bias_stride + c
        if ACCUMULATE:
            plain += tl.load(to, mask=inside, other=0.0)
        tl.store(to, plain, mask=inside)


def channels(
    input: Tensor | None,  # (n, r, channels, positions)
    gradient: Tensor,  # (n, r, channels, positions)
    mean: Tensor | None,  # (n, r, channels)
    rstd: Tensor | None,  # (n, r, channels)
    weight: Tensor | None,  # (n, channels)
    bias: Tensor | None,  # (n, channels)
    accumulate: bool,
) -> None:
    """`_sample_channels_triton`: scale and shift of every channel of all samples."""
    samples, rows, count, positions = gradient.shape
    if samples * count == 0:
        return
    tile = _tile(count, 32)
    with _devices.current(gradient):
        channels_kernel[(samples, triton.cdiv(count, tile))](
            input, gradient, mean, rstd, weight, bias,
            *((0,) * 4 if input is None else input.stride()), *gradient.stride(),
            *((0,) * 3 if mean is None else mean.stride()), *((0,) * 3 if rstd is None else rstd.stride()),
            0 if weight is None else weight.stride(0), 0 if bias is None else bias.stride(0),
            rows, count, positions, accumulate, tile, 64, _REAL[gradient.dtype],
        )  # fmt: skip


@triton.jit
def positions_kernel(
    input,  # (n, positions, channels)
    gradient,  # (n, positions, channels)
    weight,  # (n, channels) out, or None
    bias,  # (n, channels) out, or None
    xs0, xs1, xs2,
    gs0, gs1, gs2,
    weight_stride, bias_stride,
    positions, channels,
    eps: tl.float64,
    CENTERED: tl.constexpr, ACCUMULATE: tl.constexpr,
    C: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    # Computed: one sample's sums over positions of g times the normalised input, and of g; a position's channels are
    # Fused: its mean and deviation with them, both sums, the place in the row.
    # Never materialised: the normalised input or its statistics.
    sample = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C).to(tl.int64)
    inside = c < channels
    scaled = tl.zeros([C], REAL)
    plain = tl.zeros([C], REAL)
    for t in range(positions):
        x = tl.load(input + sample * xs0 + t * xs1 + c * xs2, mask=inside, other=0.0)
        if CENTERED:
            x = tl.where(inside, x - tl.sum(x, 0) / channels, 0.0)
        deviation = tl.sqrt(tl.full([1], eps, REAL) + tl.sum(x * x, 0) / channels)
        given = tl.load(gradient + sample * gs0 + t * gs1 + c * gs2, mask=inside, other=0.0)
        scaled += given * (x / deviation)
        plain += given
    if weight is not None:
        to = weight + sample * weight_stride + c
        if ACCUMULATE:
            scaled += tl.load(to, mask=inside, other=0.0)
        tl.store(to, scaled, mask=inside)
    if bias is not None:
        to = bias + sample * bias_stride + c
        if ACCUMULATE:
            plain += tl.load(to, mask=inside, other=0.0)
        tl.store(to, plain, mask=inside)


def positions(
    input: Tensor,  # (n, positions, channels)
    gradient: Tensor,  # (n, positions, channels)
    centered: bool,
    eps: float,
    weight: Tensor | None,  # (n, channels)
    bias: Tensor | None,  # (n, channels)
    accumulate: bool,
) -> None:
    """`_sample_positions_triton`: scale and shift where every position is normalised over its channels."""
    samples, count, width = gradient.shape
    if samples * width == 0:
        return
    with _devices.current(gradient):
        positions_kernel[(samples,)](
            input, gradient, weight, bias, *input.stride(), *gradient.stride(),
            0 if weight is None else weight.stride(0), 0 if bias is None else bias.stride(0),
            count, width, eps, centered, accumulate, triton.next_power_of_2(width), _REAL[gradient.dtype],
        )  # fmt: skip
