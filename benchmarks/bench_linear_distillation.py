"""Forward and backward of the linear distillation loss (labels, KL, T = 4), gradients of hidden states and weight.

The teacher has twice the student's width. The peers: the four matrix products alone, and the unfused loss of the whole
logits by torch and by this package. Liger-Kernel's fused linear losses want a GPU, and the package.
"""

import functools

import torch
import torch.nn.functional as F

import sdfast
from benchmarks import bench_distillation
from benchmarks.harness import Case, interleaved, measure
from benchmarks.shapes import LINEAR_SHAPES

PEERS = {"four products": "GEMMs", "eager": "eager"}
TARGETS = {group: {"sdfast": (1.25, None)} for group in LINEAR_SHAPES}


def products(hidden, weight, teacher_hidden, teacher_weight, labels):
    """Both logits and the two gradients' products, and nothing between: stands for a gradient, is none."""
    logits = hidden.detach() @ weight.detach().t()
    teacher_hidden @ teacher_weight.t()
    return logits @ weight.detach(), logits.t() @ hidden.detach()


def eager(hidden, weight, teacher_hidden, teacher_weight, labels):
    """kl_div and cross entropy of the whole logits."""
    return bench_distillation.eager_kl_div(F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight), labels)


def ours(hidden, weight, teacher_hidden, teacher_weight, labels):
    """The call."""
    return sdfast.linear_distillation_loss(
        hidden, weight, teacher_hidden, teacher_weight, labels, alpha=bench_distillation.ALPHA,
        temperature=bench_distillation.TEMPERATURE,
    )  # fmt: skip


def ours_unfused(hidden, weight, teacher_hidden, teacher_weight, labels):
    """This package's loss of the whole logits."""
    return bench_distillation.ours(F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight), labels)


ROWS = {"GEMMs": products, "eager": eager, "sdfast": ours, "sdfast unfused": ours_unfused}


def step(function, hidden, weight, *rest):
    """What one training step spends on classifiers and loss."""
    if function is products:
        return products(hidden, weight, *rest)
    leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
    function(*leaves, *rest).backward()
    return [leaf.grad for leaf in leaves]


@functools.lru_cache(maxsize=1)
def inputs(group):
    """(hidden, weight, teacher's hidden, teacher's weight, labels)"""
    rows, width, classes, dtype = LINEAR_SHAPES[group]
    student = torch.randn(rows, width), torch.randn(classes, width) / width**0.5
    teacher = torch.randn(rows, 2 * width), torch.randn(classes, 2 * width) / width**0.5
    return *(tensor.to(dtype) for tensor in (*student, *teacher)), torch.randint(0, classes, (rows,))


def first_rows(group, count=256):
    """The inputs of the first rows, on which results are checked."""
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs(group)
    return hidden[:count], weight, teacher_hidden[:count], teacher_weight, labels[:count]


@functools.lru_cache(maxsize=1)
def exact(group):
    """The gradients of the first rows in float64."""
    *tensors, labels = first_rows(group)
    leaves = [t.double().requires_grad_(i < 2) for i, t in enumerate(tensors)]
    sdfast.linear_distillation_loss(
        *leaves, labels, alpha=bench_distillation.ALPHA, temperature=bench_distillation.TEMPERATURE, backend="reference"
    ).backward()
    return [leaf.grad for leaf in leaves[:2]]


def check(function, group):
    """Refuses to time a wrong gradient."""
    if function is not products:
        for got, want in zip(step(function, *first_rows(group)), exact(group), strict=True):
            torch.testing.assert_close(got.double(), want, **LINEAR_SHAPES[group].tolerance())


def prepare(group, name):
    """A row's step, checked."""
    rows, width, classes, dtype = LINEAR_SHAPES[group]
    check(ROWS[name], group)
    flops = (6 + 2 * 2) * rows * width * classes  # three products of the student, one of a teacher twice as wide
    # The student's read and their gradients written; the teacher's, twice as wide, read.
    moved = 4 * (rows + classes) * width * dtype.itemsize
    about = {"dtype": str(dtype).removeprefix("torch.")}
    return Case(lambda: step(ROWS[name], *inputs(group)), floor_bytes=moved, floor_flops=flops, rounds=1, about=about)


@interleaved(LINEAR_SHAPES, ROWS)
def test_loss(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)
