"""The information ratio and what follows from it: definitions, the paper's claims, and what is refused."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

import sdfast
from sdfast.ntk import (
    alpha_window,
    eigenspace,
    error_components,
    information_gain,
    information_ratio,
    noise_sweep,
    operands,
    predicted_decay,
)


def rbf(n=200, dimensions=3, scale=1.0):
    x = torch.randn(n, dimensions, dtype=torch.float64)
    gram = torch.exp(-torch.cdist(x, x).square() / (2 * scale**2))
    return (gram + gram.T) / 2


@pytest.fixture
def space():
    """A kernel whose sixth eigenvalue is half its fifth."""
    vectors = torch.linalg.qr(torch.randn(80, 80, dtype=torch.float64))[0]
    gram = (vectors * 0.5 ** torch.arange(80.0, dtype=torch.float64)) @ vectors.T
    return eigenspace((gram + gram.T) / 2, 5)


def test_ratio_is_its_definition(space):
    labels = torch.randn(80, 3, dtype=torch.float64)
    projector = space.vectors @ space.vectors.T
    expected = (projector @ labels).norm(dim=0) / labels.norm(dim=0)
    torch.testing.assert_close(information_ratio(space, labels), expected)
    torch.testing.assert_close(information_ratio(space, labels[:, 1]), expected[1])
    torch.testing.assert_close(information_ratio(space, labels, squared=True), expected**2)
    centred = labels - labels.mean(0)
    expected = (projector @ centred).norm(dim=0) / centred.norm(dim=0)
    torch.testing.assert_close(information_ratio(space, labels, center=True), expected)
    joint = (projector @ labels).norm() / labels.norm()
    torch.testing.assert_close(information_ratio(space, labels, joint=True), joint)
    assert information_ratio(space, space.vectors[:, 2]).item() == pytest.approx(1)
    assert information_ratio(space, labels[:, 0] - projector @ labels[:, 0]).item() < 1e-12
    torch.testing.assert_close(information_ratio(space, labels[:, 1].float()), expected.new_tensor(
        ((projector @ labels[:, 1].float().double()).norm() / labels[:, 1].float().double().norm()).item()
    ))  # fmt: skip


def test_gain_is_a_difference_of_ratios(space):
    labels, refined = torch.randn(2, 80, 2, dtype=torch.float64)
    expected = information_ratio(space, refined) - information_ratio(space, labels)
    torch.testing.assert_close(information_gain(space, labels, refined), expected)
    expected = information_ratio(space, refined, joint=True, center=True)
    expected = expected - information_ratio(space, labels, joint=True, center=True)
    torch.testing.assert_close(information_gain(space, labels, refined, joint=True, center=True), expected)


def test_numpy_gives_numpy():
    space = eigenspace(np.diag(0.5 ** np.arange(20.0)), 4)
    labels = np.random.default_rng(0).normal(size=(20, 2))
    for result in (
        information_ratio(space, labels),
        information_gain(space, labels, 2 * labels),
        error_components(space, labels, 0 * labels),
        predicted_decay(space, 0.1, [1, 2]),
        noise_sweep(space, np.sign(labels[:, 0]), repeats=2).mean,
    ):
        assert isinstance(result, np.ndarray)
        assert result.dtype == np.float64
    np.testing.assert_allclose(information_ratio(space, torch.from_numpy(labels)), information_ratio(space, labels))


def test_error_of_gradient_descent_follows_the_spectrum():
    """With a fixed kernel the error along v_i is (1 − ηλ_i)^t of what it was, at every step."""
    gram, steps = rbf(100), 60
    rate = 1 / torch.linalg.eigvalsh(gram).max().item()
    space = eigenspace(gram, 8)
    labels = torch.randn(100, 2, dtype=torch.float64).sign()
    f = torch.randn(100, 2, dtype=torch.float64)
    first = error_components(space, f, labels)
    decay = predicted_decay(space, rate, range(steps + 1))
    torch.testing.assert_close(decay[0], torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(decay[7], predicted_decay(space, rate, 7))
    for t in range(steps + 1):
        components = error_components(space, f, labels)
        torch.testing.assert_close(components, decay[t][:, None] * first, rtol=1e-9, atol=1e-12)
        f = f - rate * gram @ (f - labels)
    torch.testing.assert_close(error_components(space, f[:, 0], labels[:, 0]), error_components(space, f, labels)[:, 0])


def test_alpha_window(space):
    values = space.values.tolist()
    start, end = alpha_window(space, 0.5)
    assert start == pytest.approx(1 / (0.5 * values[4]))
    assert end == pytest.approx(2 * start)  # the sixth eigenvalue is half the fifth
    assert alpha_window(space, 0.5, signal=2) == pytest.approx((1 / (0.5 * values[1]), 1 / (0.5 * values[2])))
    assert alpha_window(eigenspace(torch.eye(3), 3), 0.1).end == np.inf
    assert alpha_window(eigenspace(torch.diag(torch.tensor([2.0, 1, 0])), 2), 0.1) == pytest.approx((10, np.inf))


def test_a_window_separates_signal_from_noise():
    """Kernel regression with α falling inside the window ends at the true labels, plain descent at the wrong ones."""
    groups = torch.arange(60) % 4  # clusters of one label each; their samples differ a little
    clean = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)[groups]
    gram = (groups[:, None] == groups).double() + 0.02 * torch.eye(60, dtype=torch.float64)
    space = eigenspace(gram, 4)
    rate = 0.1
    start, end = alpha_window(space, rate)
    assert end > 100 * start
    noisy = clean.clone()
    noisy[:12] *= -1  # 3 of every 15
    plain, mixed = torch.zeros(2, 60, dtype=torch.float64)
    for t in range(int(20 * end)):
        alpha = min(1.0, max(0.0, 1 - (t - 3 * start) / (0.02 * end)))
        plain = plain - rate * gram @ (plain - noisy)
        mixed = mixed - rate * gram @ (mixed - (alpha * noisy + (1 - alpha) * (4 * mixed).clamp(-1, 1)))
    assert (plain.sign() != clean).sum() == 12
    assert torch.equal(mixed.sign(), clean)
    assert (mixed - clean).norm() < 0.1


def test_float32_ratio_is_right_where_the_gap_is_a_percent(monkeypatch):
    """Within 1e-6 of numpy's float64 answer for the same matrix, at every noise level, by both methods."""
    x = torch.randn(400, 4)
    gram = torch.exp(-torch.cdist(x, x).square() / 8)
    gram = (gram + gram.T) / 2
    values, vectors = np.linalg.eigh(gram.double().numpy())
    k = next(k for k in range(5, 30) if values[-k] / values[-k - 1] > 1.01 / 0.99)
    labels = torch.sign(x[:, 0]).double()
    spaces = []
    for dense in (True, False):
        monkeypatch.setattr(operands.Matrix, "dense_is_cheaper", lambda self, k, dense=dense: dense)
        spaces.append(eigenspace(gram, k, tolerance=1e-10))
    for space in spaces:
        assert space.angle < 1e-6
        for flips in (0, 40, 120, 200):
            noisy = labels.clone()
            noisy[torch.randperm(400)[:flips]] *= -1
            exact = np.linalg.norm(vectors[:, -k:].T @ noisy.numpy()) / np.linalg.norm(noisy.numpy())
            assert information_ratio(space, noisy).item() == pytest.approx(exact, abs=1e-6)


