"""What the linear distillation loss has beyond its sibling: the teacher. The rest: test_linear_self_distillation."""

import pytest
import torch
from distillation_cases import DIVERGENCES
from helpers import backends
from linear_cases import draw

import sdfast
from sdfast import linear_distillation_loss as linear_kd

BACKENDS = backends(without=("cuda",))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_distillation_loss_of_the_logits(backend, labelled, divergence):
    """The teacher has its own width, bias, dtype and temperature, and gets no gradient."""
    hidden, weight, bias, labels = draw(dtype=torch.float64)
    teacher_hidden, teacher_weight, teacher_bias = torch.randn(50, 7), torch.randn(33, 7), torch.randn(33)
    teacher_weight.requires_grad_()
    options = {"divergence": divergence, "temperature": 2.0, "teacher_temperature": 3.0}
    labels = labels if labelled else None
    loss = linear_kd(
        hidden, weight, teacher_hidden, teacher_weight, labels, bias=bias, teacher_bias=teacher_bias, chunk_rows=9,
        backend=backend, **options,
    )  # fmt: skip
    *got, of_teacher = torch.autograd.grad(loss, [hidden, weight, bias, teacher_weight], allow_unused=True)
    assert of_teacher is None
    logits = torch.nn.functional.linear(hidden, weight, bias)
    teacher = torch.nn.functional.linear(teacher_hidden, teacher_weight, teacher_bias).detach()
    want = sdfast.distillation_loss(logits, teacher, labels, backend="reference", **options)
    torch.testing.assert_close(loss, want)
    for g, w in zip(got, torch.autograd.grad(want, [hidden, weight, bias]), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(backend):
    hidden, weight, _, _ = draw()
    for divergence in DIVERGENCES:
        loss = linear_kd(hidden, weight, hidden, weight, divergence=divergence, chunk_rows=9, backend=backend)
        assert loss == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, [hidden, weight]))


H, W, T, V = torch.randn(4, 3), torch.randn(5, 3), torch.randn(4, 2), torch.randn(5, 2)
BAD_CALLS = {
    "teacher of other rows": (
        lambda: linear_kd(H, W, T[:3], V), ValueError, r"teacher_hidden: got shape \(3, 2\), wanted the rows \(4,\)"),
    "teacher of other classes": (
        lambda: linear_kd(H, W, T, V[:4]), ValueError, r"teacher_weight: got shape \(4, 2\), wanted 5 classes"),
    "teacher of another width": (
        lambda: linear_kd(H, W, T, W), ValueError, r"teacher_weight: got shape \(5, 3\), wanted \(classes, 2\)"),
    "teacher on another device": (
        lambda: linear_kd(H, W, T.to("meta"), V.to("meta")), ValueError, "teacher_hidden: is on meta, wanted cpu"),
    "teacher_bias of another length": (
        lambda: linear_kd(H, W, T, V, teacher_bias=H[0]), ValueError, r"teacher_bias: got shape \(3,\), wanted \(5,\)"),
    "alpha without labels": (lambda: linear_kd(H, W, T, V, alpha=0.5), ValueError, "alpha: got 0.5, but there are no"),
    "temperature": (lambda: linear_kd(H, W, T, V, temperature=0), ValueError, "temperature: got 0"),
    "divergence": (lambda: linear_kd(H, W, T, V, divergence="tv"), ValueError, "divergence: got 'tv'"),
    "backend": (lambda: linear_kd(H, W, T, V, backend="cuda"), NotImplementedError, "has no such kernel"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_named_in_one_line(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
