"""Each method against its paper's formula in plain torch, over several batches and epochs where it has a memory."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdfast import baselines
from sdfast.baselines.d2l import local_intrinsic_dimension
from sdfast.data import Batches
from sdfast.models import mlp
from sdfast.train import SelfDistiller

SAMPLES, CLASSES = 40, 5


def batch(rows=16, samples=SAMPLES):
    """(logits that want a gradient, labels, indices) in float64; one label is ignored."""
    logits = (2 * torch.randn(rows, CLASSES, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(CLASSES, (rows,))
    labels[2] = -100
    return logits, labels, torch.randperm(samples)[:rows]


def kept_mean(rows, labels):
    return rows[labels != -100].mean()


def soft_cross_entropy(logits, target):
    return -(target * logits.log_softmax(-1)).sum(-1)


def one_hot(labels):
    return F.one_hot(labels.clamp(min=0), CLASSES).double()


def assert_same(method, oracle, logits, labels, indices=None):
    """The same value and gradient."""
    loss, stats = method(logits, labels, indices, return_stats=True)
    torch.testing.assert_close(loss, oracle)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits, retain_graph=True), torch.autograd.grad(oracle, logits, retain_graph=True)
    )
    assert all(value.dim() == 0 for value in stats)


def test_cross_entropy_and_label_smoothing():
    logits, labels, _ = batch()
    assert_same(baselines.cross_entropy(), F.cross_entropy(logits, labels), logits, labels)
    smoothed = F.cross_entropy(logits, labels, label_smoothing=0.2)
    assert_same(baselines.label_smoothing(0.2), smoothed, logits, labels)


def test_self_distillation():
    logits, labels, _ = batch()
    accuracy = kept_mean((logits.argmax(-1) == labels).double(), labels)
    target = (1 - 0.8 * accuracy) * one_hot(labels) + 0.8 * accuracy * one_hot(logits.argmax(-1))
    oracle = kept_mean(soft_cross_entropy(logits, target), labels)
    assert_same(baselines.self_distillation(0.8), oracle, logits, labels)


def test_bootstrap_hard():
    logits, labels, _ = batch()
    target = 0.7 * one_hot(labels) + 0.3 * one_hot(logits.argmax(-1))
    assert_same(baselines.bootstrap_hard(0.7), kept_mean(soft_cross_entropy(logits, target), labels), logits, labels)


def test_bootstrap_soft_differentiates_its_target_too():
    logits, labels, _ = batch()
    target = 0.9 * one_hot(labels) + 0.1 * logits.softmax(-1)  # not detached
    assert_same(baselines.bootstrap_soft(0.9), kept_mean(soft_cross_entropy(logits, target), labels), logits, labels)


def test_gce():
    logits, labels, _ = batch()
    p = logits.softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    method = baselines.generalized_cross_entropy(0.6)
    loss = method(logits, labels)
    torch.testing.assert_close(loss, kept_mean(-(p.detach() ** 0.6) * p.log(), labels))
    paper = kept_mean((1 - p**0.6) / 0.6, labels)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(paper, logits))


def test_elr_over_epochs():
    """The authors' rule: t from 0, written before it is read, p cut off."""
    method = baselines.elr(SAMPLES, CLASSES, strength=3.0, momentum=0.7)
    t = torch.zeros(SAMPLES, CLASSES, dtype=torch.float64)
    for _ in range(4):
        logits, labels, indices = batch()
        p = logits.softmax(-1).clamp(1e-4, 1 - 1e-4)
        kept = labels != -100
        observed = (p / p.sum(-1, keepdim=True)).detach()
        t[indices[kept]] = 0.7 * t[indices[kept]] + 0.3 * observed[kept]
        term = (1 - (t[indices] * p).sum(-1)).log()
        oracle = F.cross_entropy(logits, labels) + 3.0 * kept_mean(term, labels)
        loss = method(logits, labels, indices)
        torch.testing.assert_close(loss, oracle, rtol=1e-5, atol=1e-5)  # the bank is float32
        torch.testing.assert_close(
            torch.autograd.grad(loss, logits), torch.autograd.grad(oracle, logits), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("weighted", [False, True])
def test_label_correction_over_epochs(weighted):
    """SELC, and self-adaptive training with its weights."""
    given = torch.randint(CLASSES, (SAMPLES,))
    make = baselines.self_adaptive_training if weighted else baselines.selc
    method = make(given, CLASSES, momentum=0.8, warm_up=2)
    t = one_hot(given)
    for epoch in range(5):
        method.set_epoch(epoch, 5)
        logits, labels, indices = batch()
        labels = torch.where(labels == -100, -100, given[indices])
        kept = labels != -100
        if epoch < 2:
            oracle = F.cross_entropy(logits, labels)
        else:
            t[indices[kept]] = 0.8 * t[indices[kept]] + 0.2 * logits.detach().softmax(-1)[kept]
            weight = t[indices].amax(-1) if weighted else torch.ones(len(labels), dtype=torch.float64)
            rows = weight * soft_cross_entropy(logits, t[indices])
            oracle = rows[kept].sum() / weight[kept].sum()
        loss = method(logits, labels, indices)
        torch.testing.assert_close(loss, oracle, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(loss, logits), torch.autograd.grad(oracle, logits), rtol=1e-4, atol=1e-6
        )


def test_ps_kd_over_epochs():
    method = baselines.ps_kd(SAMPLES, CLASSES, final_weight=0.8)
    before = {}
    for epoch in range(4):
        method.set_epoch(epoch, 4)
        logits, labels, indices = batch()
        share = 0.8 * (epoch + 1) / 4
        target = one_hot(labels)
        for row, index in enumerate(indices.tolist()):
            if index in before:
                target[row] = (1 - share) * target[row] + share * before[index]
        oracle = kept_mean(soft_cross_entropy(logits, target), labels)
        loss = method(logits, labels, indices)
        torch.testing.assert_close(loss, oracle, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(loss, logits), torch.autograd.grad(oracle, logits), rtol=1e-4, atol=1e-6
        )
        for row in (labels != -100).nonzero()[:, 0].tolist():
            before[int(indices[row])] = logits.detach().softmax(-1)[row]


def test_bank_self_distillation_over_epochs():
    """The hardened mean of past predictions with the batch's own weight; a sample's first predictions only go in."""
    method = baselines.bank_self_distillation(SAMPLES, CLASSES, ratio=0.9, momentum=0.6, warm_up=2)
    past = {}  # oldest first
    for epoch in range(5):
        method.set_epoch(epoch, 5)
        logits, labels, indices = batch()
        kept = labels != -100
        alpha = 1 - 0.9 * float((logits.argmax(-1) == labels)[kept].double().mean())
        target = one_hot(labels)
        for row, index in enumerate(indices.tolist()):
            seen = past.get(index, [])
            if len(seen) >= 2:
                weight = [0.6 ** (len(seen) - 1 - k) for k in range(len(seen))]
                mean = sum(w * p for w, p in zip(weight, seen, strict=True))
                target[row] = alpha * target[row] + (1 - alpha) * F.one_hot(mean.argmax(), CLASSES)
        oracle = kept_mean(soft_cross_entropy(logits, target), labels)
        loss = method(logits, labels, indices)
        torch.testing.assert_close(loss, oracle, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(loss, logits), torch.autograd.grad(oracle, logits), rtol=1e-4, atol=1e-6
        )
        for row in kept.nonzero()[:, 0].tolist():
            past.setdefault(int(indices[row]), []).append(logits.detach().softmax(-1)[row])


def test_joint_optimisation_over_epochs():
    """KL to the mean of past predictions, the prior's KL, the entropy; in the warm-up the target is the label."""
    method = baselines.joint_optimisation(SAMPLES, CLASSES, momentum=0.6, warm_up=1)
    total = torch.zeros(SAMPLES, CLASSES, dtype=torch.float64)  # of predictions, newest weighing most
    mass = torch.zeros(SAMPLES, dtype=torch.float64)
    for epoch in range(4):
        method.set_epoch(epoch, 4)
        logits, labels, indices = batch(samples=18)
        kept = labels != -100
        p = logits.softmax(-1)
        seen = mass[indices] > 0
        mean = total[indices] / mass[indices].clamp(min=1e-9)[:, None]
        target = torch.where(seen[:, None], mean, one_hot(labels))
        divergence = torch.special.xlogy(target, target).sum(-1) + soft_cross_entropy(logits, target)
        prior = math.log(1 / CLASSES) - p[kept].mean(0).log().mean()
        entropy = kept_mean(soft_cross_entropy(logits, p), labels)
        oracle = kept_mean(divergence, labels) + 1.2 * prior + 0.8 * entropy
        loss = method(logits, labels, indices)
        torch.testing.assert_close(loss, oracle, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(loss, logits), torch.autograd.grad(oracle, logits), rtol=1e-4, atol=1e-6
        )
        at = indices[kept]
        total[at] = 0.6 * total[at] + 0.4 * p.detach()[kept]
        mass[at] = 0.6 * mass[at] + 0.4


def test_co_teaching_exchanges_its_easy_rows():
    method = baselines.co_teaching(forget_rate=0.4, warm_up=4)
    for epoch, keep in ((0, 1.0), (1, 0.9), (2, 0.8), (4, 0.6), (9, 0.6)):
        method.set_epoch(epoch, 10)
        (first, labels, _), (second, _, _) = batch(), batch()
        stacked = torch.stack([first.detach(), second.detach()]).requires_grad_()
        kept = (labels != -100).nonzero()[:, 0]
        rows = math.ceil(keep * len(kept) - 1e-9)
        losses = [F.cross_entropy(x, labels, reduction="none") for x in stacked]
        picked = [kept[loss.detach()[kept].argsort(stable=True)[:rows]] for loss in losses]
        oracle = losses[0][picked[1]].mean() + losses[1][picked[0]].mean()
        assert_same(method, oracle, stacked, labels)
        assert torch.equal(method.predictions(stacked), stacked[0])


def test_two_networks_are_one_in_evaluation():
    pair = baselines.TwoNetworks(mlp((3, 4)), mlp((3, 4)))
    inputs = torch.randn(6, 3)
    both = pair(inputs)
    assert both.shape == (2, 6, 4)
    assert torch.equal(pair.eval()(inputs), both[0])


def test_local_intrinsic_dimension_finds_the_dimension_of_a_cloud():
    """Points spread evenly in d of 20 dimensions, k = 20, as the paper's estimate: within a third of d."""
    for dimension in (1, 3, 6):
        points = torch.zeros(2000, 20)
        points[:, :dimension] = torch.rand(2000, dimension)
        assert local_intrinsic_dimension(points, 20).item() == pytest.approx(dimension, rel=1 / 3)
    features = torch.randn(30, 4, dtype=torch.float64)
    ratios = []
    for row in features:
        r = (features - row).square().sum(-1).sqrt().sort().values[1:8]
        ratios.append(-1 / (r / r[-1]).log().mean())
    assert local_intrinsic_dimension(features, 7).item() == pytest.approx(torch.stack(ratios).mean().item(), rel=1e-5)
    assert local_intrinsic_dimension(torch.zeros(30, 4), 7).isnan()


def test_d2l_turns_where_the_dimension_rises():
    method = baselines.d2l(window=3)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    method.watch(model)
    for epoch, dimension in enumerate((9.0, 5.0, 4.9, 5.1, 7.0, 6.0)):
        method.set_epoch(epoch, 10)  # closes the epoch before
        method._measured.append(torch.tensor(dimension))
        # Of 9.0, 5.0, 4.9 the fourth lies within two deviations; of 5.0, 4.9, 5.1 the fifth does not.
        assert method.turned == (None if epoch < 5 else 5)
        assert method.alpha() == (1 if epoch < 5 else pytest.approx(math.exp(-0.5 * 7.0 / 4.9)))
    assert method.dimensions == pytest.approx([9.0, 5.0, 4.9, 5.1, 7.0])


def test_pro_self_lc_is_the_papers_target_differentiated():
    method = baselines.pro_self_lc(6.0)
    for epoch in (0, 5, 9):
        method.set_epoch(epoch, 10)
        logits, labels, _ = batch()
        p = logits.softmax(-1)
        entropy = -(p * p.log()).sum(-1, keepdim=True)
        share = (1 - entropy / math.log(CLASSES)) / (1 + math.exp(-6.0 * (epoch / 10 - 0.5)))
        oracle = kept_mean(soft_cross_entropy(logits, (1 - share) * one_hot(labels) + share * p), labels)
        assert_same(method, oracle, logits, labels)
    nothing = torch.full_like(labels, -100)
    assert method(logits, nothing) == 0


def test_self_ensemble_filtering_over_epochs():
    method = baselines.self_ensemble_filtering(SAMPLES, CLASSES, momentum=0.6, warm_up=2)
    history = [[] for _ in range(SAMPLES)]
    for _ in range(12):
        logits, labels, indices = batch()
        rows = []
        for row, label, index in zip(logits, labels.tolist(), indices.tolist(), strict=True):
            past = history[index]
            mean = sum(0.6 ** (len(past) - 1 - k) * p for k, p in enumerate(past)) if past else None
            if label != -100 and (len(past) < 2 or mean.argmax() == label):
                rows.append(-row.log_softmax(-1)[label])
            if label != -100:
                past.append(row.detach().softmax(-1))
        assert_same(method, torch.stack(rows).mean(), logits, labels, indices)
        # `assert_same` has called it once, so each prediction has gone in once.
        assert method.bank.seen.tolist() == [len(past) for past in history]


def test_confident_samples_over_epochs():
    """Those whose label was the prediction of the time before."""
    method = baselines.confident_samples(SAMPLES, CLASSES, warm_up=1)
    before = [None] * SAMPLES
    for _ in range(8):
        logits, labels, indices = batch()
        rows = []
        for row, label, index in zip(logits, labels.tolist(), indices.tolist(), strict=True):
            if label != -100 and before[index] in (None, label):
                rows.append(-row.log_softmax(-1)[label])
            if label != -100:
                before[index] = int(row.argmax())
        assert_same(method, torch.stack(rows).mean() if rows else 0 * logits.sum(), logits, labels, indices)


def test_mentor_net_over_epochs():
    method = baselines.mentor_net(percentile=0.6, decay=0.8, burn_in=0.25)
    threshold = None
    for epoch in range(8):
        method.set_epoch(epoch, 8)
        logits, labels, _ = batch()
        losses = F.cross_entropy(logits, labels, reduction="none")[labels != -100]
        found = np.percentile(losses.detach().numpy(), 60)
        threshold = found if threshold is None else 0.8 * threshold + 0.2 * found
        method(logits, labels)
        rows = losses if epoch < 2 else losses[losses <= method.threshold]
        loss = method.eval()(logits, labels)  # which moves nothing
        torch.testing.assert_close(method.threshold.item(), threshold, rtol=1e-5, atol=1e-5)
        oracle = rows.sum() / max(1, len(rows))
        torch.testing.assert_close(loss, oracle)
        torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(oracle, logits))
        method.train()
    broken = torch.full((4, CLASSES), torch.nan)
    method(broken, torch.zeros(4, dtype=torch.int64))
    assert method.threshold.isfinite()


