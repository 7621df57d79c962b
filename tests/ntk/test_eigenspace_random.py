"""The eigensolver where it was once wrong: starts that mislead it, runs cut short, sizes at the ends of the range."""

import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator

from sdfast.ntk import eigenspace, operands


@pytest.fixture(autouse=True)
def always_krylov(monkeypatch):
    """Matrices this small are otherwise decomposed densely."""
    for kind in (operands.Matrix, operands.Operator):
        monkeypatch.setattr(kind, "dense_is_cheaper", lambda self, k: False)


def symmetric(spectrum, generator):
    vectors = np.linalg.qr(generator.normal(size=(len(spectrum),) * 2))[0]
    matrix = (vectors * np.asarray(spectrum)) @ vectors.T
    return np.tril(matrix) + np.tril(matrix, -1).T


def spectra(n, generator):
    """Clusters, levels, decays, negative ones."""
    i = np.arange(1, n + 1)
    return [
        np.repeat(generator.uniform(size=n // 30 + 1), 30)[:n],  # each thirty times
        generator.choice([1.0, 0.7, 0.3], n) * (1 + 1e-13 * generator.normal(size=n)),
        np.where(i <= n // 3, 1.0, 0.0),
        0.8**i,
        1.0 / i**2,
        generator.normal(size=n),
        -generator.uniform(1, 5, n),
    ]


def starts(vectors, generator):
    """None, random, the smallest eigenvectors, all of the largest but one, zero, ever the same, and far too many."""
    n, k = len(vectors), 5
    yield None
    yield generator.normal(size=(n, 3))
    yield vectors[:, :k]
    yield vectors[:, ::-1][:, 1 : k + 1]
    yield np.zeros((n, 2))[::-1]
    yield np.repeat(generator.normal(size=(n, 1)), 4, 1)
    yield generator.normal(size=(n, n))


# 5: a block is wider; 40: it is not, and copies must be looked for.
@pytest.mark.parametrize("k", [5, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_converged_pair_is_one_of_the_largest(k, dtype):
    generator = np.random.default_rng(torch.randint(2**31, ()).item())
    tolerance = 1e-5 if dtype == np.float32 else 1e-10
    for place, spectrum in enumerate(spectra(200, generator)):
        matrix = symmetric(spectrum, generator).astype(dtype)
        values, vectors = np.linalg.eigh(matrix.astype(np.float64))
        scale = np.abs(values).max()
        for number, start in enumerate(starts(vectors, generator)):
            given = matrix if (place + number) % 2 else aslinearoperator(matrix)
            limit = 300 if (place + number) % 3 else 4
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if limit == 4 else "error", UserWarning)
                space = eigenspace(given, k, start=start, max_iterations=limit)
            true = np.linalg.norm(matrix.astype(np.float64) @ space.vectors - space.vectors * space.values, axis=0)
            assert (space.residuals >= true / scale * (1 - 1e-6) - 1e-13).all()
            assert np.linalg.norm(space.vectors.T @ space.vectors - np.eye(k)) < 1e-10
            assert limit == 4 or space.converged.all()
            assert space.converged.all() or not space.converged.any() or (space.residuals > tolerance).any()
            if space.converged.all():
                np.testing.assert_allclose(space.values, values[::-1][:k], rtol=0, atol=2 * tolerance * scale)


def test_a_vector_that_a_wide_start_lacks_is_found_across_restarts():
    """The start is all of the largest but one, nearly exact: its blocks are as wide, and the basis is soon full."""
    generator = np.random.default_rng(torch.randint(2**31, ()).item())
    matrix = symmetric(generator.normal(size=400), generator)
    values, vectors = np.linalg.eigh(matrix)
    kept = np.delete(np.arange(355, 400), generator.integers(5, 9))  # the last wanted ones: their like is near
    start = vectors[:, kept] + 10 ** generator.uniform(-12, -9) * generator.normal(size=(400, 44))
    space = eigenspace(matrix, 40, start=start, strict=True)
    np.testing.assert_allclose(space.values, values[::-1][:40], rtol=0, atol=2e-10 * np.abs(values).max())


def test_many_dropped_directions_do_not_spoil_a_residual():
    """Three levels, seen from the lowest: many directions of a remainder vanish at once, to different sizes."""
    generator = np.random.default_rng(torch.randint(2**31, ()).item())
    matrix = symmetric(generator.choice([1.0, 0.7, 0.3], 130), generator)
    low = np.linalg.eigh(matrix)[1][:, :12]
    start = low + 10 ** generator.uniform(-9, -7) * generator.normal(size=low.shape)
    space = eigenspace(matrix, 12, start=start, strict=True)
    true = np.linalg.norm(matrix @ space.vectors - space.vectors * space.values, axis=0)
    assert true.max() <= 1e-10 * (1 + 1e-6)


@pytest.mark.parametrize("k", [54, 199])
def test_a_run_that_is_cut_short_returns_all_it_was_asked_for_and_trusts_nothing(k):
    matrix = symmetric(1.0 / np.arange(1, 201), np.random.default_rng(0))
    low = np.linalg.eigh(matrix)[1][:, :k]  # eigenvectors, so without any residual, of the smallest
    for start in (None, low):
        with pytest.warns(UserWarning, match="pairs have not converged.*max_iterations came first"):
            space = eigenspace(matrix, k, max_iterations=1, start=start)
        assert space.vectors.shape == (200, k)
        np.testing.assert_allclose(space.vectors.T @ space.vectors, np.eye(k), atol=1e-10)
        assert not space.converged.any()
        assert space.gap == 0
        assert space.angle == np.inf


@pytest.mark.parametrize("exponent", [-200, -140, -30, 30, 140, 200])
@pytest.mark.parametrize("precision", [None, "float32"])
def test_sizes_whose_squares_are_no_numbers(exponent, precision):
    spectrum = 0.5 ** np.arange(120.0)
    matrix = symmetric(spectrum, np.random.default_rng(1)) * 10.0**exponent
    for given in (matrix, aslinearoperator(matrix)):
        space = eigenspace(given, 6, precision=precision, tolerance=1e-6)
        assert space.converged.all()
        assert np.isfinite(space.residuals).all()
        np.testing.assert_allclose(space.values / 10.0**exponent, spectrum[:6], rtol=1e-5)
        assert space.gap == pytest.approx(0.5, abs=1e-3)
    if abs(exponent) == 30:
        single = eigenspace(matrix.astype(np.float32), 6)
        np.testing.assert_allclose(single.values / 10.0**exponent, spectrum[:6], rtol=1e-5)


def test_a_start_where_the_matrix_is_zero_is_no_sign_of_asymmetry():
    """Products there are nothing but rounding."""
    matrix = symmetric(0.6 ** np.arange(250.0), np.random.default_rng(2)).astype(np.float32)
    low = np.linalg.eigh(matrix.astype(np.float64))[1][:, :5]
    space = eigenspace(matrix, 3, start=low)
    np.testing.assert_allclose(space.values, [1, 0.6, 0.36], rtol=1e-5)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (np.ones((80, 1), dtype=complex), TypeError, "start: got complex128"),
        (np.ones((80, 1), dtype=int), TypeError, "start: got int64"),
        ([[1.0]] * 80, TypeError, "start: got list"),
    ],
)
def test_starts_that_are_refused(start, error, message):
    with pytest.raises(error, match=message):
        eigenspace(np.eye(80), 1, start=start)
