"""Forward and backward of the self-distillation loss (hardmax, float32), through autograd with fresh leaf tensors.

Each implementation is checked against the float64 reference before it is timed. Inputs rotate among enough copies to
leave the last-level cache.
"""

import itertools

import pytest
import torch

import sdfast
from benchmarks import peers
from benchmarks.shapes import LOSS_SHAPES

ALPHA = 0.7
CACHE_BYTES = 64 << 20


def ours(logits, labels, alpha):
    """The eager call."""
    return sdfast.self_distillation_loss(logits, labels, alpha)


def ours_plain(logits, labels, alpha):
    """The package's own plain cross entropy."""
    return sdfast.self_distillation_loss(logits, labels, 1.0)


def ours_adaptive(logits, labels, alpha):
    """Alpha from the batch's accuracy."""
    return sdfast.self_distillation_loss(logits, labels, sdfast.AdaptiveAlpha(1.0))


def ours_softmax(logits, labels, alpha):
    """A sharpened softmax of the logits: two exponentials an entry."""
    return sdfast.self_distillation_loss(logits, labels, alpha, label_fn="softmax", temperature=0.5)


ROWS = {
    "F.cross_entropy": peers.plain_cross_entropy,
    **{f"eager: {f.__name__.removeprefix('eager_')}": f for f in peers.EAGER_COMPOSITIONS},
    **{f"compiled: {f.__name__.removeprefix('eager_')}": f for f in peers.EAGER_COMPOSITIONS},
    "sdfast": ours,
    "sdfast compiled": ours,
    "sdfast plain": ours_plain,
    "sdfast adaptive": ours_adaptive,
    "sdfast softmax T=0.5": ours_softmax,
}
MIXED = {name for name, f in ROWS.items() if f in (ours, *peers.EAGER_COMPOSITIONS)}


def implementation(name):
    """The function of a row, compiled where its name says so."""
    if "compiled" not in name:
        return ROWS[name]
    torch._dynamo.reset()
    return torch.compile(ROWS[name], fullgraph=True)


def step(function, logits, labels):
    """What one training step spends on the loss."""
    leaf = logits.detach().requires_grad_()
    function(leaf, labels, ALPHA).backward()
    return leaf.grad


def check(name, function, logits, labels):
    """Refuses to time a wrong gradient."""
    if name not in MIXED:
        return
    exact = logits.double().requires_grad_()
    sdfast.self_distillation_loss(exact, labels, ALPHA, backend="reference").backward()
    torch.testing.assert_close(step(function, logits, labels).double(), exact.grad, rtol=1e-4, atol=1e-8)


def peak_bytes(function, logits, labels):
    """The most that torch's allocator holds during one step beyond what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step(function, logits, labels)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("shape", LOSS_SHAPES)
@pytest.mark.parametrize("name", ROWS)
def test_loss(benchmark, shape, name):
    rows, classes = LOSS_SHAPES[shape]
    benchmark.group = shape
    copies = max(1, min(8, CACHE_BYTES // (rows * classes * 4)))
    inputs = [(4 * torch.randn(rows, classes), torch.randint(0, classes, (rows,))) for _ in range(copies)]
    function = implementation(name)
    check(name, function, *inputs[0])
    turn = itertools.cycle(inputs)
    benchmark.extra_info.update(rows=rows, classes=classes, name=name, dtype="float32")
    benchmark.extra_info["peak_bytes"] = peak_bytes(function, *inputs[0])
    benchmark(lambda: step(function, *next(turn)))
