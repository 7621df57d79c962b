"""The modules with a teacher, and the linear ones, only forward; their options are checked as they are made."""

import pytest
import torch

import sdfast
from sdfast.nn import DistillationLoss, LinearDistillationLoss, LinearSelfDistillationLoss

X, T, Y = torch.randn(12, 5), torch.randn(12, 5), torch.randint(5, (12,))
H, W, B = torch.randn(12, 3), torch.randn(5, 3), torch.randn(5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.3, "temperature": 2.0, "divergence": "js", "reduction": "none"},
        {"alpha": torch.tensor(0.6), "teacher_temperature": 3.0, "label_smoothing": 0.1, "ignore_index": 2},
    ],
)
def test_distillation_equals_the_functions(options):
    row_weight = torch.rand(12)
    got = DistillationLoss(**options)(X, T, Y, row_weight=row_weight)
    assert torch.equal(got, sdfast.distillation_loss(X, T, Y, row_weight=row_weight, **options))
    got = LinearDistillationLoss(**options, chunk_rows=5)(H, W, H, W.flip(0), Y, bias=B, teacher_bias=B)
    want = sdfast.linear_distillation_loss(H, W, H, W.flip(0), Y, bias=B, teacher_bias=B, chunk_rows=5, **options)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.3},
        {"alpha": sdfast.AdaptiveAlpha(0.7), "return_stats": True},
        {"alpha": torch.tensor(0.6), "label_fn": "softmax", "temperature": 0.5, "reduction": "none"},
    ],
)
def test_linear_self_distillation_equals_the_function(options):
    given = {"row_weight": torch.rand(12), "class_weight": torch.rand(5), "bias": B}
    got = LinearSelfDistillationLoss(**options, chunk_rows=5)(H, W, Y, **given)
    want = sdfast.linear_self_distillation_loss(H, W, Y, **given, chunk_rows=5, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_call_may_override_alpha_or_have_no_labels():
    per_row = torch.rand(12)
    assert torch.equal(DistillationLoss()(X, T, Y, alpha=per_row), sdfast.distillation_loss(X, T, Y, alpha=per_row))
    assert torch.equal(DistillationLoss()(X, T), sdfast.distillation_loss(X, T))
    with pytest.raises(ValueError, match=r"alpha: got 0\.5, but there are no labels"):
        DistillationLoss(alpha=0.5)(X, T)


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(DistillationLoss()) == "DistillationLoss()"
    assert repr(DistillationLoss(alpha=0.5, divergence="js")) == "DistillationLoss(alpha=0.5, divergence='js')"
    assert repr(LinearSelfDistillationLoss(0.5)) == "LinearSelfDistillationLoss(alpha=0.5)"
    assert repr(LinearDistillationLoss(chunk_rows=7)) == "LinearDistillationLoss(chunk_rows=7)"
    assert set(DistillationLoss(alpha=torch.tensor(0.5)).state_dict()) == {"alpha"}


@pytest.mark.parametrize("module", [DistillationLoss, LinearDistillationLoss])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 2.0}, ValueError, "alpha: got 2.0, wanted within [0, 1]"),
        ({"alpha": "half"}, TypeError, "alpha: got str"),
        ({"alpha": torch.rand(3)}, ValueError, "alpha: got shape (3,), wanted () here; pass one a row at the call"),
        ({"temperature": -1.0}, ValueError, "temperature: got -1.0"),
        ({"teacher_temperature": 0}, ValueError, "teacher_temperature: got 0"),
        ({"divergence": "tv"}, ValueError, "divergence: got 'tv'"),
        ({"reduction": "batchmean"}, ValueError, "reduction: got 'batchmean'"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing: got 2"),
        ({"backend": "tpu"}, ValueError, "backend: got 'tpu', wanted one of 'cpu'"),
    ],
)
def test_impossible_options_are_refused_as_it_is_made(module, options, error, message):
    with pytest.raises(error) as caught:
        module(**options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 2.0}, "alpha: got 2.0"),
        ({"alpha": 0.5, "label_fn": "max"}, "label_fn: got 'max'"),
        ({"alpha": 0.5, "loss": "hinge"}, "loss: got 'hinge'"),
        ({"alpha": 0.5, "chunk_rows": 0}, "chunk_rows: got 0"),
        ({"alpha": 0.5, "workspace": 0}, "workspace: got 0"),
    ],
)
def test_impossible_options_of_the_linear_form(options, message):
    with pytest.raises(ValueError, match=message):
        LinearSelfDistillationLoss(**options)
