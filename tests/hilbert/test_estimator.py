"""The estimators: scikit-learn's own checks with nothing skipped, pipelines, weights, and what they choose."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits, load_iris, make_friedman1
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sdfast.hilbert import KernelSelfDistillation, KernelSelfDistillationClassifier, self_distill
from sdfast.hilbert.estimator import FRACTIONS


@pytest.fixture
def rng():
    return np.random.default_rng(torch.initial_seed())


@pytest.mark.parametrize("name", ["KernelSelfDistillation", "KernelSelfDistillationClassifier"])
def test_check_estimator(name):
    """All of scikit-learn's checks, none skipped: pandas is there, and SCIPY_ARRAY_API is set before SciPy loads."""
    code = f"""
        import json
        from sklearn.utils.estimator_checks import check_estimator
        from sdfast.hilbert import {name}
        results = check_estimator({name}(), on_fail=None, on_skip=None)
        print(json.dumps([[r["check_name"], r["status"], repr(r["exception"])] for r in results]))
    """
    environment = os.environ | {"SCIPY_ARRAY_API": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) > 50
    assert [result for result in results if result[1] != "passed"] == []


def test_one_round_with_a_ridge_is_kernel_ridge(rng):
    x, y = rng.normal(size=(30, 3)), rng.normal(size=(30, 2))
    ours = KernelSelfDistillation(rounds=1, ridge=0.01, gamma=0.5).fit(x, y)
    ridge = KernelRidge(alpha=30 * 0.01, kernel="rbf", gamma=0.5).fit(x, y - y.mean(0))
    np.testing.assert_allclose(ours.predict(x[:5]), ridge.predict(x[:5]) + y.mean(0), atol=1e-10)
    twice = KernelSelfDistillation(rounds=2, ridge=0.01, gamma=0.5).fit(x, y)
    ridge = KernelRidge(alpha=30 * 0.01, kernel="rbf", gamma=0.5).fit(x, ridge.predict(x))
    np.testing.assert_allclose(twice.predict(x[:5]), ridge.predict(x[:5]) + y.mean(0), atol=1e-10)


def test_fixed_tolerance_is_the_path(rng):
    x, y = rng.normal(size=(25, 2)), rng.normal(size=25)
    y /= y.std()  # of smaller labels so large a tolerance may leave a single fit
    path = self_distill(rbf_kernel(x, gamma=0.7), y - y.mean(), tolerance=0.2)
    model = KernelSelfDistillation(gamma=0.7, rounds=2, tolerance=0.2).fit(x, y)
    np.testing.assert_allclose(model.multipliers_, path.c[:2], rtol=1e-8)
    cross = rbf_kernel(rng.normal(size=(4, 2)), x, gamma=0.7)
    precomputed = KernelSelfDistillation("precomputed", rounds=2, tolerance=0.2).fit(rbf_kernel(x, gamma=0.7), y)
    np.testing.assert_allclose(precomputed.predict(cross), path.predict(cross, 2) + y.mean(), atol=1e-9)
    share = 0.2 / np.var(y)
    same = KernelSelfDistillation(gamma=0.7, rounds=2, relative_tolerance=share).fit(x, y)
    np.testing.assert_allclose(same.dual_coef_, model.dual_coef_, rtol=1e-8)


@pytest.mark.parametrize("options", [{}, {"rounds": 2}, {"relative_tolerance": 0.3}, {"ridge": 0.02}])
def test_weights_are_copies(rng, options):
    x, y, weight = rng.normal(size=(40, 3)), rng.normal(size=40), rng.integers(0, 4, 40)
    weighted = KernelSelfDistillation(**options).fit(x, y, sample_weight=weight)
    copied = KernelSelfDistillation(**options).fit(np.repeat(x, weight, axis=0), np.repeat(y, weight))
    assert weighted.rounds_ == copied.rounds_
    np.testing.assert_allclose(weighted.multipliers_, copied.multipliers_, rtol=1e-6)
    np.testing.assert_allclose(weighted.predict(x), copied.predict(x), atol=1e-7)
    assert weighted.gcv_ == pytest.approx(copied.gcv_, rel=1e-6)
    assert len(weighted.X_fit_) == np.count_nonzero(weight)
    gram = rbf_kernel(x, gamma=1 / 3)
    precomputed = KernelSelfDistillation("precomputed", **options).fit(gram, y, sample_weight=weight)
    np.testing.assert_allclose(precomputed.predict(gram), weighted.predict(x), atol=1e-9)


