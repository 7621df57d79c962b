"""Forward and backward of the self-distillation loss (hardmax, float32), through autograd with fresh leaf tensors.

Each implementation is checked against the float64 reference before it is timed. Inputs rotate among enough copies to
leave the last-level cache.
"""

import functools
import itertools

import torch

import sdfast
from benchmarks import peers
from benchmarks.harness import Case, interleaved, measure
from benchmarks.shapes import LOSS_SHAPES

PEERS = {"best eager": "eager:", "best compiled": "compiled:", "F.cross_entropy": "F.cross_entropy"}
TARGETS = {
    "128x10": {"sdfast": (0.5, 0.6, 1.0)},
    "128x100": {"sdfast": (0.5, 0.6, None)},
    "1024x1000": {"sdfast": (0.3, 0.5, 0.7)},
    "4096x1000": {"sdfast": (0.3, 0.5, 0.7)},
    "512x32000": {"sdfast": (0.3, 0.5, 0.7)},
    "1024x50257": {"sdfast": (0.3, 0.5, 0.7)},
}

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


@functools.lru_cache(maxsize=1)
def inputs(group):
    """Enough copies of a group's inputs to leave the last-level cache, at most eight."""
    rows, classes = LOSS_SHAPES[group]
    copies = max(1, min(8, CACHE_BYTES // (rows * classes * 4)))
    return [(4 * torch.randn(rows, classes), torch.randint(0, classes, (rows,))) for _ in range(copies)]


def prepare(group, name):
    """A row's step, checked."""
    function = torch.compile(ROWS[name], fullgraph=True) if "compiled" in name else ROWS[name]
    check(name, function, *inputs(group)[0])
    turn = itertools.cycle(inputs(group))
    rows, classes = LOSS_SHAPES[group]
    floor = 2 * 4 * rows * classes  # logits read once, gradient written once
    return Case(lambda: step(function, *next(turn)), floor_bytes=floor, about={"dtype": "float32"})


@interleaved(LOSS_SHAPES, ROWS)
def test_loss(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)
