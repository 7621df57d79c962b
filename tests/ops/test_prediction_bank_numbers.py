"""What losses elsewhere get wrong, on a prediction bank and on every backend."""

import copy

import pytest
import torch
from bank_cases import LOSSES, filled, inputs
from helpers import DTYPES, backends, interpreted

from sdfast import PredictionBank, elr_loss, self_distillation_loss

ALL = ["reference", *backends()]


def loss_and_gradient(loss, logits, labels, rows, **options):
    leaf = logits.detach().clone().requires_grad_()
    value = LOSSES[loss](leaf, labels, rows, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("backend", ALL)
def test_true_class_gradient_of_a_confident_row(backend):
    """Within 0.5 % at p = 0.999 in bfloat16."""
    logits, labels = torch.tensor([[6.90625, 0.0]], dtype=torch.bfloat16), torch.tensor([0])
    exact = (logits.double().softmax(-1)[0, 0] - 1).item()
    bank = PredictionBank(1, 2).eval()
    bank.predictions[0, 0] = 1
    bank.seen[0] = 1
    for loss, options in (("distillation", {}), ("elr", {"strength": 0.0})):
        _, gradient = loss_and_gradient(loss, logits, labels, bank.rows(labels), backend=backend, **options)
        assert gradient[0, 0].item() == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ALL)
def test_a_common_offset_changes_nothing_and_row_gradients_sum_to_zero(backend, loss):
    _, labels, indices = inputs(classes=77)
    logits = (3 * torch.randn(12, 77) * 64).round() / 64  # 1e4 more is exact in float32
    bank = filled(77)
    moved = copy.deepcopy(bank)
    got = loss_and_gradient(loss, logits, labels, bank.rows(indices), backend=backend, reduction="none")
    again = loss_and_gradient(loss, logits + 1e4, labels, moved.rows(indices), backend=backend, reduction="none")
    torch.testing.assert_close(got, again, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(bank.predictions, moved.predictions, rtol=1e-6, atol=1e-8)
    assert got[1].sum(-1).abs().max() < (5e-6 if loss == "elr" else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [7, 130, 9001])
@pytest.mark.parametrize("backend", ALL)
def test_alpha_one_and_strength_zero_are_the_plain_loss(backend, classes, dtype):
    """Whatever the bank holds, it is not looked at; a bank's kernel may add in another order, no more."""
    logits, labels = (3 * torch.randn(4, classes)).to(dtype), torch.tensor([2, 1, -100, 5])
    indices = torch.tensor([3, 1, 2, 0])
    bank = filled(classes).eval()
    leaf = logits.clone().requires_grad_()
    plain = self_distillation_loss(leaf, labels, 1.0, backend=backend)
    (wanted,) = torch.autograd.grad(plain, leaf)
    for run in (
        lambda x: self_distillation_loss(x, labels, 1.0, source=bank.rows(indices), backend=backend),
        lambda x: elr_loss(x, labels, bank.rows(indices), strength=0.0, clamp=0.0, backend=backend),
    ):
        value = run(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        torch.testing.assert_close(value, plain, rtol=1e-14 if dtype == torch.float64 else 5e-7, atol=0)
        rounding = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
        # Of p − 1, the last bit of p is left; three rows are kept.
        smallest = {torch.float16: 2.0**-24, torch.float32: torch.finfo(dtype).eps / 3}.get(dtype, 1e-12)
        torch.testing.assert_close(gradient, wanted, rtol=rounding, atol=smallest)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ALL)
def test_four_small_batches_are_one(backend, loss):
    if loss == "softmax":
        pytest.skip("an adaptive alpha is a batch's own")
    logits, labels, indices = inputs()
    whole = filled()
    parts = copy.deepcopy(whole)
    want = loss_and_gradient(loss, logits, labels, whole.rows(indices), backend=backend, reduction="sum")
    got = [
        loss_and_gradient(loss, logits[i : i + 3], labels[i : i + 3], parts.rows(indices[i : i + 3]), backend=backend,
                          reduction="sum")
        for i in range(0, 12, 3)
    ]  # fmt: skip
    torch.testing.assert_close(sum(value for value, _ in got), want[0])
    assert torch.equal(torch.cat([gradient for _, gradient in got]), want[1])
    assert torch.equal(parts.predictions, whole.predictions)


@pytest.mark.parametrize("backend", ALL)
def test_more_rows_than_a_grid_has_columns(backend):
    rows = 70_000
    logits, labels, indices = torch.randn(rows, 2), torch.randint(2, (rows,)), torch.randperm(rows)
    bank, want = PredictionBank(rows, 2), PredictionBank(rows, 2)
    got = loss_and_gradient("elr", logits, labels, bank.rows(indices), backend=backend)
    torch.testing.assert_close(got, loss_and_gradient("elr", logits, labels, want.rows(indices), backend="reference"))
    torch.testing.assert_close(bank.predictions, want.predictions)
    assert (bank.seen == 1).all()


@pytest.mark.parametrize("backend", ALL)
def test_a_vocabulary_of_151936(backend):
    classes = 151_936
    logits, labels, indices = torch.randn(2, classes), torch.tensor([5, classes - 1]), torch.tensor([1, 0])
    results = []
    for which in (backend, "reference"):
        bank = PredictionBank(2, classes)
        bank.predictions.fill_(1 / classes)
        bank.seen.fill_(1)
        options = {"strength": 3.0} if interpreted(backend) else {}
        value, gradient = loss_and_gradient("elr", logits, labels, bank.rows(indices), backend=which, **options)
        results.append((value, gradient, bank.predictions))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("classes", [1000, 40])  # by the general rows of the CPU, and by those of few columns
@pytest.mark.parametrize("backend", ALL)
def test_rows_that_lie_beyond_two_to_the_31_entries(backend, classes):
    """The memory is reserved; only the rows of the batch are ever touched."""
    samples = 2**31 // classes + 9
    first, where = torch.arange(8), torch.arange(samples - 8, samples)
    small = PredictionBank(8, classes, 0.8, torch.bfloat16)
    logits, labels = 3 * torch.randn(8, classes), torch.randint(classes, (8,))
    loss_and_gradient("distillation", torch.randn(8, classes), labels, small.rows(first), backend=backend)
    large = copy.deepcopy(small)
    large.num_samples = samples
    for name in ("predictions", "seen", "_claims"):
        held = getattr(small, name)
        wide = torch.empty(samples, *held.shape[1:], dtype=held.dtype)
        wide[where] = held
        setattr(large, name, wide)
    assert large.predictions.numel() > 2**31
    options = {"label_fn": "softmax", "backend": backend}
    got = loss_and_gradient("distillation", logits, labels, large.rows(where), **options)
    want = loss_and_gradient("distillation", logits, labels, small.rows(first), **options)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert torch.equal(large.predictions[where], small.predictions)
    assert torch.equal(large.seen[where], small.seen)
    assert large.seen[where].tolist() == [2] * 8
