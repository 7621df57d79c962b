"""Mixtures against fits chained by hand, a numerical optimiser, and the risk on clean labels."""

import functools

import numpy as np
import pytest
import torch
from hilbert.kernels_at_random import random_problem
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel

from sdfast.hilbert import decompose, mixing


@pytest.fixture
def rng():
    return np.random.default_rng(torch.initial_seed())


def smoother(gram, ridge):
    n = len(gram)
    return gram / n @ np.linalg.inv(gram / n + ridge * np.eye(n))


@pytest.mark.parametrize("outputs", [None, 2])
def test_rounds_are_chained_kernel_ridge(rng, outputs):
    gram, y = random_problem(rng, points=9, outputs=outputs, decades=2)
    cross = rng.normal(size=(4, 9))
    alphas = [0.3, -0.5, 1.7]
    mixed = mixing.mixed_rounds(gram, y, alphas, ridge=0.05, rounds=4)
    model = KernelRidge(alpha=9 * 0.05, kernel="precomputed").fit(gram, y)
    fitted = y
    for t, alpha in enumerate([None, *alphas], 1):
        if alpha is not None:
            model = KernelRidge(alpha=9 * 0.05, kernel="precomputed").fit(gram, alpha * y + (1 - alpha) * fitted)
        fitted = model.predict(gram)
        np.testing.assert_allclose(mixed.fitted(t), fitted, atol=1e-11 * np.abs(y).max())
        wanted = model.predict(cross)
        np.testing.assert_allclose(mixed.predict(cross, t), wanted, atol=1e-10 * np.abs(wanted).max())


@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.5])
def test_the_limit_is_a_ridge(rng, alpha):
    gram, y = random_problem(rng, points=8, decades=2)
    mixed = mixing.mixed_rounds(gram, y, alpha, ridge=0.5, rounds=400)
    limit = smoother(gram, mixing.limit_ridge(0.5, alpha)) @ y
    np.testing.assert_allclose(mixed.fitted(400), limit, atol=1e-12 * np.abs(y).max())


def gcv(gram, y, ridge, weights, searched):
    s, n = smoother(gram, ridge), len(gram)
    powers = [np.linalg.matrix_power(s, j) for j in range(1, len(weights) + 1)]
    mixed = sum(w * (y - p @ y) / (1 - np.trace(p) / n) for w, p in zip(weights, powers, strict=True))
    return (mixed**2).sum() / n / (1 - searched / n) ** 2


def cp(gram, y, ridge, weights, searched, variance):
    s, n = smoother(gram, ridge), len(gram)
    total = sum(w * np.linalg.matrix_power(s, j) for j, w in enumerate(weights, 1))
    return ((y - total @ y) ** 2).sum() / n + 2 * variance * (np.trace(total) + searched) / n


@pytest.mark.parametrize("criterion", ["gcv", "cp"])
@pytest.mark.parametrize("rounds", [2, 3])
def test_weights_are_optimal(rng, criterion, rounds):
    """Against BFGS on the criterion written with matrices."""
    for _ in range(6):
        gram, y = random_problem(rng, points=30, outputs=2, decades=1)
        y = y / np.abs(y).max()
        extra = {"variance": 0.2} if criterion == "cp" else {}
        value = functools.partial(cp, variance=0.2) if criterion == "cp" else gcv
        found = mixing.optimal_rounds(gram, y, ridge=0.1, rounds=rounds, criterion=criterion, **extra)
        assert found.scores[0] == pytest.approx(value(gram, y, 0.1, [1.0], 0))
        best = minimize(
            lambda free, value=value, gram=gram, y=y: value(gram, y, 0.1, [1 - sum(free), *free], rounds - 1),
            np.zeros(rounds - 1),
            method="BFGS",
            options={"gtol": 1e-9, "maxiter": 60},
        ).fun
        assert found.scores[rounds - 1] <= best * (1 + 1e-6)
        used = len(found.weights)
        assert found.weights.sum() == pytest.approx(1)
        assert value(gram, y, 0.1, found.weights, used - 1) == pytest.approx(found.scores[used - 1])
        assert found.helps == (used > 1)
        assert found.helps <= (found.scores[used - 1] == found.scores.min())