def test_born_again_over_epochs():
    """Plain training for two epochs; then the first weights, taught by the last predictions of before."""
    model = nn.Linear(3, CLASSES).double()
    first = copy.deepcopy(model.state_dict())
    method = baselines.born_again(SAMPLES, CLASSES, alpha=0.3, temperature=2.0)
    with pytest.raises(RuntimeError, match="watch"):
        method.set_epoch(2, 4)
    method.watch(model)
    teacher = torch.full((SAMPLES, CLASSES), torch.nan, dtype=torch.float64)
    for epoch in range(4):
        method.set_epoch(epoch, 4)
        again = {name: torch.equal(value, first[name]) for name, value in model.state_dict().items()}
        assert all(again.values()) == (epoch in (0, 2))
        with torch.no_grad():
            model.weight += 1
            model.bias += 1
        logits, labels, indices = batch()
        if epoch < 2:
            oracle = F.cross_entropy(logits, labels)
            teacher[indices[labels != -100]] = logits.detach().softmax(-1)[labels != -100]
        else:
            hard = F.cross_entropy(logits, labels, reduction="none")
            taught = teacher[indices].isfinite().all(-1)
            q = (torch.where(taught[:, None], teacher[indices], 1 / CLASSES).log() / 2).softmax(-1)
            soft = 4 * (q * (q.log() - (logits / 2).log_softmax(-1))).sum(-1)
            oracle = kept_mean(torch.where(taught, 0.3 * hard + 0.7 * soft, hard), labels)
        loss = method(logits, labels, indices)
        torch.testing.assert_close(loss, oracle, rtol=1e-5, atol=1e-6)  # the bank is float32
        torch.testing.assert_close(
            torch.autograd.grad(loss, logits), torch.autograd.grad(oracle, logits), rtol=1e-4, atol=1e-6
        )
    other = baselines.born_again(SAMPLES, CLASSES, alpha=0.3, temperature=2.0)
    other.watch(model)  # a training that goes on begins again where the first one began
    other.load_state_dict(method.state_dict())
    other.set_epoch(2, 4)
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())