def train_digits(noise, steps=300):
    """An MLP by MSE on ±1 labels of digits {2, 7} against the rest; yields its NTK and outputs on 128 test samples."""
    digits = sdfast.data.load_dataset("digits")
    inputs = digits.train_inputs.flatten(1).double()
    coded = torch.where((digits.train_labels == 2) | (digits.train_labels == 7), 1.0, -1.0).double()
    flipped = torch.where(torch.rand(len(coded)) < noise, -coded, coded)
    probe = torch.randperm(len(inputs))[:128]
    model = sdfast.models.mlp((inputs.shape[1], 128, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(p, x):
        return functional_call(model, p, (x[None],))[0, 0]

    for step in range(steps):
        if step % 15 == 0:
            jacobian = vmap(grad(one), (None, 0))(parameters, inputs[probe])
            rows = torch.cat([j.flatten(1) for j in jacobian.values()], 1)
            yield rows @ rows.T, model(inputs[probe])[:, 0].detach(), coded[probe], flipped[probe]
        batch = torch.randint(len(inputs), (128,))
        loss = F.mse_loss(model(inputs[batch])[:, 0], flipped[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_ratio_falls_with_noise():
    """Dong et al., figure 2, on digits {2, 7} against the rest."""
    *_, (gram, _, clean, _) = train_digits(0.0)
    space = eigenspace((gram + gram.T) / 2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever the gap
        sweep = noise_sweep(space, clean, repeats=50)
    assert sweep.rates == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    assert sweep.ratios.shape == (6, 50)
    assert (sweep.mean.diff() < 0).all()
    assert sweep.mean[0] > 0.8
    assert sweep.mean[-1] < 0.5
    assert sweep.deviation[0] < 1e-12
    assert (sweep.deviation[1:] > 0).all()
    torch.testing.assert_close(sweep.deviation, sweep.ratios.std(1))


def test_distillation_adds_information():
    """Dong et al., figure 5: the gain of labels mixed with the network's own beliefs is mostly positive in training."""
    gains = []
    for gram, outputs, _, noisy in train_digits(0.3):
        space = eigenspace((gram + gram.T) / 2, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gains.append(information_gain(space, noisy, 0.5 * noisy + 0.5 * outputs.clamp(-1, 1)).item())
    assert len(gains) == 20
    assert sum(gain >= 0 for gain in gains) >= 19


def test_sweep_of_class_labels(space):
    labels = torch.randint(4, (80,))

    def redraw(one_hot, rate, generator):
        noisy = sdfast.data.flip_labels(one_hot.argmax(1), rate, 4, generator=generator)
        return F.one_hot(noisy.labels, 4).double()

    sweep = noise_sweep(space, F.one_hot(labels, 4).double(), rates=(0.0, 0.3), repeats=3, flip=redraw)
    joint = information_ratio(space, F.one_hot(labels, 4).double(), joint=True)
    torch.testing.assert_close(sweep.ratios[0], joint.expand(3))
    again = noise_sweep(space, F.one_hot(labels, 4).double(), rates=(0.0, 0.3), repeats=3, flip=redraw)
    assert torch.equal(sweep.ratios, again.ratios)
    assert noise_sweep(space, labels.double().clamp(0, 1), repeats=1).deviation.tolist() == [0] * 6


def test_an_unstable_space_is_warned_of():
    degenerate = eigenspace(torch.eye(50), 5)
    with pytest.warns(UserWarning, match=r"gap between eigenvalues 5 and 6 is 0 %"):
        information_ratio(degenerate, torch.randn(50))
    rough = eigenspace(rbf(900), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        information_ratio(eigenspace(torch.diag(0.5 ** torch.arange(10.0)), 3), torch.randn(10))
        sure = rough.gap > 0.01 and rough.angle < 0.01
        if sure:
            information_ratio(rough, torch.randn(900))


ZEROS = torch.zeros(80)
ONES = torch.ones(80)
ERRORS = {
    "length": (lambda s: information_ratio(s, torch.randn(79)), ValueError, r"labels: got shape \(79,\), wanted \(80"),
    "scalar": (lambda s: information_ratio(s, torch.tensor(1.0)), ValueError, r"labels: got shape \(\)"),
    "no columns": (lambda s: information_ratio(s, torch.zeros(80, 0)), ValueError, r"labels: got shape \(80, 0\)"),
    "zero": (lambda s: information_ratio(s, ZEROS), ValueError, "labels: column is zero, so it has no information"),
    "zero column": (lambda s: information_ratio(s, torch.eye(80)[:, :3] * torch.tensor([1, 0, 1])), ValueError,
                    "labels: column 1 is zero"),
    "constant": (lambda s: information_ratio(s, 0.1 * ONES, center=True), ValueError, "labels: column is constant"),
    "integers": (lambda s: information_ratio(s, torch.ones(80, dtype=torch.int64)), TypeError, "labels: got int64"),
    "NaN": (lambda s: information_ratio(s, torch.nan * ONES), ValueError, "labels: holds NaN"),
    "no space": (lambda s: information_ratio(torch.eye(80), ONES), TypeError, "space: got Tensor"),
    "refined": (lambda s: information_gain(s, ONES, torch.ones(80, 1)), ValueError,
                r"refined_labels: got shape \(80, 1\), wanted \(80,\)"),
    "zero refined": (lambda s: information_gain(s, ONES, ZEROS), ValueError, "refined_labels: column is zero"),
    "components": (lambda s: error_components(s, ONES, torch.ones(80, 2)), ValueError, r"labels: got shape \(80, 2\)"),
    "rate": (lambda s: predicted_decay(s, 0.0, 1), ValueError, "learning_rate: got 0.0"),
    "steps": (lambda s: predicted_decay(s, 0.1, [1, -1]), ValueError, "steps: got -1"),
    "half a step": (lambda s: predicted_decay(s, 0.1, [0.5]), TypeError, "steps: got float"),
    "diverges": (lambda s: alpha_window(s, 3.0), ValueError, r"learning_rate: got 3.0, .* wanted below 2"),
    "signal": (lambda s: alpha_window(s, 0.1, signal=6), ValueError, "signal: got 6, wanted 1 to 5"),
    "no signal": (lambda s: alpha_window(eigenspace(torch.zeros(9, 9), 2), 0.1), ValueError, "eigenvalue 2 is 0"),
    "rates": (lambda s: noise_sweep(s, ONES, rates=(0.5, 1.5)), ValueError, "rates: got"),
    "repeats": (lambda s: noise_sweep(s, ONES, repeats=0), ValueError, "repeats: got 0"),
    "one value": (lambda s: noise_sweep(s, ONES), ValueError, "labels: got 1 values"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name, space):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message) as caught:
        call(space)
    assert "\n" not in str(caught.value)
