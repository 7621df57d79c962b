"""Forward and backward of the self-distillation loss (hardmax), through autograd with fresh leaf tensors.

Each implementation is checked against the float64 reference before it is timed. Inputs rotate among enough copies to
leave the last-level cache.
"""

import functools
import importlib.util
import itertools

import torch

import sdfast
from benchmarks import peers
from benchmarks.harness import DEVICE, Case, compiled, copies_of, interleaved, measure
from benchmarks.shapes import COPY_SHARES, LOSS_SHAPES, ON_GPU

PEERS = {"best eager": "eager:", "best compiled": "compiled:", "F.cross_entropy": "F.cross_entropy"}
SMALL = {"128x10": (0.5, 0.6, 1.0), "128x100": (0.5, 0.6, None)}
TARGETS = {group: {"sdfast": SMALL.get(group.split()[0], (0.3, 0.5, 0.7))} for group in LOSS_SHAPES}
if ON_GPU:
    PEERS["own plain"] = "sdfast plain"
    TARGETS = {group: {"sdfast": (*rows["sdfast"], 1.05)} for group, rows in TARGETS.items()}
SHARES = {group: {"sdfast": share} for group, share in COPY_SHARES.items()}

ALPHA = 0.7


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
    # On a GPU two of them: the others compile to the same kernels.
    **{f"compiled: {f.__name__.removeprefix('eager_')}": f for f in peers.EAGER_COMPOSITIONS[: 2 if ON_GPU else None]},
    "sdfast": ours,
    "sdfast compiled": ours,
    "sdfast plain": ours_plain,
    "sdfast adaptive": ours_adaptive,
    "sdfast softmax T=0.5": ours_softmax,
}
if DEVICE.type == "cuda" and importlib.util.find_spec("liger_kernel"):
    ROWS["Liger-Kernel, no target"] = peers.liger_cross_entropy
MIXED = {name for name, f in ROWS.items() if f in (ours, *peers.EAGER_COMPOSITIONS)}


def step(function, logits, labels):
    """What one training step spends on the loss."""
    leaf = logits.detach().requires_grad_()
    function(leaf, labels, ALPHA).backward()
    return leaf.grad


def check(group, name, function):
    """Refuses to time a wrong gradient."""
    if name not in MIXED:
        return
    shape = LOSS_SHAPES[group]
    logits, labels = (tensor[: shape.checked_rows()] for tensor in inputs(group)[0])
    exact = logits.double().requires_grad_()
    sdfast.self_distillation_loss(exact, labels, ALPHA, backend="reference").backward()
    torch.testing.assert_close(step(function, logits, labels).double(), exact.grad, **shape.tolerance())


@functools.lru_cache(maxsize=1)
def inputs(group):
    """Enough copies of a group's inputs to leave the last-level cache."""
    rows, classes, dtype = shape = LOSS_SHAPES[group]
    return [
        (torch.empty(rows, classes, dtype=dtype).normal_(0, 4), torch.randint(0, classes, (rows,)))
        for _ in range(copies_of(shape.bytes))
    ]


def prepare(group, name):
    """A row's step, checked."""
    function = compiled(ROWS[name]) if "compiled" in name else ROWS[name]
    check(group, name, function)
    given = [(x.clone(), y) for x, y in inputs(group)] if "Liger" in name else inputs(group)  # it writes into them
    turn = itertools.cycle(given)
    shape = LOSS_SHAPES[group]
    floor = 2 * shape.bytes  # logits read once, gradient written once
    about = {"dtype": str(shape.dtype).removeprefix("torch.")}
    return Case(lambda: step(function, *next(turn)), floor_bytes=floor, copies=len(given), about=about)


@interleaved(LOSS_SHAPES, ROWS)
def test_loss(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)