def test_confident_learning_prunes_by_the_confident_joint():
    given = torch.randint(CLASSES - 1, (SAMPLES,))  # one class has no sample
    method = baselines.confident_learning(given, CLASSES, warm_up=1)
    method.set_epoch(0, 5)
    logits = (2 * torch.randn(SAMPLES, CLASSES, dtype=torch.float64)).requires_grad_()
    assert_same(method, F.cross_entropy(logits, given), logits, given, torch.arange(SAMPLES))
    p = logits.detach().softmax(-1).float().tolist()
    means = {c: [p[i][c] for i in range(SAMPLES) if given[i] == c] for c in range(CLASSES)}
    pruned = []
    for i in range(SAMPLES):
        above = [c for c in range(CLASSES) if means[c] and p[i][c] >= sum(means[c]) / len(means[c])]
        pruned.append(bool(above) and max(above, key=lambda c: p[i][c]) != given[i])
    method.set_epoch(1, 5)
    assert method.pruned.tolist() == pruned
    kept = ~torch.tensor(pruned)
    oracle = F.cross_entropy(logits[kept], given[kept])
    assert_same(method, oracle, logits, given, torch.arange(SAMPLES))
    method.load_state_dict(baselines.confident_learning(given, CLASSES, warm_up=1).state_dict())
    assert not method.pruned.any()


