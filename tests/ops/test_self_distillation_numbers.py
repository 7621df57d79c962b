"""What losses elsewhere get wrong, in the self-distillation loss and on every backend."""

import pytest
import torch
from helpers import DTYPES, backends, interpreted

import sdfast
from sdfast import self_distillation_loss

BACKENDS = backends()
ALL = ["reference", *BACKENDS]
PROBABILITY_LOSSES = ("cross_entropy", "kl", "brier")
OPTIONS = {
    "hardmax": {},
    "softmax": {"label_fn": "softmax", "temperature": 0.5},
    "sharpened brier": {"loss": "brier", "label_fn": "softmax", "target_temperature": 0.5, "label_smoothing": 0.1},
    "geometric": {"label_fn": "softmax", "mixing": "geometric", "label_smoothing": 0.1, "temperature": 2.0},
    "gce": {"row_weight": "gce"},
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


def loss_and_gradient(backend, logits, labels, alpha=0.4, upstream=None, **options):
    x = logits.detach().requires_grad_()
    loss = self_distillation_loss(x, labels, alpha, backend=backend, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream
    return loss.detach(), torch.autograd.grad(loss, x, upstream)[0]


@pytest.mark.parametrize("classes", [2, 10, 9001])  # a shared tile, and several tiles
@pytest.mark.parametrize("backend", ALL)
def test_true_class_gradient_of_a_confident_row(backend, classes):
    """Within 0.5 % at p = 0.999 in bfloat16, where 1 - p computed from a rounded p would be wrong by 100 %."""
    logits = torch.full((3, classes), -torch.inf, dtype=torch.bfloat16)
    logits[:, 0] = 6.90625  # beside one 0: p = 0.999, exact in bfloat16
    logits[:, classes - 1] = 0
    exact = logits[0].double().softmax(-1)[0] - 1
    assert -exact.item() == pytest.approx(1e-3, rel=0.01)
    for alpha, options in (
        (1.0, {}),
        (0.5, {}),
        (0.5, {"label_fn": "softmax", "temperature": 1e-2}),
        (1.0, {"loss": "kl"}),
    ):
        _, gradient = loss_and_gradient(backend, logits, torch.zeros(3).long(), alpha, reduction="sum", **options)
        assert gradient[:, 0].double().tolist() == pytest.approx([exact.item()] * 3, rel=5e-3)


@EVERY_OPTION
@pytest.mark.parametrize("backend", ALL)
def test_a_common_offset_changes_nothing(backend, options):
    logits = (torch.randn(6, 100) * 64).round() / 64  # exact after adding 1e4
    labels = torch.randint(0, 100, (6,))
    results = [loss_and_gradient(backend, logits + offset, labels, **options) for offset in (0, 1e4, -1e4)]
    for moved in results[1:]:
        torch.testing.assert_close(moved, results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ALL)
def test_nothing_kept_gives_zero(backend, reduction):
    """Whatever the rows hold."""
    for rows in (0, 5):
        logits = torch.full((rows, 7), torch.nan)
        labels = torch.full((rows,), -100)
        for alpha in (0.5, torch.rand(rows), sdfast.AdaptiveAlpha(1.0)):
            for options in OPTIONS.values():
                loss, gradient = loss_and_gradient(backend, logits, labels, alpha, reduction=reduction, **options)
                assert (loss == 0).all()
                assert (gradient == 0).all()
    _, stats = self_distillation_loss(logits, labels, sdfast.AdaptiveAlpha(1.0), backend=backend, return_stats=True)
    assert stats.accuracy == 0
    assert self_distillation_loss(torch.randn(0, 7), torch.rand(0, 7), 0.5, backend=backend) == 0


@EVERY_OPTION
@pytest.mark.parametrize("backend", ALL)
def test_row_gradients_sum_to_zero(backend, options):
    logits, labels = 3 * torch.randn(20, 77), torch.randint(0, 77, (20,))
    for loss in PROBABILITY_LOSSES:
        _, gradient = loss_and_gradient(backend, logits, labels, 0.3, **{**options, "loss": loss})
        assert gradient.sum(-1).abs().max() < 2e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [10, 33, 130, 9001])  # rows that share vectors, in registers, in chunks
@pytest.mark.parametrize("backend", ALL)
def test_alpha_one_is_the_plain_loss_bit_for_bit(backend, classes, dtype):
    """Whatever label function, source and form of α, a row with α = 1 is the same row; the gradient too."""
    rows = 3 if backend != "cpu" and classes > 1000 else 33
    logits = torch.randn(rows, classes).to(dtype)
    labels = torch.randint(0, classes, (rows,))
    for loss in PROBABILITY_LOSSES[:1] if interpreted(backend) else PROBABILITY_LOSSES:
        plain = loss_and_gradient(backend, logits, labels, 1.0, reduction="none", loss=loss)
        ones = torch.ones(rows)
        mixed = torch.where(torch.arange(rows) % 2 == 0, 1.0, 0.5)
        for options in ({}, {"label_fn": "softmax", "temperature": 0.5}, {"source": logits * torch.nan}):
            for alpha in (ones, ones[0], sdfast.AdaptiveAlpha(0.0), mixed):
                if alpha is mixed and "source" in options:
                    continue
                got = loss_and_gradient(backend, logits, labels, alpha, reduction="none", loss=loss, **options)
                same = slice(None, None, 2) if alpha is mixed else slice(None)
                for g, p in zip(got, plain, strict=True):
                    assert torch.equal(g[same], p[same])


@pytest.mark.filterwarnings("ignore:.*exactly alpha times the plain loss's gradient")
@pytest.mark.parametrize("classes", [3, 40, 9001])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_its_own_prediction_teaches_nothing(backend, dtype, classes):
    """KL of a row and its own softmax is 0 but for rounding, and so is its gradient: the model is its own teacher."""
    logits = (5 * torch.randn(3, classes)).to(dtype)
    labels = torch.randint(0, classes, (3,))
    for source in (None, logits.clone()):
        loss, gradient = loss_and_gradient(
            backend, logits, labels, 0.0, loss="kl", label_fn="softmax", source=source, reduction="none"
        )
        rounding = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert loss.abs().max() <= 64 * rounding
        assert gradient.abs().max() <= 32 * rounding


@EVERY_OPTION
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_one_a_row(backend, dtype, options):
    """Any value, zeros, stride 0 and stride 2: each row's is its gradient times that number."""
    logits, labels = torch.randn(12, 7).to(dtype), torch.randint(0, 7, (12,))
    labels[5] = -100
    _, own = loss_and_gradient("reference", logits.double(), labels, reduction="sum", **options)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for upstream in (torch.randn(12), torch.zeros(12), torch.full((1,), -2.5).expand(12), torch.randn(24)[::2]):
        upstream = upstream.to(real)
        _, got = loss_and_gradient(backend, logits, labels, upstream=upstream, reduction="none", **options)
        want = own * upstream.double()[:, None]
        unit = upstream.abs().max().item()
        rounding = 2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
        torch.testing.assert_close(got.double(), want, rtol=rounding, atol=1e-6 * unit)
        assert (got[upstream == 0] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ALL)
def test_more_rows_than_a_grid_axis(backend, reduction):
    rows = 70_000
    logits, labels = torch.randn(rows, 3), torch.randint(0, 3, (rows,))
    labels[::7] = -100
    got = loss_and_gradient(backend, logits, labels, 0.5, reduction=reduction)
    exact = loss_and_gradient("reference", logits.double(), labels, 0.5, reduction=reduction)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-6 if reduction == "none" else 1e-10)


