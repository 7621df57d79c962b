"""Rows that are not like others, in the self-distillation loss's Triton kernels: ±inf, NaN, ties, bad labels, ignored.

Run by `test_self_distillation_triton.test_all_in_the_interpreter` where there is no GPU.
"""

import pytest
import torch
from triton_cases import DEVICE, PAIRS, check, here, indices, laid_out, loss_and_gradient, rand, randn

import sdfast
from sdfast.ops.self_distillation.description import LOSSES, REDUCTIONS


@here
@pytest.mark.parametrize("classes", [10, 9001])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_a_class_without_target_mass_adds_nothing_at_minus_infinity(classes, loss):
    logits = randn(2, classes, seed=11)
    logits[0, 3] = logits[1, classes - 1] = -torch.inf
    value, gradient, _ = check(logits, torch.tensor([1, 2], device=DEVICE), 0.7, loss=loss)
    assert value.isfinite()
    assert gradient[0, 3] == 0


@here
def test_a_logit_of_minus_infinity_at_the_label_is_an_infinite_loss():
    logits = randn(2, 10, seed=12)
    logits[0, 4] = -torch.inf
    value, _, _ = check(
        logits, torch.tensor([4, 4], device=DEVICE), 0.5, torch.ones(2, device=DEVICE), reduction="none"
    )
    assert value[0] == torch.inf
    assert value[1].isfinite()


@here
@pytest.mark.parametrize("classes", [10, 9001])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "brier"])
def test_a_common_offset_changes_no_bit(classes, loss):
    logits = (randn(2, classes, seed=13) * 64).round() / 64  # 1e4 more is exact in float32
    labels = indices(2, classes, 14)
    plain = loss_and_gradient("triton", logits, labels, 0.4, loss=loss)
    shifted = loss_and_gradient("triton", logits + 1e4, labels, 0.4, loss=loss)
    assert all(map(torch.equal, plain, shifted))


@here
def test_saturated_rows_keep_the_gradient_of_the_true_class():
    logits = torch.tensor([[0.0, -8.0, -8.5], [0.0, -30.0, -40.0]], device=DEVICE)
    labels = torch.tensor([0, 1], device=DEVICE)
    _, gradient, _ = check(logits, labels, 1.0, reduction="sum")
    exact = logits[0].double().softmax(-1)[0] - 1
    assert abs(gradient[0, 0].item() / exact.item() - 1) < 5e-3


@here
@pytest.mark.parametrize("classes", [10, 9001])
@pytest.mark.parametrize(("loss", "h"), PAIRS)
def test_a_nan_logit_makes_its_row_nan_and_no_other(classes, loss, h):
    logits = randn(3, classes, seed=15)
    logits[1, classes - 1] = torch.nan
    label_fn = sdfast.ClipLabel(0.1) if h == "clip" else h
    labels = indices(3, classes, 16)
    value, gradient, _ = check(
        logits, labels, 0.5, torch.ones(3, device=DEVICE), loss=loss, label_fn=label_fn, reduction="none"
    )
    assert value.isnan().tolist() == [False, True, False]
    assert not gradient[[0, 2]].isnan().any()
    assert gradient[1, classes - 1].isnan()


@here
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_rows_of_one_infinity_or_nan_are_nan(value):
    for classes in (3, 9001):
        logits = torch.full((1, classes), value, device=DEVICE)
        assert check(logits, torch.tensor([1], device=DEVICE), 0.5)[0].isnan()


@here
@pytest.mark.parametrize(
    ("classes", "later"), [(10, 9), (9001, 9000), (9001, 2 + 2 * 4096)]
)  # the last: in the same lane
def test_a_tie_goes_to_the_first_index(classes, later):
    logits = torch.zeros(2, classes, device=DEVICE)
    logits[1, [2, later]] = 5.0
    labels = torch.tensor([0, 2], device=DEVICE)
    _, gradient, stats = check(logits, labels, 0.5, reduction="sum")
    assert stats[1] == 1
    assert gradient[1, 2] < 0 < gradient[1, later]
    # A target of two equal entries keeps the label only where the label comes first.
    _, _, stats = check(logits[1:], torch.tensor([later], device=DEVICE), 0.5)
    assert stats[3] == 0


@here
@pytest.mark.parametrize("reduction", list(REDUCTIONS))
def test_ignored_rows_count_for_nothing_whatever_they_hold(reduction):
    logits, source, row_weight = randn(4, 10, seed=17), randn(4, 10, seed=18), rand(4, seed=19)
    labels = torch.tensor([3, 99, 1, 99], device=DEVICE)
    for tensor, value in ((logits, torch.nan), (source, torch.nan), (row_weight, torch.inf)):
        tensor[labels == 99] = value
    options = {"source": source, "ignore_index": 99, "reduction": reduction, "class_weight": rand(10, seed=20)}
    value, gradient, _ = loss_and_gradient("triton", logits, labels, 0.4, row_weight=row_weight, **options)
    kept = labels != 99
    options["source"] = source[kept]
    alone = loss_and_gradient("triton", logits[kept], labels[kept], 0.4, row_weight=row_weight[kept], **options)
    assert torch.equal(gradient[~kept], torch.zeros(2, 10, device=DEVICE))
    assert torch.equal(gradient[kept], alone[1])
    assert torch.equal(value[kept] if reduction == "none" else value, alone[0])
    if reduction == "none":
        assert torch.equal(value[~kept], torch.zeros(2, device=DEVICE))


