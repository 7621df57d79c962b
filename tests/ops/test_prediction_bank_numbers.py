"""What losses elsewhere get wrong, on a prediction bank and on every backend."""

import copy
import math
import random

import pytest
import torch
from bank_cases import LOSSES, filled, inputs, same
from helpers import DTYPES, backends, device_of, interpreted

import sdfast
from sdfast import PredictionBank, elr_loss, self_distillation_loss
from sdfast.ops.self_distillation.description import accumulation_dtype

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


def any_plain_call(rows, classes, dtype):
    """(logits, labels, options) of a call that α = 1 leaves nothing but its labels."""
    pick = random.choice
    logits = (3 * torch.randn(rows, classes)).to(dtype)
    loss, label_fn = pick(("cross_entropy", "cross_entropy", "kl", "brier", "mse")), pick(("hardmax", "softmax"))
    options = {"loss": loss, "label_fn": label_fn, "reduction": pick(("none", "mean", "sum"))}
    soft = pick((False, False, True))
    if soft:
        labels = torch.randn(rows, classes).softmax(-1)
    else:
        labels = torch.randint(classes, (rows,))
        labels[torch.rand(rows) < pick((0.0, 0.4))] = -100
    real = torch.float64 if dtype == torch.float64 else torch.float32
    if pick((False, True)) and (loss != "mse" or not soft):
        options["label_smoothing"] = 0.1
    if loss in ("cross_entropy", "kl") and pick((False, True)):
        options["class_weight"] = torch.rand(classes, dtype=real)
    if loss != "mse":
        options["target_temperature"] = pick((1.0, 1.0, 0.5))
        if label_fn == "softmax" and (soft or "label_smoothing" in options):
            options["mixing"] = pick(("arithmetic", "geometric"))
    weights = [None, torch.rand(rows, dtype=real)]
    if loss != "mse" and not soft:
        weights.append(sdfast.GeneralizedCrossEntropy(0.7))
    options["row_weight"] = pick(weights)
    return logits, labels, options


def ways_to_learn_from_labels_alone(labels, options):
    """By name: the bank's options, the call on its rows, and which of them have α = 1."""
    ones, chosen = torch.ones(len(labels)), torch.rand(len(labels)) < 0.5
    elr = {key: options.get(key) for key in ("reduction", "class_weight", "row_weight", "backend")}
    elr["label_smoothing"] = options.get("label_smoothing", 0.0)
    all_rows = torch.ones(len(labels), dtype=torch.bool)

    def on_rows(alpha):
        return lambda x, rows, **more: self_distillation_loss(x, labels, alpha, source=rows, **options, **more)

    def regularised(strength):
        return lambda x, rows, **more: elr_loss(x, labels, rows, strength=strength, **elr, **more)

    ways = {
        "a number": ({}, on_rows(1.0), all_rows),
        "a tensor": ({}, on_rows(ones[0]), all_rows),
        "some rows": ({}, on_rows(torch.where(chosen, ones, 0.3)), chosen),
        "no trust": ({}, on_rows(sdfast.AdaptiveAlpha(0.0)), all_rows),
        "warm-up": ({"warm_up": 9}, on_rows(0.3), all_rows),
    }
    reshaped = options.get("target_temperature", 1.0) != 1 or options.get("mixing") == "geometric"
    weighed = isinstance(options["row_weight"], sdfast.GeneralizedCrossEntropy)
    if options["loss"] == "cross_entropy" and not reshaped and not weighed:  # what elr_loss has, too
        ways["strength 0"] = ({}, regularised(0.0), all_rows)
        ways["warm-up of the regulariser"] = ({"warm_up": 9}, regularised(7.0), all_rows)
    return ways


