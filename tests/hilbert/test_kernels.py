"""Kernels against finite-difference inverses, wide random networks, and scikit-learn."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel

from sdfast.hilbert import kernels, self_distill


@pytest.fixture
def rng():
    return np.random.default_rng(torch.initial_seed())


def test_spline_is_the_inverse_of_finite_differences():
    """g solves f'''' = δ with f = f'' = 0 at both ends: the inverse of the squared second difference, over its step."""
    steps = 400
    h = 1 / steps
    second = (
        np.diag(np.full(steps - 1, -2.0)) + np.diag(np.ones(steps - 2), 1) + np.diag(np.ones(steps - 2), -1)
    ) / h**2
    x = np.arange(1, steps)[:, None] * h
    np.testing.assert_allclose(kernels.spline(x), np.linalg.inv(second @ second) / h, atol=1e-6)


def test_spline_is_symmetric_positive_and_zero_at_the_ends(rng):
    x = rng.uniform(size=(20, 1))
    g = kernels.spline(x)
    np.testing.assert_allclose(g, g.T, atol=1e-16)
    assert np.linalg.eigvalsh(g)[0] > -1e-16
    assert np.abs(kernels.spline([[0.0], [1.0]], x)).max() < 1e-16
    with pytest.raises(ValueError, match="wanted within \\[0, 1\\]"):
        kernels.spline([[1.5]])
    with pytest.raises(ValueError, match="got 2 features, wanted 1"):
        kernels.spline(np.ones((2, 2)))


def random_networks(rng, x, depth, bias_variance, width, draws):
    """Mean over draws of f(x) f(x') and of the gradients' inner product, by hand-written backpropagation."""
    outputs, tangents = np.zeros((len(x),) * 2), np.zeros((len(x),) * 2)
    for _ in range(draws):
        h, inputs, gates, weights = x, [], [], []
        sizes = [x.shape[1], *[width] * depth, 1]
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            gain = 1.0 if layer == 0 else 2.0
            weight = rng.normal(size=(fan_in, fan_out))
            bias = rng.normal(size=fan_out) * np.sqrt(bias_variance)
            inputs.append(h * np.sqrt(gain / fan_in))
            u = inputs[-1] @ weight + bias
            weights.append(weight * np.sqrt(gain / fan_in))
            gates.append(u > 0)
            h = np.maximum(u, 0)
        outputs += u @ u.T
        delta = np.ones((len(x), 1))
        for layer in range(depth, -1, -1):
            tangents += (delta @ delta.T) * (inputs[layer] @ inputs[layer].T + bias_variance)
            if layer:
                delta = (delta @ weights[layer].T) * gates[layer - 1]
    return outputs / draws, tangents / draws


@pytest.mark.parametrize(("depth", "bias_variance"), [(1, 0.0), (2, 0.0), (2, 0.3)])
def test_network_kernels_against_wide_random_networks(rng, depth, bias_variance):
    x = rng.normal(size=(4, 3))
    outputs, tangents = random_networks(rng, x, depth, bias_variance, width=400, draws=400)
    exact = kernels.relu_ntk(x, depth=depth, bias_variance=bias_variance)
    size = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert np.abs((tangents - exact) / size).max() < 0.05
    exact = kernels.arc_cosine(x, depth=depth, bias_variance=bias_variance)
    size = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert np.abs((outputs - exact) / size).max() < 6 / np.sqrt(400)  # the spread of one output a draw


def test_network_kernels_at_equal_and_opposite_points():
    x = np.array([[3.0, 4.0], [-3.0, -4.0], [0.0, 0.0]])
    g = kernels.arc_cosine(x)
    np.testing.assert_allclose(g, [[12.5, 0, 0], [0, 12.5, 0], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(np.diag(kernels.relu_ntk(x)), [25, 25, 0], atol=1e-6)


def test_named_kernels_are_scikit_learns(rng):
    x, z = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))
    np.testing.assert_array_equal(kernels.gram("rbf", x, z), rbf_kernel(x, z, gamma=1 / 3))
    np.testing.assert_array_equal(kernels.gram("polynomial", x, degree=2), polynomial_kernel(x, degree=2))
    np.testing.assert_allclose(
        kernels.gram("laplacian", x, z, gamma=0.5), np.exp(-0.5 * np.abs(x[:, None] - z).sum(-1)), rtol=1e-12
    )
    distance = np.linalg.norm(x[:, None] - z, axis=-1) * np.sqrt(3) / 2
    np.testing.assert_allclose(
        kernels.gram("matern", x, z, length_scale=2, nu=1.5), (1 + distance) * np.exp(-distance), rtol=1e-10
    )


def test_functions_and_matrices(rng):
    x = rng.normal(size=(5, 3))
    np.testing.assert_array_equal(kernels.gram(lambda a, b, scale: scale * a @ b.T, x, scale=2), 2 * x @ x.T)
    np.testing.assert_array_equal(kernels.gram("precomputed", x @ x.T), x @ x.T)


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_every_kernel_makes_a_path(rng, kernel):
    x = rng.uniform(0.05, 0.95, size=(30, 1))
    y = np.sin(6 * x[:, 0]) + 0.1 * rng.normal(size=30)
    # On one side of 0 and without biases, a ReLU network is linear in one variable.
    options = {"bias_variance": 1.0} if kernel in ("arc_cosine", "relu_ntk") else {}
    path = self_distill(kernels.gram(kernel, x, **options), y - y.mean(), relative_tolerance=0.5, rounds=2)
    assert len(path) >= 1
    np.testing.assert_allclose(
        path.predict(kernels.gram(kernel, x[:4], x, **options), 1), path.predictions[0][:4], atol=1e-6 * np.abs(y).max()
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: kernels.gram("rfb", x), ValueError, "kernel: got 'rfb', wanted one of 'rbf'"),
        (lambda x: kernels.gram(3, x), ValueError, "kernel: got 3"),
        (lambda x: kernels.gram("rbf", x[0]), ValueError, r"x1: got shape \(3,\)"),
        (lambda x: kernels.gram("rbf", x, x[:, :2]), ValueError, "x2: got 2 features, wanted 3"),
        (
            lambda x: kernels.gram("matern", x[:, :0]),
            ValueError,
            r"x1: got shape \(5, 0\), wanted at least one feature",
        ),
        (lambda x: kernels.relu_ntk(x, x * np.inf), ValueError, r"x2: entry \(0, 0\) is -?inf"),
        (lambda x: kernels.gram("matern", x * [1, np.nan, 1]), ValueError, r"x1: entry \(0, 1\) is nan"),
        (lambda x: kernels.gram(lambda a, b: a, x), ValueError, r"kernel: returned shape \(5, 3\), wanted \(5, 5\)"),
        (lambda x: kernels.gram("precomputed", x, x), TypeError, "takes a matrix alone"),
        (lambda x: kernels.gram("rbf", x, degree=2), TypeError, "degree"),
        (
            lambda x: kernels.gram("spline", x, gamma=2),
            TypeError,
            "gamma: kernel 'spline' does not take it, .*none",
        ),
        (lambda x: kernels.arc_cosine(x, x[:, :2]), ValueError, "x2: got 2 features, wanted 3"),
        (lambda x: kernels.arc_cosine(x, bias_variance="a"), TypeError, "bias_variance: got str"),
        (lambda x: kernels.relu_ntk(x, depth=0), ValueError, "depth: got 0"),
        (lambda x: kernels.relu_ntk(x, bias_variance=-1), ValueError, "bias_variance: got -1"),
        (lambda x: kernels.matern(x, nu=0), ValueError, "nu: got 0"),
    ],
)
def test_bad_input(rng, call, error, message):
    with pytest.raises(error, match=message):
        call(rng.normal(size=(5, 3)))