def test_classifier_on_noisy_digits():
    rng = np.random.default_rng(0)
    x, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(x))[:1000]
    x, labels = x[order] / 16, labels[order]
    given = labels[:600].copy()
    redrawn = rng.random(600) < 0.4
    given[redrawn] = rng.integers(0, 10, redrawn.sum())
    names = np.array([f"digit {i}" for i in range(10)])
    model = KernelSelfDistillationClassifier(gamma=0.1).fit(x[:600], names[given])
    plain = KernelRidge(alpha=1e-3, kernel="rbf", gamma=0.1).fit(x[:600], np.eye(10)[given])
    score = model.score(x[600:], names[labels[600:]])
    assert score > 0.9
    assert score > (plain.predict(x[600:]).argmax(1) == labels[600:]).mean() + 0.1
    assert model.decision_function(x[600:]).shape == (400, 10)


@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "polynomial", "matern", "relu_ntk"])
def test_regression_sets_choose_a_tolerance_that_can_be_met(kernel):
    """On these a fixed 5 % is often infeasible or overfits; the choice of least GCV is neither."""
    for x, y in (load_diabetes(return_X_y=True), make_friedman1(300, noise=1.0, random_state=0)):
        x = StandardScaler().fit_transform(x)
        model = KernelSelfDistillation(kernel, gamma=None if kernel != "rbf" else 0.02)
        model.kernel_params = {"length_scale": 5.0} if kernel == "matern" else None
        half = len(x) // 2
        score = model.fit(x[:half], y[:half]).score(x[half:], y[half:])
        assert score > 0.3
        assert model.rounds_ >= 1


def test_integer_and_constant_targets(rng):
    x = rng.normal(size=(12, 2))
    assert np.array_equal(KernelSelfDistillation().fit(x, np.full(12, 3)).predict(x[:2]), [3.0, 3.0])
    assert KernelSelfDistillation().fit(x, rng.integers(0, 5, 12)).rounds_ >= 1
    assert set(KernelSelfDistillationClassifier().fit(x, ["one"] * 12).predict(x)) == {"one"}
    single = KernelSelfDistillation().fit(x[:1], [2.0])
    assert single.predict(x[:1]) == [2.0]


def test_unreachable_targets_are_predicted_by_their_mean():
    x = np.zeros((6, 1))  # six equal points with different targets
    model = KernelSelfDistillation().fit(x, np.arange(6.0))
    assert model.rounds_ == 0
    assert model.predict([[1.0]]) == [2.5]


def test_pipelines_and_searches():
    x, y = load_iris(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), KernelSelfDistillationClassifier())
    assert cross_val_score(pipeline, x, y, cv=3).min() > 0.8
    search = GridSearchCV(KernelSelfDistillationClassifier(rounds=2), {"relative_tolerance": [0.1, 0.2]}, cv=3).fit(
        x, y
    )
    assert search.best_score_ > 0.85
    gram = rbf_kernel(x)
    assert cross_val_score(KernelSelfDistillationClassifier("precomputed"), gram, y, cv=3).min() > 0.8


