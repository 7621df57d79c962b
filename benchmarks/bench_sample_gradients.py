"""Weight gradients per sample of ResNet-20's 3 x 3 convolutions, and of its batch norms (float32).

Each implementation is checked against float64 autograd before it is timed, in both memory formats. Peers: the grouped
convolution that libraries use, an unfolded input and a batched product, and ``torch.func.vmap(grad)``.
"""

import functools

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, interleaved, measure
from sdfast.ops.sample_gradients import channel_sample_gradients, convolution_sample_gradients

PEERS = {"best of torch": "torch:", "GEMM of as many FLOPs": "GEMM"}

# (inputs, outputs, size of the input, stride); how often ResNet-20 has it
LAYERS = {
    "3-16": (3, 16, 32, 1),  # once
    "16-16": (16, 16, 32, 1),  # six times
    "16-32/2": (16, 32, 32, 2),  # once
    "32-32": (32, 32, 16, 1),  # five times
    "32-64/2": (32, 64, 16, 2),  # once
    "64-64": (64, 64, 8, 1),  # five times
}
GROUPS = {f"{name} n={n}": (n, *layer) for n in (32, 128) for name, layer in LAYERS.items()}
NORMS = {f"batch norm {c} n={n}": (n, c, size) for n in (32, 128) for c, size in ((16, 32), (32, 16), (64, 8))}
TARGETS = {group: {"sdfast": (None, None)} for group in GROUPS}


def grouped(x, g, stride, out):
    """Every sample a group of its own."""
    n, outputs, inputs = len(x), g.shape[1], x.shape[1]
    shape = (n * outputs, inputs, 3, 3)
    _, rows, _ = torch.ops.aten.convolution_backward(
        g.reshape(1, -1, *g.shape[2:]), x.reshape(1, -1, *x.shape[2:]), x.new_empty(()).expand(shape), None,
        (stride,) * 2, (1, 1), (1, 1), False, (0, 0), n, (False, True, False),
    )  # fmt: skip
    return out.copy_(rows.view(n, -1))


def unfolded(x, g, stride, out):
    """The unfolded input and a batched product."""
    columns = F.unfold(x, 3, padding=1, stride=stride)  # (n, 9C, T)
    return torch.bmm(g.flatten(2), columns.mT, out=out.view(len(x), g.shape[1], -1)).flatten(1)


def transformed(x, g, stride, out):
    """torch.func."""

    def product(weight, a, b):
        return (F.conv2d(a[None], weight, stride=stride, padding=1)[0] * b).sum()

    weight = x.new_zeros(g.shape[1], x.shape[1], 3, 3)
    return out.copy_(torch.func.vmap(torch.func.grad(product), (None, 0, 0))(weight, x, g).flatten(1))


def ours(x, g, stride, out):
    """The operation."""
    return convolution_sample_gradients(x, g, (3, 3), stride=stride, padding=1, out=out)


ROWS = {
    "torch: grouped convolution": grouped,
    "torch: unfold + bmm": unfolded,
    "torch: vmap(grad)": transformed,
    "sdfast": ours,
    "sdfast channels_last": ours,
    "GEMM": None,
}
NORM_ROWS = ("torch: product and sum", "sdfast", "sdfast channels_last")


@functools.lru_cache(maxsize=1)
def inputs(group):
    """(input, gradient, exact rows) of a group."""
    n, channels, outputs, size, stride = GROUPS[group]
    x, g = torch.randn(n, channels, size, size), torch.randn(n, outputs, size // stride, size // stride)
    weight = x.new_zeros(outputs, channels, 3, 3, dtype=torch.float64, requires_grad=True)
    exact = []
    for a, b in zip(x.double(), g.double(), strict=True):
        result = F.conv2d(a[None], weight, stride=stride, padding=1)
        exact.append(torch.autograd.grad(result, weight, b[None])[0].flatten())
    return x, g, torch.stack(exact)


def prepare(group, name):
    """A row's step, checked."""
    n, _channels, _outputs, size, stride = GROUPS[group]
    x, g, exact = inputs(group)
    positions = (size // stride) ** 2
    flops = 2 * exact.numel() * positions
    if name == "GEMM":  # square factors of the same work: the rate that torch's BLAS has on this machine
        side = max(64, round((flops / 2) ** (1 / 3)))
        left, right, product = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
        return Case(lambda: torch.mm(left, right, out=product), floor_flops=2 * side**3)
    if "channels_last" in name:
        x, g = (t.to(memory_format=torch.channels_last) for t in (x, g))
    out = torch.empty(n, exact.shape[1])
    got = ROWS[name](x, g, stride, out)
    if (got - exact).norm() > 1e-5 * exact.norm():
        raise SystemExit(f"bench_sample_gradients: {name} is wrong at {group}")
    floor = 4 * (x.numel() + g.numel() + exact.numel())
    return Case(lambda: ROWS[name](x, g, stride, out), floor_bytes=floor, floor_flops=flops)


def prepare_norm(group, name):
    """A row's step, checked."""
    n, channels, size = NORMS[group]
    x, g = torch.randn(2, n, 1, channels, size, size)
    if "channels_last" in name:
        x, g = (t.movedim(2, -1).contiguous().movedim(-1, 2) for t in (x, g))
    mean, variance = torch.randn(channels), torch.rand(channels) + 0.5
    rstd = variance.rsqrt()

    def composed():
        normalized = F.batch_norm(x[:, 0], mean, variance, eps=0.0)
        return (normalized * g[:, 0]).sum((2, 3)), g[:, 0].sum((2, 3))

    def fused():
        return channel_sample_gradients(x, g, mean, rstd)

    for got, wanted in zip(fused(), composed(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    return Case(composed if "torch" in name else fused, floor_bytes=8 * x.numel())


@interleaved(GROUPS, ROWS)
def test_convolution(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)


@interleaved(NORMS, NORM_ROWS)
def test_batch_norm(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare_norm)