@pytest.mark.parametrize("classes", [50_257, 151_936])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabularies(backend, dtype, classes):
    """A last, ragged piece of a row: its entries count as all others do."""
    logits = torch.randn(2, classes, dtype=torch.float64).to(dtype)
    logits[1, classes - 1] = 9  # the row's largest is its very last
    labels = torch.tensor([classes - 1, classes - 2])
    for options in ({}, {"label_fn": "softmax", "temperature": 0.5}):
        got = loss_and_gradient(backend, logits, labels, 0.4, reduction="sum", **options)
        exact = loss_and_gradient("reference", logits.double(), labels, 0.4, reduction="sum", **options)
        torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-6, atol=0)
        rounding = 2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(got[1].double(), exact[1], rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("backend", ALL)
def test_entries_beyond_32_bit_offsets(backend):
    """A row stride that puts the last row past 2³¹ entries: rows are views into one buffer of untouched pages."""
    classes, rows = 8, 3
    stride = 2**30 + 5
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would touch all 4 GiB
    storage = torch.empty(2 * stride + 3 * classes, dtype=torch.bfloat16)
    logits, source, soft = (storage.as_strided((rows, classes), (stride, 1), at * classes) for at in range(3))
    values = torch.randn(3, rows, classes).bfloat16()
    values[2] = values[2].float().softmax(-1)
    for i in range(rows):
        logits[i], source[i], soft[i] = values[:, i]
    labels = torch.randint(0, classes, (rows,))
    for given, packed in ((labels, labels), (soft, values[2])):
        got = loss_and_gradient(backend, logits, given, source=source)
        want = loss_and_gradient(backend, values[0], packed, source=values[1])
        assert all(map(torch.equal, got, want))


@EVERY_OPTION
@pytest.mark.parametrize("backend", ALL)
def test_four_micro_batches_are_one_batch(backend, options):
    """Summed over micro-batches and divided once by the rows of all, the gradient is the batch's mean."""
    logits, labels = torch.randn(32, 19, dtype=torch.float64), torch.randint(0, 19, (32,))
    labels[::5] = -100
    _, whole = loss_and_gradient(backend, logits, labels, **options)
    x = logits.clone().requires_grad_()
    for part, y in zip(x.chunk(4), labels.chunk(4), strict=True):
        loss = self_distillation_loss(part, y, 0.4, reduction="sum", backend=backend, **options)
        (loss / (labels != -100).sum()).backward()
    torch.testing.assert_close(x.grad, whole)
