"""What losses elsewhere get wrong, in both linear losses and on every backend."""

import pytest
import torch
from distillation_cases import DIVERGENCES
from helpers import DTYPES, backends, interpreted, skip_what_takes_the_interpreter_minutes
from linear_cases import FORMS, cast, check, draw, loss_and_gradients, self_distillation

import sdfast
from sdfast import linear_distillation_loss, linear_self_distillation_loss

BACKENDS = backends(without=("cuda",))
ALL = ["reference", *BACKENDS]
REDUCTIONS = ("mean", "sum", "none")


def of_logits(form, logits, labels, **options):
    """(loss, gradient) of a classifier that hands its hidden states on as logits, and so their gradient back."""
    hidden, weight = logits.detach().requires_grad_(), torch.eye(logits.shape[1], dtype=logits.dtype)
    loss = FORMS[form](hidden, weight, labels, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), hidden)[0]


@pytest.mark.parametrize("backend", ALL)
def test_true_class_gradient_of_a_confident_row(backend):
    """Within 0.5 % at p = 0.999 in bfloat16."""
    logits = torch.full((3, 10), -60.0, dtype=torch.bfloat16)
    logits[:, 0], logits[:, 9] = 6.90625, 0
    exact = logits[0].double().softmax(-1)[0] - 1
    weight, labels = torch.eye(10, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64)
    sure = torch.full((3, 10), -60.0)
    sure[:, 0] = 60
    for loss in (
        lambda h, k: linear_self_distillation_loss(h, weight, labels, 1.0, **k),
        lambda h, k: linear_self_distillation_loss(h, weight, labels, 0.5, **k),
        lambda h, k: linear_distillation_loss(h, weight, sure, torch.eye(10), labels, alpha=1.0, **k),
        lambda h, k: linear_distillation_loss(h, weight, sure, torch.eye(10), temperature=1.0, **k),
    ):
        hidden = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(hidden, {"reduction": "sum", "backend": backend}), hidden)
        assert gradient[:, 0].double().tolist() == pytest.approx([exact.item()] * 3, rel=5e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", ALL)
def test_bfloat16_gradients_of_a_teacher_are_those_of_float64(backend, divergence):
    """Within 0.5 %, of every tensor: the logits of a chunk are never rounded to bfloat16, nor is a sum over chunks."""
    *tensors, labels = draw(rows=60, width=32, classes=400, dtype=torch.bfloat16, ignored=None)
    tensors = [(3 * t.detach()).requires_grad_() for t in tensors]
    options = {"temperature": 1.0, "divergence": divergence, "teacher_dtype": torch.float32}
    got = loss_and_gradients("distillation", *tensors, labels, backend=backend, chunk_rows=16, **options)
    exact = loss_and_gradients("distillation", *cast(tensors, torch.float64), labels, backend="reference", **options)
    for name, g, e in zip(("hidden", "weight", "bias"), got[1:], exact[1:], strict=True):
        assert (g.double() - e).norm() / e.norm() < 5e-3, name


@pytest.mark.parametrize("alpha", [0.4, 1.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
def test_bfloat16_gradients_of_labels_are_those_of_float64(backend, form, alpha):
    rows = 60 if interpreted(backend) else 300
    *tensors, labels = draw(rows=rows, width=32, classes=400, dtype=torch.bfloat16, ignored=None)
    tensors = [(3 * t.detach()).requires_grad_() for t in tensors]
    options = {"alpha": alpha, "chunk_rows": 16, "temperature": 2.0}
    if form == "self_distillation":
        options["label_fn"] = "softmax"  # of a hardmax, a tie of two predictions could fall another way
    got = loss_and_gradients(form, *tensors, labels, backend=backend, **options)
    exact = loss_and_gradients(form, *cast(tensors, torch.float64), labels, backend="reference", **options)
    for name, g, e in zip(("hidden", "weight", "bias"), got[1:], exact[1:], strict=True):
        assert (g.double() - e).norm() / e.norm() < 5e-3, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
def test_a_common_offset_changes_nothing(backend, form):
    logits, labels = (3 * torch.randn(12, 40) * 64).round() / 64, torch.randint(0, 40, (12,))
    plain = of_logits(form, logits, labels, backend=backend, chunk_rows=5)
    for offset in (1e4, -1e4):
        moved = of_logits(form, logits, labels, backend=backend, chunk_rows=5, bias=torch.full((40,), offset))
        torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
def test_row_gradients_sum_to_zero(backend, form):
    logits, labels = 3 * torch.randn(20, 77), torch.randint(0, 77, (20,))
    _, gradient = of_logits(form, logits, labels, backend=backend, chunk_rows=7, label_smoothing=0.1)
    assert gradient.sum(-1).abs().max() < 1e-6
    *tensors, labels = draw(classes=77)
    of_bias = loss_and_gradients(form, *tensors, labels, backend=backend)[3]
    assert of_bias.sum().abs() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ALL)
def test_alpha_one_is_the_plain_loss_bit_for_bit(backend, dtype):
    """Of the logits as the chunks hold them; and one linear loss is the other."""
    logits = (3 * torch.randn(21, 130)).to(dtype)
    labels = torch.randint(0, 130, (21,))
    labels[3] = -100
    held = logits.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    plain = sdfast.self_distillation_loss(held, labels, 1.0, reduction="none", backend=backend)
    (wanted,) = torch.autograd.grad(plain.sum(), held)
    for form in FORMS:
        for alpha in (1.0, torch.ones(()), torch.ones(21)):
            loss, gradient = of_logits(
                form, logits, labels, alpha=alpha, reduction="none", backend=backend, chunk_rows=8
            )
            assert torch.equal(loss, plain.detach())
            assert torch.equal(gradient, wanted.to(dtype))
    *tensors, labels = draw(dtype=dtype)
    for reduction in REDUCTIONS:
        upstream = torch.randn(50).to(plain.dtype) if reduction == "none" else None
        both = [
            loss_and_gradients(
                form, *tensors, labels, upstream, alpha=1.0, reduction=reduction, backend=backend, chunk_rows=9
            )
            for form in FORMS
        ]
        assert all(map(torch.equal, *both))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(backend, dtype, divergence):
    """Exactly 0: both sides are computed by the same operations in the same order."""
    hidden, weight, bias, _ = draw(dtype=dtype)
    loss = linear_distillation_loss(
        hidden, weight, hidden, weight, bias=bias, teacher_bias=bias, divergence=divergence, chunk_rows=9,
        backend=backend,
    )  # fmt: skip
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, [hidden, weight, bias]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_a_grid_axis(backend, form):
    """In one chunk of them all, and in the plan's own."""
    rows = 70_000 if not interpreted(backend) or form == "self_distillation" else 66_000
    *tensors, labels = draw(rows=rows, width=3, classes=3)
    exact = loss_and_gradients(form, *cast(tensors, torch.float64), labels, backend="reference")
    for chunk_rows in (rows,) if interpreted(backend) else (rows, None):
        got = loss_and_gradients(form, *tensors, labels, backend=backend, chunk_rows=chunk_rows)
        torch.testing.assert_close([t.double() for t in got], list(exact), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [50_257, 151_936])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabularies(backend, form, classes, dtype):
    """Ragged widths, converted in several pieces in bfloat16."""
    skip_what_takes_the_interpreter_minutes(backend, dtype == torch.bfloat16)
    width = 8 if interpreted(backend) else 80
    *tensors, labels = draw(rows=2 if interpreted(backend) else 5, width=width, classes=classes, dtype=dtype)
    check(form, backend, tensors, labels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
def test_entries_beyond_32_bit_offsets(backend, form):
    """Row strides that put the last hidden state and the last class past 2³¹ entries, in untouched pages."""
    width, stride = 8, 2**30 + 5
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would touch all of it
    storage = torch.empty(2 * stride + 2 * width, dtype=torch.bfloat16)
    hidden, weight = (storage.as_strided((3, width), (stride, 1), at) for at in (0, width))
    values = torch.randn(2, 3, width).bfloat16()
    for i in range(3):
        hidden[i], weight[i] = values[:, i]
    labels = torch.randint(0, 3, (3,))
    got = loss_and_gradients(form, *(t.detach().requires_grad_() for t in (hidden, weight)), None, labels,
                             backend=backend)  # fmt: skip
    want = loss_and_gradients(form, *(t.clone().requires_grad_() for t in values), None, labels, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_chunk_size_changes_nothing(backend, form, reduction):
    """float64, 1e-12: and gradients add up over chunks of any size."""
    *tensors, labels = draw(rows=101, dtype=torch.float64)
    upstream = torch.randn(101, dtype=torch.float64) if reduction == "none" else None
    whole = loss_and_gradients(form, *tensors, labels, upstream, reduction=reduction, backend=backend, chunk_rows=101)
    for chunk_rows in (1, 10, 100) if backend == "cpu" else (33,):
        parts = loss_and_gradients(
            form, *tensors, labels, upstream, reduction=reduction, backend=backend, chunk_rows=chunk_rows
        )
        for w, p in zip(whole, parts, strict=True):
            torch.testing.assert_close(p, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
def test_four_micro_batches_are_one_batch(backend, form):
    *tensors, labels = draw(rows=40, dtype=torch.float64)
    teacher = torch.randn(40, 5, dtype=torch.float64), torch.randn(33, 5, dtype=torch.float64)

    def run(rows, reduction):
        hidden, weight, bias = tensors
        if form == "self_distillation":
            return self_distillation(
                hidden[rows], weight, labels[rows], bias=bias, reduction=reduction, backend=backend
            )
        return linear_distillation_loss(
            hidden[rows], weight, teacher[0][rows], teacher[1], labels[rows], bias=bias, reduction=reduction,
            backend=backend,
        )  # fmt: skip

    whole = torch.autograd.grad(run(slice(None), "mean"), tensors)
    kept = (labels != -100).sum()
    for begin in range(0, 40, 10):
        (run(slice(begin, begin + 10), "sum") / kept).backward()
    for tensor, gradient in zip(tensors, whole, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients(backend, form, reduction):
    """Any value, zeros and stride 0 included, and a second backward after the first."""
    *tensors, labels = draw()
    upstreams = (torch.randn(50), torch.zeros(50), torch.ones(1).expand(50), torch.randn(100)[::2])
    if reduction != "none":
        upstreams = [torch.tensor(value) for value in (1.0, -2.5, 0.0)]
    for upstream in upstreams:
        loss = FORMS[form](tensors[0], tensors[1], labels, bias=tensors[2], reduction=reduction, chunk_rows=16,
                           backend=backend)  # fmt: skip
        want = loss_and_gradients(form, *tensors, labels, upstream, reduction=reduction, backend="reference")[1:]
        first = torch.autograd.grad(loss, tensors, upstream, retain_graph=True)
        torch.testing.assert_close(first, want, rtol=1e-4, atol=1e-5)
        for gradient in first:
            gradient.fill_(torch.nan)  # what came out belongs to the caller
        torch.testing.assert_close(torch.autograd.grad(loss, tensors, upstream), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
def test_nothing_kept_gives_zero(backend, form, reduction):
    for rows in (0, 5):
        *tensors, labels = draw(rows=rows)
        labels.fill_(-100)
        upstream = torch.ones(rows) if reduction == "none" else None
        got = loss_and_gradients(form, *tensors, labels, upstream, reduction=reduction, backend=backend)
        assert all((t == 0).all() for t in got)