@pytest.mark.filterwarnings("ignore:.*exactly alpha times the plain loss's gradient")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 7, 130, 600, 9001])  # rows that share vectors, in registers, in chunks
@pytest.mark.parametrize("backend", ALL)
def test_a_row_with_alpha_one_is_the_plain_loss_bit_for_bit(backend, classes, dtype):
    """Loss and gradient, for any upstream gradient; the bank is written as with any α, and not looked at."""
    quick = interpreted(backend)
    for _ in range(1 if quick else 8):
        logits, labels, options = any_plain_call(2 if quick and classes > 1000 else 5, classes, dtype)
        options["backend"] = backend
        indices = torch.randperm(20)[: len(labels)]
        upstream = torch.randn(len(labels) if options["reduction"] == "none" else (), dtype=accumulation_dtype(dtype))
        # The interpreter truncates what a kernel stores in bfloat16; a gradient that waits for `upstream` is not.
        rounded = quick and dtype == torch.bfloat16 and options["reduction"] == "none"
        leaf = (logits.float() if rounded else logits).clone().requires_grad_()
        value = self_distillation_loss(leaf, labels, 1.0, **options)
        wanted = torch.autograd.grad(value, leaf, upstream)[0].to(dtype)
        order, top_k = random.choice(("read_then_write", "write_then_read")), random.choice((None, None, 1))
        held_in = random.choice((torch.float32, torch.bfloat16))
        more = {"order": order, "dtype": held_in, "top_k": top_k if backend != "cuda" else None}
        ways = ways_to_learn_from_labels_alone(labels, options)
        for name in random.sample(list(ways), 2 if classes > 1000 else 4) if quick else ways:
            settings, run, plain = ways[name]
            bank = filled(classes, **settings, **more)
            other = copy.deepcopy(bank)
            unread = copy.deepcopy(bank).eval()
            unread.predictions.fill_(torch.nan)
            self_distillation_loss(logits, labels, 0.4, source=other.rows(indices), **options)
            for each in (bank,) if (quick and classes > 1000) or not plain.all() else (bank, unread):
                leaf = logits.clone().requires_grad_()
                got = run(leaf, each.rows(indices))
                (gradient,) = torch.autograd.grad(got, leaf, upstream)
                assert torch.equal(gradient[plain], wanted[plain]), (name, options)
                if plain.all():
                    assert torch.equal(got, value), (name, options)
                elif got.dim():
                    assert torch.equal(got[plain], value[plain]), (name, options)
            if "regulariser" not in name and name != "strength 0":  # those write what they cut off
                assert same(bank, other), (name, options)


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


# By the general rows of the CPU, and by those of few columns; values and classes of rows of which few are stored.
@pytest.mark.parametrize(("classes", "top_k"), [(1000, None), (40, None), (40, 7)])
@pytest.mark.parametrize("backend", ALL)
def test_rows_that_lie_beyond_two_to_the_31_entries(backend, classes, top_k, tmp_path):
    """The memory is a file's that holds nothing, or a GPU's; only the rows of the batch are ever touched."""
    if top_k and (backend in ("cuda", "reference") or device_of(backend) != "cpu"):
        pytest.skip("top-k: no CUDA kernel; gigabytes of a GPU, and of the reference's own counts")
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would touch all of it

    def reserved(name, *shape, dtype):
        if device_of(backend) != "cpu":
            return torch.empty(shape, dtype=dtype)
        return torch.from_file(str(tmp_path / name), True, math.prod(shape), dtype=dtype).view(shape)

    samples = 2**31 // (top_k or classes) + 9
    first, where = torch.arange(8), torch.arange(samples - 8, samples)
    small = PredictionBank(8, classes, 0.8, torch.bfloat16, top_k=top_k)
    logits, labels = 3 * torch.randn(8, classes), torch.randint(classes, (8,))
    loss_and_gradient("distillation", torch.randn(8, classes), labels, small.rows(first), backend=backend)
    large = copy.deepcopy(small)
    large.num_samples = samples
    kept = ("predictions", "seen", "_claims", *(("classes",) if top_k else ()))
    for name in kept:
        held = getattr(small, name)
        wide = reserved(name, samples, *held.shape[1:], dtype=held.dtype)
        wide[where] = held
        setattr(large, name, wide)
    assert large.predictions.numel() > 2**31
    assert not top_k or large.classes.numel() > 2**31
    options = {"label_fn": "softmax", "backend": backend}
    got = loss_and_gradient("distillation", logits, labels, large.rows(where), **options)
    want = loss_and_gradient("distillation", logits, labels, small.rows(first), **options)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for name in kept:
        assert torch.equal(getattr(large, name)[where], getattr(small, name)), name
    assert large.seen[where].tolist() == [2] * 8