def test_collapse_is_said(rng):
    x, y = rng.normal(size=(20, 2)), rng.normal(size=20)
    with pytest.warns(ConvergenceWarning, match=r"collapses to the mean after \d of 40 rounds"):
        model = KernelSelfDistillation(rounds=40, relative_tolerance=0.5).fit(x, y)
    assert model.rounds_ == 0
    np.testing.assert_allclose(model.predict(x[:2]), y.mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds: got 0"),
        ({"tolerance": -1.0}, "tolerance: got -1.0"),
        ({"tolerance": "best"}, "tolerance: got 'best'"),
        ({"relative_tolerance": 1.0}, "relative_tolerance: got 1.0"),
        ({"ridge": 0.0}, "ridge: got 0.0"),
        ({"ridge": 0.1, "tolerance": 0.1}, "tolerance=0.1, ridge=0.1: wanted one of"),
        ({"kernel": "rbg"}, "kernel: got 'rbg'"),
        ({"rounds": "best"}, "rounds: got 'best', wanted an integer or 'auto'"),
        ({"kernel": "matern", "gamma": 0.5}, "gamma: got 0.5, which kernel='matern' does not take"),
        ({"kernel": np.inner, "gamma": 0.5}, "gamma: got 0.5, which kernel="),
        ({"degree": 4}, "degree: got 4, which kernel='rbf' does not take"),
        ({"kernel": "laplacian", "coef0": 0}, "coef0: got 0, which kernel='laplacian' does not take"),
        ({"gamma": 0.5, "kernel_params": {"gamma": 0.1}}, "gamma: got 0.5, and 0.1 in kernel_params"),
        ({"gamma": -1.0}, "'gamma' parameter"),
    ],
)
def test_bad_parameters(rng, options, message):
    with pytest.raises(ValueError, match=message):
        KernelSelfDistillation(**options).fit(rng.normal(size=(10, 2)), rng.normal(size=10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 2.0}, "rounds: got float, wanted an integer"),
        ({"rounds": True}, "rounds: got bool"),
        ({"tolerance": None}, "tolerance: got NoneType, wanted a number"),
        ({"tolerance": np.array([0.1, 0.2])}, "tolerance: got ndarray"),
        ({"ridge": "small"}, "ridge: got str"),
        ({"kernel_params": "gamma"}, "kernel_params: got str, wanted a dictionary"),
        ({"kernel_params": {"width": 1}}, "width: kernel 'rbf' does not take it, wanted its parameters: gamma"),
    ],
)
def test_parameters_of_a_wrong_type(rng, options, message):
    with pytest.raises(TypeError, match=message):
        KernelSelfDistillation(**options).fit(rng.normal(size=(10, 2)), rng.normal(size=10))


def test_gamma_is_one_over_the_features_unless_given(rng):
    x, y, weight = rng.normal(size=(20, 4)), rng.normal(size=20), rng.uniform(0, 2, 20)
    for kernel in ("rbf", "laplacian", "polynomial"):
        default, given = (
            KernelSelfDistillation(kernel, gamma=gamma, rounds=2, ridge=0.1).fit(x, y, sample_weight=weight)
            for gamma in (None, 0.25)
        )
        np.testing.assert_array_equal(default.predict(x), given.predict(x))


def test_the_choice_is_the_least_gcv_of_the_twelve_fractions(rng, monkeypatch):
    """By hand with dense smoothers, the mean counted as a degree of freedom; never leave-one-out; one decomposition."""
    calls = []
    plain = np.linalg.eigh
    x = rng.normal(size=(30, 2))
    y = np.sin(2 * x[:, 0]) + 0.3 * rng.normal(size=30)
    monkeypatch.setattr(np.linalg, "eigh", lambda *arguments: calls.append(0) or plain(*arguments))
    model = KernelSelfDistillation(gamma=0.5).fit(x, y)
    assert len(calls) == 1
    centre = np.eye(30) - 1 / 30
    best = (np.inf, 0, 0.0)
    for share in FRACTIONS:
        path = self_distill(rbf_kernel(x, gamma=0.5), y - y.mean(), relative_tolerance=share, rounds=50)
        if path.infeasible:
            continue
        vectors = path.spectrum.vectors
        for t, kept in enumerate(path.B, 1):
            smoother = 1 / 30 + (vectors * kept) @ vectors.T @ centre  # of the labels as given, mean and all
            score = ((y - smoother @ y) ** 2).mean() / (1 - np.trace(smoother) / 30) ** 2
            best = min(best, (score, t, float(path.tolerance[0])))
    assert model.gcv_ == pytest.approx(best[0], rel=1e-7)
    assert model.rounds_ == best[1]
    assert model.tolerance_ == pytest.approx(best[2])


def test_bad_data(rng):
    x, y = rng.normal(size=(10, 2)), rng.normal(size=10)
    with pytest.raises(ValueError, match="at least one non-zero"):
        KernelSelfDistillation().fit(x, y, sample_weight=np.zeros(10))
    with pytest.raises(ValueError, match=r"sample_weight: sums to 0\.1, less than the degrees of freedom"):
        KernelSelfDistillation().fit(x, y, sample_weight=np.full(10, 0.01))
    with pytest.raises(ValueError, match="eigenvalues of the Gram matrix are zero"):
        KernelSelfDistillation(relative_tolerance=0.01).fit(np.repeat(x[:2], 5, axis=0), y)
    with pytest.raises(ValueError, match="X: got 8 columns with kernel='precomputed', wanted 10"):
        KernelSelfDistillation("precomputed").fit(rng.normal(size=(10, 8)), y)
