"""Forward and backward of the distillation loss (labels, KL, T = 4), through autograd with fresh leaf tensors.

Each implementation is checked against the float64 reference before it is timed. Inputs rotate among enough copies to
leave the last-level cache. Liger-Kernel's losses are Triton kernels without an interpreter path of their own: its row
appears on a GPU where the package is installed.
"""

import functools
import importlib.util
import itertools

import torch
import torch.nn.functional as F

import sdfast
from benchmarks.harness import DEVICE, Case, compiled, copies_of, interleaved, measure
from benchmarks.shapes import COPY_SHARES, LOSS_SHAPES, ON_GPU

PEERS = {"best eager": "eager:", "best compiled": "compiled:"}
TARGETS = {group: {"sdfast": (0.4, None)} for group in LOSS_SHAPES}
SHARES = {group: {"sdfast": share} for group, share in COPY_SHARES.items() if share == 0.9}

ALPHA = 0.5
TEMPERATURE = 4.0


def ours(logits, teacher, labels):
    """The eager call."""
    return sdfast.distillation_loss(logits, teacher, labels, alpha=ALPHA, temperature=TEMPERATURE)


def ours_without_labels(logits, teacher, labels):
    """The divergence alone."""
    return sdfast.distillation_loss(logits, teacher, temperature=TEMPERATURE)


def ours_js(logits, teacher, labels):
    """Jensen-Shannon."""
    return sdfast.distillation_loss(logits, teacher, labels, divergence="js", temperature=TEMPERATURE)


def ours_top_k(logits, teacher, labels):
    """A stored teacher: 10 log-probabilities a row, made beforehand."""
    return sdfast.distillation_loss(logits, stored(teacher), labels, temperature=TEMPERATURE)


def eager_kl_div(logits, teacher, labels):
    """What tutorials show: cross entropy, and kl_div of log-softmax and softmax."""
    log_p, q = F.log_softmax(logits / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    soft = F.kl_div(log_p, q, reduction="batchmean") * TEMPERATURE**2
    return ALPHA * F.cross_entropy(logits, labels) + (1 - ALPHA) * soft


def eager_log_target(logits, teacher, labels):
    """kl_div of two log-softmaxes."""
    log_p, log_q = F.log_softmax(logits / TEMPERATURE, -1), F.log_softmax(teacher / TEMPERATURE, -1)
    soft = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * TEMPERATURE**2
    return ALPHA * F.cross_entropy(logits, labels) + (1 - ALPHA) * soft


def eager_cross_entropy(logits, teacher, labels):
    """Cross entropy with the teacher's probabilities: the same gradient, a loss that differs by their entropy."""
    q = F.softmax(teacher / TEMPERATURE, -1)
    soft = F.cross_entropy(logits / TEMPERATURE, q) * TEMPERATURE**2
    return ALPHA * F.cross_entropy(logits, labels) + (1 - ALPHA) * soft


@functools.lru_cache(maxsize=64)
def stored(teacher):
    """The ten likeliest classes of each row."""
    return sdfast.TopK(*(teacher / TEMPERATURE).log_softmax(-1).topk(10, -1))


COMPOSITIONS = (eager_kl_div, eager_log_target, eager_cross_entropy)
ROWS = {
    **{f"eager: {f.__name__.removeprefix('eager_')}": f for f in COMPOSITIONS},
    **{f"compiled: {f.__name__.removeprefix('eager_')}": f for f in COMPOSITIONS[: 2 if ON_GPU else None]},
    "sdfast": ours,
    "sdfast compiled": ours,
    "sdfast without labels": ours_without_labels,
    "sdfast js": ours_js,
    "sdfast top-10": ours_top_k,
}
if DEVICE.type == "cuda" and importlib.util.find_spec("liger_kernel"):

    def liger(logits, teacher, labels):
        """Liger's KL and cross entropy, log-softmax by torch."""
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

        log_p, q = F.log_softmax(logits / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
        soft = LigerKLDIVLoss(reduction="batchmean")(log_p, q) * TEMPERATURE**2
        return ALPHA * LigerCrossEntropyLoss()(logits.clone(), labels) + (1 - ALPHA) * soft  # it overwrites its input

    ROWS["Liger-Kernel"] = liger
SAME = {name for name, f in ROWS.items() if f is ours or not name.startswith("sdfast")}


def step(function, logits, teacher, labels):
    """What one training step spends on the loss."""
    leaf = logits.detach().requires_grad_()
    function(leaf, teacher, labels).backward()
    return leaf.grad


def check(group, name, function):
    """Refuses to time a wrong gradient."""
    if name not in SAME:
        return
    shape = LOSS_SHAPES[group]
    logits, teacher, labels = (tensor[: shape.checked_rows()] for tensor in inputs(group)[0])
    exact = logits.double().requires_grad_()
    sdfast.distillation_loss(
        exact, teacher, labels, alpha=ALPHA, temperature=TEMPERATURE, backend="reference"
    ).backward()
    torch.testing.assert_close(step(function, logits, teacher, labels).double(), exact.grad, **shape.tolerance())


@functools.lru_cache(maxsize=1)
def inputs(group):
    """Enough copies of a group's inputs to leave the last-level cache."""
    rows, classes, dtype = shape = LOSS_SHAPES[group]
    return [
        (*torch.empty(2, rows, classes, dtype=dtype).normal_(0, 4).unbind(), torch.randint(0, classes, (rows,)))
        for _ in range(copies_of(2 * shape.bytes))
    ]


def prepare(group, name):
    """A row's step, checked."""
    function = compiled(ROWS[name]) if "compiled" in name else ROWS[name]
    check(group, name, function)
    for given in inputs(group) if name == "sdfast top-10" else ():
        stored(given[1])
    turn = itertools.cycle(inputs(group))
    shape = LOSS_SHAPES[group]
    floor = 3 * shape.bytes  # both logits read once, gradient written once
    about = {"dtype": str(shape.dtype).removeprefix("torch.")}
    return Case(lambda: step(function, *next(turn)), floor_bytes=floor, copies=len(inputs(group)), about=about)


@interleaved(LOSS_SHAPES, ROWS)
def test_loss(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)