def test_d2l_alpha_and_loss():
    method = baselines.d2l(neighbours=3, window=2)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    method.watch(model)
    with pytest.raises(RuntimeError, match="d2l: has seen no features"):
        method(torch.randn(4, CLASSES), torch.zeros(4, dtype=torch.int64))
    for epoch, dimension in enumerate((4.0, 4.2, 8.0)):
        method.set_epoch(epoch, 10)
        method._measured.append(torch.tensor(dimension))
    method.set_epoch(3, 10)
    assert method.turned == 3
    assert method.alpha() == pytest.approx(math.exp(-0.3 * 8.0 / 4.0))
    inputs, labels = torch.randn(16, 4), torch.randint(CLASSES, (16,))
    logits = model(inputs)
    target = method.alpha() * F.one_hot(labels, CLASSES) + (1 - method.alpha()) * F.one_hot(logits.argmax(-1), CLASSES)
    torch.testing.assert_close(method(logits, labels), soft_cross_entropy(logits, target).mean())
    wanted = local_intrinsic_dimension(model[1](model[0](inputs)), 3)
    assert method._last_dimensions()[-1] == pytest.approx(wanted.item())


def test_names_defaults_and_references():
    for name, make in baselines.METHODS.items():
        assert "Reference:" in make.__doc__ or name == "cross-entropy", name
        options = {"forget_rate": 0.3} if name == "co-teaching" else {}
        method = baselines.make_method(name, torch.randint(CLASSES, (SAMPLES,)), CLASSES, **options)
        assert method.name == name
        defaults = {key: value.default for key, value in baselines.options_of(name).items()}
        assert method.options == {**defaults, **options}, name
        assert repr(name) in repr(method)