@here
@pytest.mark.parametrize("alpha", [0.5, sdfast.AdaptiveAlpha(1.0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_with_every_row_ignored_has_loss_zero(alpha, weighted):
    labels = torch.full((3,), -100, device=DEVICE)
    weight = rand(10, seed=21) if weighted else None
    value, gradient, _ = check(randn(3, 10, seed=22), labels, alpha, class_weight=weight)
    assert value == 0
    assert not gradient.any()


@here
@pytest.mark.parametrize("reduction", list(REDUCTIONS))
@pytest.mark.parametrize("soft", [False, True])
def test_an_empty_batch(reduction, soft):
    labels = torch.zeros(0, 3, device=DEVICE) if soft else torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for alpha in (0.5, torch.tensor(0.5, device=DEVICE), sdfast.AdaptiveAlpha(1.0)):
        value, gradient, _ = check(torch.zeros(0, 3, device=DEVICE), labels, alpha, reduction=reduction)
        assert value.sum() == 0
        assert gradient.shape == (0, 3)


@here
@pytest.mark.parametrize("classes", [10, 9001])
@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("h", ["hardmax", "softmax"])
def test_alpha_one_is_plain_training_bit_for_bit(classes, loss, h):
    logits, labels = randn(3, classes, seed=23), indices(3, classes, 24)
    source = torch.full_like(logits, torch.nan)
    plain = loss_and_gradient("triton", logits, labels, 1.0, loss=loss)
    for alpha in (1.0, torch.ones((), device=DEVICE), torch.ones(3, device=DEVICE)):
        for teacher in (None, source):
            mixed = loss_and_gradient("triton", logits, labels, alpha, loss=loss, label_fn=h, source=teacher)
            assert all(map(torch.equal, plain, mixed))


@here
@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("bad", [-1, 10, 2**40, -(2**62)])
def test_an_out_of_range_label_makes_its_row_nan_and_touches_no_other(loss, bad):
    logits = laid_out(randn(3, 10, seed=25), "stepped")  # NaN all around
    labels = torch.tensor([2, bad, 4], device=DEVICE)
    options = {"loss": loss, "reduction": "none"}
    value, gradient, stats = loss_and_gradient("triton", logits, labels, 0.6, **options)
    good = loss_and_gradient("triton", logits, torch.tensor([2, 0, 4], device=DEVICE), 0.6, **options)
    assert value.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all()
    assert torch.equal(value[[0, 2]], good[0][[0, 2]])
    assert torch.equal(gradient[[0, 2]], good[1][[0, 2]])
    assert stats[1] <= 2 / 3  # never correct
    weighted = {"class_weight": rand(10, seed=26)} if loss in ("cross_entropy", "kl") else {}
    assert loss_and_gradient("triton", logits, labels, 0.6, loss=loss, **weighted)[0].isnan()


@here
@pytest.mark.parametrize(("loss", "h"), PAIRS)
def test_a_nan_alpha_gives_nan(loss, h):
    logits, labels = randn(3, 10, seed=27), indices(3, 10, 28)
    options = {"loss": loss, "label_fn": sdfast.ClipLabel(0.1) if h == "clip" else h}
    value, gradient, _ = loss_and_gradient("triton", logits, labels, torch.tensor(torch.nan, device=DEVICE), **options)
    assert value.isnan()
    assert gradient.isnan().all()
    alpha = torch.tensor([0.5, torch.nan, 0.5], device=DEVICE)
    value, gradient, _ = loss_and_gradient("triton", logits, labels, alpha, reduction="none", **options)
    assert value.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(-1).tolist() == [False, True, False]


@here
@pytest.mark.parametrize(("rows", "classes"), [(300, 10), (4, 1000), (3, 9001)])
def test_a_row_depends_on_no_other_row_and_repeats_bitwise(rows, classes):
    logits, labels, alpha = randn(rows, classes, seed=29), indices(rows, classes, 30), rand(rows, seed=31)
    first = loss_and_gradient("triton", logits, labels, alpha, reduction="none")
    again = loss_and_gradient("triton", logits, labels, alpha, reduction="none")
    assert all(map(torch.equal, first, again))
    row = rows - 1
    alone = loss_and_gradient("triton", logits[row:], labels[row:], alpha[row:], reduction="none")
    assert torch.equal(first[0][row:], alone[0])
    assert torch.equal(first[1][row:], alone[1])


@here
@pytest.mark.parametrize("alpha", [0.8, sdfast.AdaptiveAlpha(0.9)])
def test_more_than_65535_rows(alpha):
    rows = 66_000
    labels = indices(rows, 3, 32)
    labels[::7] = -100
    check(randn(rows, 3, seed=33), labels, alpha, class_weight=rand(3, seed=34))
