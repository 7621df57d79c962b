"""SelfDistillationLoss only forwards: the same bits as the function, options checked as it is made."""

import warnings

import pytest
import torch

import sdfast
from sdfast.nn import SelfDistillationLoss

LOGITS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(5, (12,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.3},
        {"alpha": sdfast.AdaptiveAlpha(0.7), "return_stats": True},
        {"alpha": torch.tensor(0.6), "label_fn": "softmax", "temperature": 0.5, "reduction": "none"},
        {"alpha": 0.5, "loss": "kl", "class_weight": torch.rand(5), "label_smoothing": 0.1, "ignore_index": 2},
        {"alpha": 1.7, "loss": "mse", "backend": "reference"},
        {"alpha": 0.5, "label_fn": "softmax", "mixing": "geometric", "target_temperature": 0.5, "label_smoothing": 0.1},
    ],
)
def test_equals_the_function(options):
    source, row_weight = LOGITS.flip(0), torch.rand(12)
    module = SelfDistillationLoss(**options)
    got = module(LOGITS, LABELS, source=source, row_weight=row_weight)
    wanted = sdfast.self_distillation_loss(LOGITS, LABELS, source=source, row_weight=row_weight, **options)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["gce", sdfast.GeneralizedCrossEntropy(0.3), sdfast.SmallLoss(0.5)])
def test_rules_of_row_weights(rule):
    module = SelfDistillationLoss(0.5, row_weight=rule)
    assert torch.equal(module(LOGITS, LABELS), sdfast.self_distillation_loss(LOGITS, LABELS, 0.5, row_weight=rule))
    weight = torch.rand(12)
    by_call = sdfast.self_distillation_loss(LOGITS, LABELS, 0.5, row_weight=weight)
    assert torch.equal(module(LOGITS, LABELS, row_weight=weight), by_call)
    assert "row_weight=" in repr(module)


def test_geometric_mixing_of_probability_labels():
    module = SelfDistillationLoss(0.5, label_fn="softmax", mixing="geometric")
    labels = torch.rand(12, 5).softmax(-1)
    options = {"label_fn": "softmax", "mixing": "geometric"}
    assert torch.equal(module(LOGITS, labels), sdfast.self_distillation_loss(LOGITS, labels, 0.5, **options))


def test_a_call_may_override_alpha():
    per_row = torch.rand(12)
    got = SelfDistillationLoss(1.0)(LOGITS, LABELS, alpha=per_row)
    assert torch.equal(got, sdfast.self_distillation_loss(LOGITS, LABELS, per_row))
    assert not torch.equal(got, SelfDistillationLoss(1.0)(LOGITS, LABELS))


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(SelfDistillationLoss(0.5)) == "SelfDistillationLoss(alpha=0.5)"
    module = SelfDistillationLoss(0.5, label_fn="softmax", temperature=0.5, class_weight=torch.ones(3), backend="cpu")
    wanted = "alpha=0.5, label_fn='softmax', temperature=0.5, backend='cpu', class_weight=(3,)"
    assert repr(module) == f"SelfDistillationLoss({wanted})"


def test_tensors_are_buffers():
    module = SelfDistillationLoss(torch.tensor(0.5), class_weight=torch.ones(3))
    assert set(module.state_dict()) == {"alpha", "class_weight"}
    assert list(module.parameters()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 2.0}, ValueError, "alpha: got 2.0, wanted within [0, 1]"),
        ({"alpha": "half"}, TypeError, "alpha: got str"),
        ({"alpha": 0.5, "row_weight": "g"}, ValueError, "row_weight: got 'g', wanted 'gce'"),
        ({"alpha": 0.5, "row_weight": torch.rand(12)}, ValueError, "row_weight: got a tensor, wanted a rule here"),
        ({"alpha": 0.5, "target_temperature": 2.0}, ValueError, "target_temperature: got 2.0"),
        ({"alpha": torch.rand(3)}, ValueError, "alpha: got shape (3,), wanted () here; pass one a row at the call"),
        ({"alpha": 0.5, "label_fn": "max"}, ValueError, "label_fn: got 'max'"),
        ({"alpha": 0.5, "label_fn": "softmax", "temperature": -1.0}, ValueError, "temperature: got -1.0"),
        ({"alpha": 0.5, "loss": "hinge"}, ValueError, "loss: got 'hinge'"),
        ({"alpha": 0.5, "reduction": "max"}, ValueError, "reduction: got 'max'"),
        ({"alpha": 0.5, "label_smoothing": 2}, ValueError, "label_smoothing: got 2"),
        ({"alpha": 0.5, "backend": "tpu"}, ValueError, "backend: got 'tpu', wanted one of 'cpu'"),
        (
            {"alpha": 0.5, "class_weight": torch.ones(2, 2)},
            ValueError,
            "class_weight: got shape (2, 2), wanted (classes,)",
        ),
        ({"alpha": 0.5, "class_weight": torch.ones(2), "loss": "brier"}, ValueError, "class_weight: goes with"),
    ],
)
def test_impossible_options_are_refused_as_it_is_made(options, error, message):
    with pytest.raises(error) as caught:
        SelfDistillationLoss(**options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_synchronised_alpha_needs_no_process_group_yet():
    assert SelfDistillationLoss(sdfast.AdaptiveAlpha(1.0, sync=True)).alpha.sync


def test_a_missing_source_is_warned_of_at_the_call_and_only_there(monkeypatch):
    monkeypatch.setattr("sdfast.ops.self_distillation.arguments._warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = SelfDistillationLoss(0.5, label_fn="softmax")
        module(LOGITS, LABELS, source=LOGITS.flip(0))
    with pytest.warns(UserWarning, match="with source=None") as caught:
        module(LOGITS, LABELS)
    assert caught[0].filename == __file__
    monkeypatch.setattr("sdfast.ops.self_distillation.arguments._warned", False)
    with pytest.warns(UserWarning, match="with source=None") as caught:
        sdfast.self_distillation_loss(LOGITS, LABELS, 0.5, label_fn="softmax")
    assert caught[0].filename == __file__