def test_what_is_refused():
    labels = torch.randint(CLASSES, (SAMPLES,))
    refused = (
        (lambda: baselines.make_method("mixup", labels, CLASSES), ValueError, "method: got 'mixup', wanted one of"),
        (lambda: baselines.make_method("gce", labels, CLASSES, p=1), TypeError, "p: the method gce has no such option"),
        (lambda: baselines.make_method("co-teaching", labels, CLASSES), TypeError, "forget_rate: the method co-teach"),
        (lambda: baselines.co_teaching(1.0), ValueError, r"forget_rate: got 1.0, wanted a number in \[0, 1\)"),
        (lambda: baselines.co_teaching(0.1, warm_up=0), ValueError, "warm_up: got 0, wanted an integer >= 1"),
        (lambda: baselines.bootstrap_hard(2), ValueError, r"beta: got 2, wanted a number in \[0, 1\]"),
        (lambda: baselines.bootstrap_soft(-1), ValueError, r"beta: got -1, wanted a number in \[0, 1\]"),
        (lambda: baselines.label_smoothing(2), ValueError, r"smoothing: got 2, wanted a number in \[0, 1\]"),
        (lambda: baselines.elr(5, 3, strength=-1), ValueError, "strength: got -1, wanted a finite number >= 0"),
        (lambda: baselines.elr(5, 3, strength=float("nan")), ValueError, "strength: got nan, wanted a finite number"),
        (lambda: baselines.joint_optimisation(5, 3, prior_weight=float("nan")), ValueError, "prior_weight: got nan"),
        (lambda: baselines.selc([0, 1], 3), TypeError, "labels: got list, wanted a torch.Tensor"),
        (lambda: baselines.pro_self_lc(0), ValueError, "sharpness: got 0, wanted a finite number > 0"),
        (lambda: baselines.confident_learning(labels + CLASSES, CLASSES), IndexError, "labels: row 0 is "),
        (lambda: baselines.confident_learning(labels, CLASSES, warm_up=0), ValueError, "warm_up: got 0, wanted an int"),
        (lambda: baselines.self_ensemble_filtering(4, 3, warm_up=1.5), ValueError, "warm_up: got 1.5, wanted an int"),
        (lambda: baselines.d2l(window="x"), ValueError, "window: got 'x', wanted an integer >= 2"),
        (lambda: baselines.d2l(window=1), ValueError, "window: got 1, wanted an integer >= 2"),
        (lambda: baselines.selc(labels, CLASSES, warm_up=-1), ValueError, "warm_up: got -1"),
        (lambda: baselines.ps_kd(4, 3, final_weight=2), ValueError, "final_weight: got 2"),
        (lambda: baselines.joint_optimisation(4, 3, prior_weight=-1), ValueError, "prior_weight: got -1"),
        (lambda: baselines.d2l().watch(nn.ReLU()), ValueError, "model: has no torch.nn.Linear"),
        (lambda: baselines.elr(9, 3)(torch.randn(2, 3), labels[:2]), ValueError, "indices: the method elr keeps"),
        (
            lambda: baselines.co_teaching(0.1)(torch.randn(2, 3), labels[:2]),
            ValueError,
            r"logits: got shape \(2, 3\), wanted \(2, N, C\), as of TwoNetworks",
        ),
    )
    for call, error, message in refused:
        with pytest.raises(error, match=message):
            call()