def test_mixture_predicts_what_its_powers_do(rng):
    gram, y = random_problem(rng, points=12, decades=1)
    found = mixing.optimal_rounds(gram, y, ridge=3.0, rounds=4)
    s = smoother(gram, 3.0)
    wanted = sum(w * np.linalg.matrix_power(s, j) for j, w in enumerate(found.weights, 1)) @ y
    np.testing.assert_allclose(found.fitted(), wanted, atol=1e-10 * np.abs(y).max())
    np.testing.assert_allclose(found.predict(gram), wanted, atol=1e-10 * np.abs(y).max())


def noisy_digits(rng, noise, train=500):
    x, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(x))
    x, labels = x[order] / 16, labels[order]
    given = labels[:train].copy()
    flipped = rng.random(train) < noise
    given[flipped] = rng.integers(0, 10, flipped.sum())
    gram, cross = rbf_kernel(x[:train], gamma=0.1), rbf_kernel(x[train:], x[:train], gamma=0.1)
    return gram, cross, np.eye(10)[given] - 0.1, labels[train:]


@pytest.mark.parametrize("criterion", ["gcv", "cp"])
def test_strong_noise_wants_more_than_the_teacher_and_too_much_ridge_less_than_none(criterion):
    """ξ > 1 where labels are noisy and the ridge too small (Das and Sanghavi), ξ < 0 where it is too large (Dang)."""
    rng = np.random.default_rng(0)
    gram, cross, y, truth = noisy_digits(rng, 0.6)
    spectrum = decompose(gram)
    small = mixing.optimal_rounds(spectrum, y, ridge=1e-4, rounds=2, criterion=criterion)
    assert small.helps
    assert small.xi > 1
    plain = mixing.mixed_rounds(spectrum, y, 1.0, ridge=1e-4, rounds=1).predict(cross, 1)
    accuracy = [(f.argmax(1) == truth).mean() for f in (plain, small.predict(cross))]
    assert accuracy[1] > accuracy[0] + 0.03
    gram, cross, y, truth = noisy_digits(rng, 0.2)
    large = mixing.optimal_rounds(gram, y, ridge=0.1, rounds=2, criterion=criterion)
    assert large.xi < 0


def test_it_says_when_mixing_does_not_help():
    """Near the best ridge and below it there is little to gain, and it is said so; at one too large, all gain."""
    rng = np.random.default_rng(1)
    points = 80
    x = np.sort(rng.uniform(size=(points, 1)), axis=0)
    spectrum = decompose(rbf_kernel(x, gamma=20))
    clean = np.sin(6 * x[:, 0])
    helped = {}
    for ridge in (1e-4, 1e-2, 0.3):  # 1e-2 has the least risk of these powers of ten
        gains = []
        for _ in range(60):
            y = clean + 0.3 * rng.normal(size=points)
            found = mixing.optimal_rounds(spectrum, y, ridge=ridge, rounds=2)
            plain = mixing.mixed_rounds(spectrum, y, 1.0, ridge=ridge, rounds=1).fitted(1)
            assert found.helps or np.array_equal(found.fitted(), plain)
            gains.append(((plain - clean) ** 2).mean() - ((found.fitted() - clean) ** 2).mean() if found.helps else 0.0)
        helped[ridge] = np.count_nonzero(gains), np.mean(gains)
    assert helped[1e-4][0] < 20
    assert helped[1e-2][0] < 10
    assert helped[0.3][0] == 60
    assert helped[0.3][1] > 0.05


