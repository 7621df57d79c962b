"""Row weights made on the device, class priors, sharpened and geometric targets: each against plain torch."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, backends

import sdfast
from sdfast import GeneralizedCrossEntropy, SmallLoss, self_distillation_loss
from sdfast.ops.self_distillation.weights import lowest

BACKENDS = ["reference", *backends()]
NATIVE = backends()


def leaf(rows=17, classes=10, dtype=torch.float64):
    return (3 * torch.randn(rows, classes, dtype=torch.float64)).to(dtype).requires_grad_()


@pytest.mark.parametrize("classes", [2, 10, 40, 200, 9000])  # the CPU kernel's kinds of row
@pytest.mark.parametrize("q", [0.05, 0.7, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gce_has_the_papers_gradient(backend, q, classes):
    logits, labels = leaf(classes=classes), torch.randint(classes, (17,))
    labels[3] = -100
    for reduction in ("mean", "sum"):
        loss = self_distillation_loss(
            logits, labels, 1.0, row_weight=GeneralizedCrossEntropy(q), reduction=reduction, backend=backend
        )
        p = logits.softmax(-1)[labels >= 0].gather(1, labels[labels >= 0, None])[:, 0]
        paper = ((1 - p**q) / q).sum() / (16 if reduction == "mean" else 1)
        weighted = -(p.detach() ** q * p.log()).sum() / (16 if reduction == "mean" else 1)
        torch.testing.assert_close(loss, weighted)
        torch.testing.assert_close(*torch.autograd.grad([loss], logits), *torch.autograd.grad([paper], logits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gce_by_name_and_dtype(backend, dtype):
    logits, labels = leaf(dtype=dtype), torch.randint(10, (17,))
    weight = logits.detach().double().softmax(-1).gather(1, labels[:, None])[:, 0] ** 0.7
    by_name = self_distillation_loss(logits, labels, 0.6, row_weight="gce", backend=backend)
    by_hand = self_distillation_loss(logits, labels, 0.6, row_weight=weight, backend=backend)
    torch.testing.assert_close(by_name, by_hand)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (by_name, by_hand)]
    torch.testing.assert_close(*gradients, rtol=max(1e-13, 2 * torch.finfo(dtype).eps), atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gce_of_an_impossible_label_is_zero(backend):
    """The limit of p^q (−log p) and of its gradient; a row with a NaN stays NaN."""
    logits, labels = leaf(rows=4), torch.arange(4)
    with torch.no_grad():
        logits[0, 0] = -torch.inf
        logits[1, 7] = torch.nan
    loss = self_distillation_loss(logits, labels, 1.0, row_weight="gce", reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss[0] == 0
    assert (gradient[0] == 0).all()
    assert loss.isnan().tolist() == [False, True, False, False]
    assert gradient[2:].isfinite().all()


@pytest.mark.parametrize("backend", NATIVE)
def test_gce_rows_do_not_depend_on_their_batch(backend):
    for classes in (10, 33, 130):
        logits, labels = leaf(rows=33, classes=classes, dtype=torch.float32), torch.randint(classes, (33,))

        def run(x, y):
            loss = self_distillation_loss(x, y, 0.7, row_weight="gce", reduction="none", backend=backend)
            return loss, torch.autograd.grad(loss.sum(), x)[0]

        for part, whole in zip(run(logits[5:9], labels[5:9]), run(logits, labels), strict=True):
            assert torch.equal(part, whole[5:9])


def kept_rows(losses, keep, labels):
    """The rows that `SmallLoss` should keep, by sorting a list."""
    rows = [i for i in range(len(losses)) if labels[i] != -100]
    rows.sort(key=lambda i: (losses[i] != losses[i], losses[i], i))
    return sorted(rows[: max(1, -(-len(rows) * keep.numerator // keep.denominator))])


SHARES = ((10, Fraction(7, 10)), (10, Fraction(29, 100)), (7, Fraction(1, 3)), (5, Fraction(1)), (3, Fraction(1, 50)))


@pytest.mark.parametrize(("rows", "share"), SHARES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_loss_keeps_the_smallest(backend, rows, share):
    logits, labels = leaf(rows=rows), torch.randint(10, (rows,))
    labels[1] = -100
    rule = SmallLoss(float(share))
    plain = self_distillation_loss(logits, labels, 0.7, reduction="none", backend=backend)
    loss = self_distillation_loss(logits, labels, 0.7, row_weight=rule, reduction="none", backend=backend)
    kept = kept_rows(plain.tolist(), share, labels)
    assert loss.nonzero()[:, 0].tolist() == kept
    assert torch.equal(loss[kept], plain[kept])
    mean = self_distillation_loss(logits, labels, 0.7, row_weight=rule, backend=backend)
    torch.testing.assert_close(mean, plain[kept].sum() / (rows - 1))  # a weight changes no denominator
    (gradient,) = torch.autograd.grad(mean, logits)
    assert gradient.abs().sum(-1).nonzero()[:, 0].tolist() == kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_loss_ties_and_nan(backend):
    logits, labels = torch.zeros(6, 4), torch.zeros(6, dtype=torch.int64)
    labels[0] = -100
    rows = self_distillation_loss(logits, labels, 1.0, row_weight=SmallLoss(0.4), reduction="none", backend=backend)
    assert rows.nonzero()[:, 0].tolist() == [1, 2]  # of equal losses the first
    logits[1] = torch.nan
    logits[2, 0] = -torch.inf
    for keep, kept in ((0.4, [3, 4]), (0.8, [2, 3, 4, 5]), (1.0, [1, 2, 3, 4, 5])):
        losses = self_distillation_loss(logits, labels, 1.0, reduction="none", backend=backend)
        assert lowest(losses, labels != -100, SmallLoss(keep)).nonzero()[:, 0].tolist() == kept
    nothing = self_distillation_loss(logits, labels * 0 - 100, 1.0, row_weight=SmallLoss(0.4), backend=backend)
    assert nothing == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_loss_by_the_other_networks_losses(backend):
    logits, peer, labels = leaf(), leaf(), torch.randint(10, (17,))
    kept = F.cross_entropy(peer, labels, reduction="none").argsort()[:12].sort().values
    rule = SmallLoss(0.7, logits=peer)
    loss = self_distillation_loss(logits, labels, 1.0, row_weight=rule, reduction="sum", backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(logits[kept], labels[kept], reduction="sum"))
    assert torch.autograd.grad(loss, [logits, peer], allow_unused=True)[1] is None


def test_small_loss_keeps_the_shape_of_the_rows():
    logits, labels = torch.randn(2, 5, 4), torch.randint(4, (2, 5))
    loss = self_distillation_loss(logits, labels, 0.5, row_weight=SmallLoss(0.3), reduction="none")
    flat = self_distillation_loss(
        logits.reshape(10, 4), labels.reshape(10), 0.5, row_weight=SmallLoss(0.3), reduction="none"
    )
    assert torch.equal(loss, flat.reshape(2, 5))
    assert (loss > 0).sum() == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_prior_is_label_smoothing(backend):
    logits, labels = leaf(), torch.randint(10, (17,))
    uniform = sdfast.ClassPrior(torch.full((10,), 0.1, dtype=torch.float64))
    got = self_distillation_loss(logits, labels, 0.8, source=uniform, label_fn="softmax", backend=backend)
    wanted = F.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(wanted, logits))
    prior = torch.rand(10, dtype=torch.float64)
    prior[4] = 0
    prior /= prior.sum()
    options = {"source": sdfast.ClassPrior(prior), "label_fn": "softmax", "backend": backend}
    got = self_distillation_loss(logits, labels, 0.8, **options)
    torch.testing.assert_close(got, F.cross_entropy(logits, 0.8 * F.one_hot(labels, 10) + 0.2 * prior))
    torch.testing.assert_close(self_distillation_loss(logits.reshape(1, 17, 10), labels[None], 0.8, **options), got)


@pytest.mark.parametrize("temperature", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sharpening_follows_the_mix(backend, temperature):
    logits, labels, source = leaf(), torch.randint(10, (17,)), torch.randn(17, 10, dtype=torch.float64)
    got, stats = self_distillation_loss(
        logits, labels, 0.3, source=source, label_fn="softmax", target_temperature=temperature, return_stats=True,
        backend=backend,
    )  # fmt: skip
    target = (0.3 * F.one_hot(labels, 10) + 0.7 * source.softmax(-1)) ** (1 / temperature)
    target /= target.sum(-1, keepdim=True)
    wanted = F.cross_entropy(logits, target)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(wanted, logits))
    torch.testing.assert_close(stats.target_entropy, -torch.special.xlogy(target, target).sum(-1).mean())


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_geometric_mixing_is_the_mean_of_the_logits(backend, soft):
    logits, labels, source = leaf(), torch.randint(10, (17,)), torch.randn(17, 10, dtype=torch.float64)
    given = F.one_hot(labels, 10) * 0.9 + 0.01
    if soft:
        labels = given = torch.randn(17, 10, dtype=torch.float64).softmax(-1)
    for alpha in (0.0, 0.4, 1.0):
        got = self_distillation_loss(
            logits, labels, alpha, source=source, label_fn="softmax", temperature=2.0, mixing="geometric",
            label_smoothing=0.0 if soft else 0.1, backend=backend,
        )  # fmt: skip
        target = (alpha * given.log() + (1 - alpha) * (source / 2).log_softmax(-1)).softmax(-1)
        torch.testing.assert_close(got, F.cross_entropy(logits, target))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_geometric_mean_knows_zeros(backend):
    """A class the label rules out stays ruled out, but not where the label has no weight."""
    logits, source = leaf(rows=1, classes=3), torch.zeros(1, 3, dtype=torch.float64)
    labels = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    options = {"source": source, "label_fn": "softmax", "mixing": "geometric", "return_stats": True, "backend": backend}
    _, half = self_distillation_loss(logits, labels, 0.5, **options)
    _, none = self_distillation_loss(logits, labels, 0.0, **options)
    assert half.target_entropy.exp().item() == pytest.approx(2)
    assert none.target_entropy.exp().item() == pytest.approx(3)
    far = torch.tensor([[0.0, -1e4, -2e4]], dtype=torch.float64)  # a softmax would be 0 there, its logarithm is not
    loss, _ = self_distillation_loss(logits, labels, 0.5, **options | {"source": far})
    assert loss.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_geometric_mean_of_denormals(backend):
    """α log y of a label too small for a normal float32."""
    labels = torch.tensor([[1.0, 1e-40, 0.0]])
    source = torch.zeros(1, 3)
    loss = self_distillation_loss(
        torch.tensor([[0.0, 5.0, 0.0]]), labels, 0.05, source=source, label_fn="softmax", mixing="geometric",
        backend=backend,
    )  # fmt: skip
    target = torch.tensor([[1.0, labels[0, 1].double().item() ** 0.05, 0.0]])
    wanted = F.cross_entropy(torch.tensor([[0.0, 5.0, 0.0]]), target / target.sum())
    torch.testing.assert_close(loss, wanted)


OPTIONS = {
    "gce": {"row_weight": "gce"},
    "small loss": {"row_weight": SmallLoss(0.6)},
    "prior": {"source": sdfast.ClassPrior(torch.full((7,), 1 / 7)), "label_fn": "softmax"},
    "sharpened": {"target_temperature": 0.5, "label_fn": "softmax", "temperature": 0.5},
    "geometric": {"mixing": "geometric", "label_fn": "softmax", "label_smoothing": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_compiled_and_transformed(options):
    logits, labels = torch.randn(12, 7), torch.randint(7, (12,))

    def loss(x, y):
        return self_distillation_loss(x, y, 0.4, **options)

    x = logits.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(x, labels), x)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (12, 5):
        part = logits[:rows].clone().requires_grad_()
        values = [f(part, labels[:rows]) for f in (compiled, loss)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*[torch.autograd.grad(value, part)[0] for value in values])
    torch.testing.assert_close(torch.func.grad(loss)(logits, labels), wanted)
    with torch.inference_mode():
        torch.testing.assert_close(loss(logits, labels), loss(x, labels).detach())
