"""Row weights, sharpened and geometric targets on a bank's rows, against the reference."""

import pytest
import torch
from helpers import DTYPES, assert_as_good_as_torch, backends, interpreted, random_numbers

import sdfast
from sdfast import PredictionBank, self_distillation_loss

BACKENDS = backends()
GEOMETRIC = {"mixing": "geometric", "label_fn": "softmax", "label_smoothing": 0.1}
OPTIONS = {
    "gce": {"row_weight": "gce"},
    "small loss": {"row_weight": sdfast.SmallLoss(0.5)},
    "sharpened hardmax": {"target_temperature": 0.5},
    "sharpened softmax": {
        "target_temperature": 0.4, "label_fn": "softmax", "temperature": 0.5, "label_smoothing": 0.1, "loss": "brier",
    },
    "geometric": GEOMETRIC,
    "geometric, sharpened, weighted": {
        **GEOMETRIC, "temperature": 2.0, "target_temperature": 0.5, "row_weight": "gce", "loss": "kl",
    },
}  # fmt: skip


def run(backend, dtype, compute, order, top_k, classes, alpha, options):
    """(loss, gradient, stats, bank) of the values that `dtype` can hold; some rows have no prediction yet."""
    generator = random_numbers(classes)

    def normal(rows):
        return torch.randn(rows, classes, generator=generator, dtype=torch.float64)

    bank = PredictionBank(30, classes, momentum=0.7, dtype=torch.float64, order=order, top_k=top_k)
    first = normal(20).requires_grad_()
    zeros = torch.zeros(20, dtype=torch.int64)
    self_distillation_loss(first, zeros, 0.5, source=bank.rows(torch.arange(20)), backend="reference")
    logits = (3 * normal(12)).to(dtype).to(compute).requires_grad_()
    labels = torch.randint(classes, (12,), generator=generator)
    labels[3] = -100
    indices = torch.randperm(30, generator=generator)[:12]
    loss, stats = self_distillation_loss(
        logits, labels, alpha, source=bank.rows(indices), backend=backend, return_stats=True, **options
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss, gradient, torch.stack(list(stats)), bank


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("classes", "order"), [(10, "read_then_write"), (10, "write_then_read"), (300, "write_then_read")]
)
def test_every_option_matches_the_reference(backend, classes, order, dtype, options):
    for top_k in (None, 2) if backend == "cpu" and classes == 10 else (None,):
        check(backend, dtype, order, top_k, classes, options)


def check(backend, dtype, order, top_k, classes, options):
    for alpha in (0.4, 0.0, 1.0):
        case = (order, top_k, classes, alpha, options)
        got, torch_result = run(backend, dtype, dtype, *case), run("reference", dtype, dtype, *case)
        exact = run("reference", dtype, torch.float64, *case)
        for at, name in enumerate(("loss", "gradient", "stats")):
            unit = 1 / 12 if name == "gradient" else 1.0
            if name == "gradient" and interpreted(backend) and dtype == torch.bfloat16:
                unit = max(unit, 2**14 * exact[1].abs().max().item())  # one more unit in the last place
            assert_as_good_as_torch(f"{name}, {case}", got[at], torch_result[at], exact[at], unit)
        assert torch.equal(got[3].seen, exact[3].seen)
        torch.testing.assert_close(got[3].predictions, exact[3].predictions, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_small_loss_writes_the_bank_once(backend):
    bank = PredictionBank(12, 5)
    for _ in range(2):
        self_distillation_loss(
            torch.randn(12, 5).requires_grad_(), torch.zeros(12, dtype=torch.int64), 0.5,
            source=bank.rows(torch.arange(12)), row_weight=sdfast.SmallLoss(0.5), backend=backend,
        )  # fmt: skip
    assert (bank.seen == 2).all()