def training(name, **fit_options):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 4
    inputs = torch.stack([labels % 2, labels // 2], 1) + 0.3 * torch.randn(90, 2, generator=generator)
    noisy = torch.where(torch.rand(90, generator=generator) < 0.3, 3 - labels, labels)
    torch.manual_seed(0)
    model = mlp((2, 16, 4)) if name != "co-teaching" else baselines.TwoNetworks(mlp((2, 16, 4)), mlp((2, 16, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    options = {"co-teaching": {"forget_rate": 0.3, "warm_up": 3}, "d2l": {"neighbours": 5, "window": 2}}.get(name, {})
    if "warm_up" in inspect.signature(baselines.METHODS[name]).parameters and name != "co-teaching":
        options = {"warm_up": 2}
    method = baselines.make_method(name, noisy, 4, **options)
    distiller = SelfDistiller(model, optimizer, method=method)
    train = Batches(inputs, noisy, 32, with_indices=True)
    return distiller, train, labels, [(inputs, labels)]


@pytest.mark.parametrize("name", baselines.METHODS)
def test_the_trainer_runs_it_and_resumes_it(name, tmp_path):
    """Five epochs are the loop written by hand, and three and two more are the same weights."""
    distiller, train, clean, test = training(name)
    history = distiller.fit(train, 5, eval=test, clean_labels=clean, progress=False, checkpoint=tmp_path / "whole.pt")
    assert len(history) == 5
    assert all(map(math.isfinite, history["loss"]))
    assert history.last.eval_accuracy is not None

    by_hand, train, _, _ = training(name)
    model, method = by_hand.model, by_hand.method
    for epoch in range(5):
        method.set_epoch(epoch, 5)
        train.set_epoch(epoch)
        for inputs, labels, indices in train:
            by_hand.optimizer.zero_grad()
            method(model(inputs), labels, indices).backward()
            by_hand.optimizer.step()
    for mine, theirs in zip(model.parameters(), distiller.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    stopped, train, clean, test = training(name)
    stop = [lambda _, history: len(history) == 3]
    path = tmp_path / "cut.pt"
    stopped.fit(train, 5, eval=test, clean_labels=clean, progress=False, checkpoint=path, callbacks=stop)
    state = torch.load(path, weights_only=True) | {"stopped": False}
    torch.save(state, path)
    resumed, train, clean, test = training(name)
    resumed.fit(train, 5, eval=test, clean_labels=clean, progress=False, checkpoint=path)
    for mine, theirs in zip(resumed.model.parameters(), distiller.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_trainer_refuses_a_method_with_a_loss():
    model = mlp((2, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = baselines.cross_entropy()
    refused = (
        ({"method": method, "alpha": 0.5}, ValueError, "alpha: given beside method='cross-entropy'"),
        ({"method": method, "label_fn": "softmax"}, ValueError, "label_fn: given beside method"),
        ({"method": "elr"}, TypeError, "method: got str, wanted a method of sdfast.baselines"),
        ({}, ValueError, "alpha: got None"),
        ({"method": baselines.d2l(), "compile": True}, NotImplementedError, "compile: the method d2l looks into"),
    )
    for options, error, message in refused:
        with pytest.raises(error, match=message):
            SelfDistiller(model, optimizer, **options)
    distiller = SelfDistiller(model, optimizer, method=baselines.elr(8, 4))
    with pytest.raises(ValueError, match="indices: the method elr keeps something of each training sample"):
        distiller.fit([(torch.randn(8, 2), torch.randint(4, (8,)))], 1, progress=False)


def test_a_checkpoint_belongs_to_its_method(tmp_path):
    distiller, train, _, _ = training("elr")
    distiller.fit(train, 1, progress=False, checkpoint=tmp_path / "run.pt")
    other, train, _, _ = training("ps-kd")
    with pytest.raises(ValueError, match=r"method was .*elr.* and is .*ps-kd"):
        other.fit(train, 1, progress=False, checkpoint=tmp_path / "run.pt")


def test_rules_reach_the_loss_of_the_trainer():
    """The loss's new options: sharpening and a row weight in SelfDistiller."""
    import sdfast

    weights = []
    for own in (True, False):
        torch.manual_seed(0)
        model = mlp((2, 8, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs, labels = torch.randn(32, 2), torch.randint(4, (32,))
        options = {"row_weight": "gce", "target_temperature": 0.5, "label_smoothing": 0.1}
        if own:
            SelfDistiller(model, optimizer, alpha=0.6, **options).fit([(inputs, labels)], 2, progress=False)
        else:
            for _ in range(2):
                optimizer.zero_grad()
                sdfast.self_distillation_loss(model(inputs), labels, 0.6, **options).backward()
                optimizer.step()
        weights.append(list(model.parameters()))
    for first, second in zip(*weights, strict=True):
        assert torch.equal(first, second)
