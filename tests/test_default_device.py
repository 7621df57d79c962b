"""Everything is made where its inputs are: a default device that holds no numbers changes nothing.

What would be made on the default device, and mixed with the inputs, is what fails on a GPU beside CPU inputs' tests.
"""

import pytest
import torch

import sdfast
from sdfast import PredictionBank, ntk

X, Y = torch.randn(12, 7), torch.randint(0, 7, (12,))
BANK = PredictionBank(20, 7)
IMAGES = torch.randn(6, 3, 8, 8)
NETWORK = torch.nn.Sequential(
    torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
).eval()  # fmt: skip
GRAM = torch.randn(30, 30, dtype=torch.float64) @ torch.diag(torch.arange(30.0, dtype=torch.float64))
GRAM = GRAM @ GRAM.T
TOP = sdfast.TopK(*torch.randn(12, 7).log_softmax(-1).topk(3, -1))
TEACHER, HIDDEN, WEIGHT = torch.randn(12, 7), torch.randn(12, 5), torch.randn(7, 5)
WITH_SOURCE = {"source": torch.randn(12, 7), "label_fn": "softmax", "temperature": 0.5}


def gradient_of(loss, leaf=X):
    """The loss and its gradient."""
    leaf = leaf.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


CALLS = {
    "hardmax": lambda b: gradient_of(lambda x: sdfast.self_distillation_loss(x, Y, 0.5, backend=b)),
    "adaptive": lambda b: gradient_of(
        lambda x: sdfast.self_distillation_loss(x, Y, sdfast.AdaptiveAlpha(0.7), backend=b, **WITH_SOURCE)
    ),
    "weights": lambda b: gradient_of(
        lambda x: sdfast.self_distillation_loss(
            x, Y, 0.5, row_weight=sdfast.GeneralizedCrossEntropy(0.7), label_smoothing=0.1, backend=b
        )
    ),
    "small loss": lambda b: gradient_of(
        lambda x: sdfast.self_distillation_loss(x, Y, 0.5, row_weight=sdfast.SmallLoss(0.5), backend=b)
    ),
    "bank": lambda b: gradient_of(
        lambda x: sdfast.self_distillation_loss(x, Y, 0.5, source=BANK.eval().rows(Y), label_fn="softmax", backend=b)
    ),
    "elr": lambda b: gradient_of(lambda x: sdfast.elr_loss(x, Y, BANK.eval().rows(Y), backend=b)),
    "distillation": lambda b: gradient_of(lambda x: sdfast.distillation_loss(x, TEACHER, Y, backend=b)),
    "js": lambda b: gradient_of(lambda x: sdfast.distillation_loss(x, TEACHER, divergence="js", backend=b)),
    "top k": lambda b: gradient_of(lambda x: sdfast.distillation_loss(x, TOP, Y, backend=b)),
    "linear": lambda b: gradient_of(
        lambda h: sdfast.linear_self_distillation_loss(h, WEIGHT, Y, 0.5, chunk_rows=5, backend=b), HIDDEN
    ),
    "linear distillation": lambda b: gradient_of(
        lambda h: sdfast.linear_distillation_loss(h, WEIGHT, HIDDEN, WEIGHT, Y, chunk_rows=5, backend=b), HIDDEN
    ),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_losses(name, backend):
    wanted = CALLS[name](backend)
    with torch.device("meta"):
        got = CALLS[name](backend)
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("outputs", ["sum", "trace", 1])
@pytest.mark.parametrize("precision", ["float32", "bf16x3", "float64"])
def test_kernels(outputs, precision):
    wanted = ntk.gram(NETWORK, IMAGES, outputs=outputs, precision=precision)
    with torch.device("meta"):
        got = ntk.gram(NETWORK, IMAGES, outputs=outputs, precision=precision)
        rows = ntk.sample_gradients(NETWORK, IMAGES, outputs=1)
        operator = ntk.operator(NETWORK, IMAGES, outputs=1)
        product = operator @ torch.ones(6, 2, device="cpu")
    torch.testing.assert_close(got, wanted)
    assert {t.device.type for t in rows.values()} == {product.device.type} == {"cpu"}


def test_eigenspaces_and_what_labels_hold():
    labels = torch.randn(30, dtype=torch.float64).sign()
    with torch.device("meta"):
        space = ntk.eigenspace(GRAM, 3)
        ratio = ntk.information_ratio(space, labels)
    torch.testing.assert_close(space.values, torch.linalg.eigvalsh(GRAM).flip(0)[:3])
    assert 0 <= float(ratio) <= 1


def test_draws_of_labels_and_orders():
    """Noise and order are drawn on the CPU, wherever new tensors are made."""

    def drawn():
        generator = torch.Generator("cpu").manual_seed(3)
        flips = [
            sdfast.data.flip_labels(Y, 0.5, 7, generator=generator, **options).labels
            for options in ({}, {"convention": "others"}, {"kind": "pair"}, {"exact": True})
        ]
        pictures = sdfast.data.Batches(IMAGES, Y[:6], 4, seed=1)
        return [*flips, *(batch[1] for batch in pictures)]

    wanted = drawn()
    with torch.device("meta"):
        got = drawn()
    assert all(map(torch.equal, got, wanted))
