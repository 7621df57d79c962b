"""Forward and backward of the linear self-distillation loss (hardmax), gradients of hidden states and weight.

The peers: its three matrix products alone, the unfused loss of the whole logits by torch and by this package, and
PyTorch's own linear_cross_entropy, which does less (no target), where this torch has it. Liger-Kernel's fused linear
losses are Triton kernels: a row for them wants a GPU, and the package.
"""

import functools
import importlib.util

import torch
import torch.nn.functional as F

import sdfast
from benchmarks import peers
from benchmarks.harness import DEVICE, Case, interleaved, measure
from benchmarks.shapes import LINEAR_SHAPES

PEERS = {"three products": "GEMMs", "eager": "eager", "linear_cross_entropy": "F.linear_cross_entropy"}
TARGETS = {group: {"sdfast": (1.25, None, None)} for group in LINEAR_SHAPES}

ALPHA = 0.7


def products(hidden, weight, labels):
    """The logits and the two gradients' products, and nothing between: stands for a gradient, is none."""
    logits = hidden.detach() @ weight.detach().t()
    return logits @ weight.detach(), logits.t() @ hidden.detach()


def eager(hidden, weight, labels):
    """Two cross entropies of the whole logits."""
    return peers.eager_two_losses(F.linear(hidden, weight), labels, ALPHA)


def ours(hidden, weight, labels):
    """The call."""
    return sdfast.linear_self_distillation_loss(hidden, weight, labels, ALPHA)


def ours_unfused(hidden, weight, labels):
    """This package's loss of the whole logits."""
    return sdfast.self_distillation_loss(F.linear(hidden, weight), labels, ALPHA)


def linear_cross_entropy(hidden, weight, labels):
    """PyTorch's own, in chunks: hard labels."""
    return F.linear_cross_entropy(hidden, weight, labels)


def liger(hidden, weight, labels):
    """Liger's fused linear cross entropy: hard labels."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def cut_cross_entropy(hidden, weight, labels):
    """Apple's: hard labels, gradients below a threshold left out."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels)


ROWS = {"GEMMs": products, "eager": eager, "sdfast": ours, "sdfast unfused": ours_unfused}
if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
    ROWS["F.linear_cross_entropy"] = linear_cross_entropy
if DEVICE.type == "cuda" and importlib.util.find_spec("liger_kernel"):
    ROWS["Liger-Kernel"] = liger
if DEVICE.type == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
    ROWS["cut-cross-entropy"] = cut_cross_entropy


def step(function, hidden, weight, labels):
    """What one training step spends on classifier and loss."""
    if function is products:
        return products(hidden, weight, labels)
    leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
    function(*leaves, labels).backward()
    return [leaf.grad for leaf in leaves]


@functools.lru_cache(maxsize=1)
def inputs(group):
    """(hidden, weight, labels)"""
    rows, width, classes, dtype = LINEAR_SHAPES[group]
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(classes, width) / width**0.5).to(dtype)
    return hidden, weight, torch.randint(0, classes, (rows,))


@functools.lru_cache(maxsize=1)
def exact(group):
    """The gradients in float64, of the first rows where all would take too long."""
    hidden, weight, labels = inputs(group)
    leaves = [t.double().requires_grad_() for t in (hidden[:256], weight)]
    sdfast.linear_self_distillation_loss(*leaves, labels[:256], ALPHA, backend="reference").backward()
    return [leaf.grad for leaf in leaves]


def check(function, group):
    """Refuses to time a wrong gradient."""
    if function in (eager, ours, ours_unfused):
        hidden, weight, labels = inputs(group)
        for got, want in zip(step(function, hidden[:256], weight, labels[:256]), exact(group), strict=True):
            torch.testing.assert_close(got.double(), want, **LINEAR_SHAPES[group].tolerance())


def prepare(group, name):
    """A row's step, checked."""
    rows, width, classes, dtype = LINEAR_SHAPES[group]
    check(ROWS[name], group)
    about = {"dtype": str(dtype).removeprefix("torch.")}
    # Three products; hidden states and weight read, their gradients written.
    flops, moved = 6 * rows * width * classes, 2 * (rows + classes) * width * dtype.itemsize
    return Case(lambda: step(ROWS[name], *inputs(group)), floor_bytes=moved, floor_flops=flops, rounds=1, about=about)


@interleaved(LINEAR_SHAPES, ROWS)
def test_loss(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)
