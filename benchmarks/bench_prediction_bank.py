"""A training step on a prediction bank (float32): distillation from its rows and early-learning regularisation.

Forward, backward and the update, through autograd with fresh leaf tensors. Each implementation is checked against
the float64 reference, loss gradient and bank, before it is timed. Batches rotate through a bank larger than the cache.
"""

import functools
import itertools

import torch

import sdfast
from benchmarks import peers
from benchmarks.harness import Case, compiled, copies_of, interleaved, measure
from benchmarks.shapes import ON_GPU, sized

PEERS = {"best eager": "eager:", "best compiled": "compiled:"}
NAMED = ("128x100", "1024x1000", "512x32000")
if ON_GPU:
    NAMED = ("128x10", *NAMED, "4096x1000")
SHAPES = {name: sized(*map(int, name.split("x"))) for name in NAMED}
GROUPS = [f"{loss} {shape}" for loss in ("bank", "elr") for shape in SHAPES]
TARGETS = {
    "bank 128x100": {"sdfast": (0.35, None)},
    "bank 1024x1000": {"sdfast": (0.35, None)},
    "elr 128x100": {"sdfast": (0.4, None)},
    "elr 1024x1000": {"sdfast": (0.4, None)},
}
NAMES = [
    *(f"eager: {name}" for name in peers.BANK_COMPOSITIONS["bank"]),
    *(f"compiled: {name}" for name in peers.BANK_COMPOSITIONS["bank"]),
    "sdfast",
    "sdfast T=0.5",
    "sdfast bfloat16 bank",
    "sdfast compiled",
]
ALPHA, MOMENTUM, STRENGTH = 0.3, 0.9, 7.0


def ours(loss, temperature=1.0):
    """The package's call of a group."""
    if loss == "elr":
        return lambda logits, labels, indices, bank: sdfast.elr_loss(
            logits, labels, bank.rows(indices), strength=STRENGTH
        )
    return lambda logits, labels, indices, bank: sdfast.self_distillation_loss(
        logits, labels, ALPHA, source=bank.rows(indices), label_fn="softmax", temperature=temperature
    )


def function_of(loss, name):
    """The implementation of a row: (logits, labels, indices, bank) -> loss."""
    if name.startswith("sdfast"):
        function = ours(loss, 0.5 if "T=0.5" in name else 1.0)
    else:
        composition = peers.BANK_COMPOSITIONS[loss][name.split(": ")[1]]
        setting = ALPHA if loss == "bank" else STRENGTH

        def function(logits, labels, indices, bank):
            return composition(logits, labels, indices, bank.predictions, bank.seen, MOMENTUM, setting)

    return compiled(function) if "compiled" in name else function


def new_bank(samples, classes, dtype=torch.float32):
    """A bank whose rows have all been seen."""
    bank = sdfast.PredictionBank(samples, classes, MOMENTUM, dtype)
    bank.predictions.copy_(torch.rand(samples, classes))
    bank.predictions /= bank.predictions.sum(-1, keepdim=True)
    bank.seen.fill_(3)
    return bank


def step(function, logits, labels, indices, bank):
    """What one training step spends on the loss."""
    leaf = logits.detach().requires_grad_()
    function(leaf, labels, indices, bank).backward()
    return leaf.grad


@functools.lru_cache(maxsize=1)
def batches(shape):
    """Enough batches to leave the last-level cache, and samples for all of them."""
    rows, classes = SHAPES[shape]
    copies = max(2, copies_of(rows * classes * 4))
    order = torch.randperm(copies * rows).split(rows)
    return [(4 * torch.randn(rows, classes), torch.randint(0, classes, (rows,)), indices) for indices in order]


def check(loss, function, batch, bank):
    """Refuses to time a wrong gradient or a wrong bank."""
    logits, labels, indices = batch
    exact = sdfast.PredictionBank(bank.num_samples, bank.num_classes, MOMENTUM, torch.float64)
    exact.load_state_dict(bank.state_dict())
    leaf = logits.double().requires_grad_()
    rows = exact.rows(indices)
    if loss == "elr":
        value = sdfast.elr_loss(leaf, labels, rows, strength=STRENGTH, backend="reference")
    else:
        value = sdfast.self_distillation_loss(leaf, labels, ALPHA, source=rows, label_fn="softmax", backend="reference")
    value.backward()
    gradient = step(function, logits, labels, indices, bank)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(bank.predictions.double(), exact.predictions, rtol=1e-4, atol=1e-7)


def prepare(group, name):
    """A row's step, checked."""
    loss, shape = group.split()
    inputs = batches(shape)
    rows, classes = SHAPES[shape]
    function = function_of(loss, name)
    narrow = "bfloat16" in name
    bank = new_bank(len(inputs) * rows, classes, torch.bfloat16 if narrow else torch.float32)
    if not narrow and "T=" not in name:
        check(loss, function, inputs[0], bank)
    turn = itertools.cycle(inputs)
    # Logits and bank read once, gradient and bank written once.
    floor = rows * classes * (12 if narrow else 16)
    return Case(
        lambda: step(function, *next(turn), bank), floor_bytes=floor, copies=len(inputs), about={"dtype": "float32"}
    )


@interleaved(GROUPS, NAMES)
def test_bank(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)