def test_noise_variance(rng):
    x = np.linspace(0, 1, 400)[:, None]
    y = np.sin(6 * x) + 0.3 * rng.normal(size=(400, 2))
    assert mixing.noise_variance(rbf_kernel(x, gamma=20), y) == pytest.approx(2 * 0.09, rel=0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, y: mixing.mixed_rounds(g, y, [0.5], ridge=1.0, rounds=4), "alpha: got 1 values, wanted 3"),
        (lambda g, y: mixing.mixed_rounds(g, y, np.inf, ridge=1.0, rounds=2), "alpha: got inf"),
        (lambda g, y: mixing.mixed_rounds(g, y, 0.5, ridge=0.0, rounds=2), "ridge: got 0.0"),
        (lambda g, y: mixing.mixed_rounds(g, y, 0.5, ridge=1.0, rounds=0), "rounds: got 0"),
        (lambda g, y: mixing.mixed_rounds(g, y, 0.5, ridge=1.0, rounds=2).fitted(3), "round: got 3"),
        (lambda g, y: mixing.mixed_rounds(g, y, 0.5, ridge=1.0, rounds=2).predict(g[:2, :2], 1), "cross_gram"),
        (lambda g, y: mixing.mixed_rounds(g, y, "a", ridge=1.0, rounds=1), "alpha: got str, wanted a number"),
        (lambda g, y: mixing.mixed_rounds(g, y, np.ones(3), ridge=1.0, rounds=3), "alpha: got 3 values, wanted 2"),
        (lambda g, y: mixing.mixed_rounds(g, y, 0.5, ridge="a", rounds=2), "ridge: got str, wanted a number"),
        (lambda g, y: mixing.limit_ridge(1.0, 0.0), "alpha: got 0.0"),
        (lambda g, y: mixing.limit_ridge(-1.0, 1.0), "ridge: got -1.0"),
        (lambda g, y: mixing.optimal_rounds(g, y, ridge=1.0, rounds=2, criterion="aic"), "criterion: got 'aic'"),
        (lambda g, y: mixing.optimal_rounds(g, y, ridge=1.0, rounds=2, variance=1.0), "variance: got 1.0"),
        (lambda g, y: mixing.optimal_rounds(g, y[:3], ridge=1.0, rounds=2), r"y: got shape \(3,\)"),
    ],
)
def test_bad_input(rng, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(*random_problem(rng, points=5))


@pytest.mark.parametrize("criterion", ["gcv", "cp"])
def test_a_tiny_ridge_keeps_its_digits(rng, criterion):
    """1 − S = c / (c + d) is as exact at c = 1e-12 d, where subtracting S would leave four digits, as elsewhere."""
    gram, y = random_problem(rng, points=7, decades=0.5)
    extra = {"variance": 0.0} if criterion == "cp" else {}
    near, far = (
        mixing.optimal_rounds(gram, y, ridge=ridge, rounds=2, criterion=criterion, **extra) for ridge in (1e-9, 1e-12)
    )
    scale = 1e-6 if criterion == "cp" else 1.0  # of ‖(I − S)y‖², a square
    np.testing.assert_allclose(far.scores[0], near.scores[0] * scale, rtol=1e-7)
    assert np.isfinite(mixing.optimal_rounds(gram, y, ridge=1e-100, rounds=3, criterion=criterion).scores).all()


def test_a_ridge_that_vanishes_beside_the_kernel_is_refused():
    with pytest.raises(ValueError, match="ridge: got 1e-300, so small beside the kernel"):
        mixing.optimal_rounds(np.diag([1.0, 2, 3]) * 1e100, np.array([1.0, 2, 4]), ridge=1e-300, rounds=2)


def test_kernel_values_of_any_real_type(rng):
    gram, y = random_problem(rng, points=5)
    mixed = mixing.mixed_rounds(gram, y, 0.5, ridge=1.0, rounds=2)
    values = rng.integers(0, 5, (3, 5))
    np.testing.assert_array_equal(mixed.predict(values, 2), mixed.predict(values.astype(np.float32), 2))
    with pytest.raises(TypeError, match="cross_gram: got dtype complex128"):
        mixed.predict(values + 0j, 2)
