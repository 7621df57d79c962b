"""Gradients per sample in plain PyTorch: the definition that every backend is compared with."""

import torch
from torch import Tensor
from torch.nn import functional

from sdfast.ops.sample_gradients.geometry import Geometry


def convolution_reference(
    input: Tensor,  # (n, r, groups · ci, D, H, W)
    gradient: Tensor,  # (n, r, groups · co, D', H', W')
    geometry: Geometry,
) -> Tensor:
    """out[i, o, c, k] = Σ_{r,t} gradient[i, r, o, t] input[i, r, c, t s + k d − p], flattened to (n, width)."""
    groups = geometry.groups
    out = gradient.shape[3:]
    ends = []
    for axis in (2, 1, 0):
        before = geometry.padding[axis]
        ends += [before, max(0, geometry.extent(axis, out) - before - input.shape[3 + axis])]
    padded = functional.pad(input, ends).unflatten(2, (groups, -1))
    given = gradient.unflatten(2, (groups, -1))
    taps = []
    for tap in geometry.taps():
        starts = [at * dilation for at, dilation in zip(tap, geometry.dilation, strict=True)]
        window = [
            slice(start, max(start, start + (size - 1) * stride + 1), stride)
            for start, size, stride in zip(starts, out, geometry.stride, strict=True)
        ]
        taps.append(torch.einsum("nrgozyx,nrgczyx->ngoc", given, padded[(..., *window)]))
    return torch.stack(taps, -1).flatten(1)


def channels_reference(
    input: Tensor | None,  # (n, r, C, T)
    gradient: Tensor,  # (n, r, C, T)
    mean: Tensor | None,  # (n, r, C)
    rstd: Tensor | None,  # (n, r, C)
) -> tuple[Tensor | None, Tensor]:
    """(Σ_{r,t} g (x − mean) rstd, Σ_{r,t} g), each (n, C)."""
    plain = gradient.sum((1, 3))
    if input is None or mean is None or rstd is None:
        return None, plain
    return (gradient * (input - mean[..., None]) * rstd[..., None]).sum((1, 3)), plain


def positions_reference(
    input: Tensor,  # (n, T, C)
    gradient: Tensor,  # (n, T, C)
    centered: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(Σ_t g x̂, Σ_t g), each (n, C): x̂ has mean 0 (where centred) and mean square 1 over the channels."""
    if centered:
        input = input - input.mean(-1, keepdim=True)
    normalized = input * (input.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (gradient * normalized).sum(1), gradient.sum(1)
