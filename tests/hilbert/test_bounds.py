"""Every inequality of the theory on more than a thousand random kernels, and the printed limits."""

import numpy as np
import pytest
import torch
from hilbert.kernels_at_random import random_problem

from sdfast.hilbert import bounds, self_distill

KERNELS = 1200
SLACK = 1 + 1e-9


@pytest.fixture(scope="module")
def paths():
    """Paths to the collapse with r₀ from just above 1 to 30, on kernels with κ up to 10⁶."""
    rng = np.random.default_rng(torch.initial_seed())
    found = []
    while len(found) < KERNELS:
        gram, y = random_problem(rng)
        path = self_distill(gram, y, relative_tolerance=rng.uniform(1.02, 30) ** -2, rank_tolerance=0)
        found.append((path, bounds.relative_norm(y, float(path.tolerance[0]))))
    return found


def sizes(path):
    """r_t of every fit, and of the target that collapses."""
    last = np.linalg.norm(path.predictions[-1])
    return np.append(path.norms, last) / np.sqrt(path.points * path.tolerance[0])


def test_multipliers_are_inside_equations_12_and_16(paths):
    for path, r0 in paths:
        r = sizes(path)
        assert r[0] == pytest.approx(r0)
        interval = bounds.multiplier_interval(path.spectrum.values, r[:-1])
        assert np.all(interval.lower <= path.c * SLACK)
        assert np.all(path.c <= interval.upper * SLACK)


def test_proposition_3(paths):
    for path, r0 in paths:
        kappa = bounds.condition_number(path.spectrum.values)
        t = np.arange(len(path) + 1)
        assert np.all(bounds.norm_lower_bound(t, kappa, r0) <= sizes(path) * SLACK)


def test_fits_before_the_collapse(paths):
    """Proposition 4, Proposition 3 solved exactly, and the interval that needs no κ."""
    for path, r0 in paths:
        kappa, fits = bounds.condition_number(path.spectrum.values), len(path)
        assert path.collapsed_at == fits
        printed, exact = bounds.guaranteed_fits(kappa, r0), bounds.guaranteed_fits_by_norm(kappa, r0)
        interval = bounds.fits_interval(r0)
        assert printed <= exact * SLACK
        assert np.ceil(exact / SLACK) <= fits
        assert printed <= interval.lower
        assert interval.lower <= fits <= interval.upper


def test_one_round_in_the_interval_without_kappa(paths):
    for path, _ in paths:
        r = sizes(path)
        assert np.all(r[:-1] - 1 <= r[1:] * SLACK)
        assert np.all(r[1:] <= np.sqrt(r[:-1] ** 2 - 1) * SLACK)


def test_theorem_5_for_every_pair(paths):
    for path, r0 in paths:
        d, kept = path.spectrum.values, path.B
        j, k = np.triu_indices(len(d), 1)  # ascending: d_k ≥ d_j
        t = np.arange(1, len(path) + 1)[:, None]
        assert np.all(bounds.filter_ratio_bound(d[k], d[j], d[0], r0, t) <= kept[:, k] / kept[:, j] * SLACK)


def test_sparsity_index_is_the_least_of_theorem_5(paths):
    for path, r0 in paths:
        d, kept = path.spectrum.values, path.B
        index = bounds.sparsity_index(d, r0, np.arange(1, len(path) + 1))
        assert np.all(index <= np.min(kept[:, 1:] / kept[:, :-1], axis=1) * SLACK)


def test_equivalent_kernels_shrink_every_round(paths):
    for path, _ in paths:
        spectra = [path.equivalent_spectrum(t) for t in range(1, len(path) + 1)]
        for quantity in (bounds.equivalent_trace, bounds.rademacher_complexity, bounds.tail_complexity):
            values = np.array([quantity(each) for each in spectra])
            assert np.all(values[1:] <= values[:-1] * SLACK)


def test_theorem_6():
    rng = np.random.default_rng(torch.initial_seed())
    r0 = np.geomspace(1.01, 1e9, 400)
    for _ in range(KERNELS):
        d = rng.uniform(0.1, 3, int(rng.integers(2, 8)))
        index = bounds.sparsity_index_at_collapse(d, r0)
        assert np.all(index[1:] >= index[:-1] / SLACK)  # smaller ε, larger r₀, sparser
        assert index[-1] == pytest.approx(bounds.sparsity_limit(d), rel=1e-6)


def test_tail_quantity_by_hand():
    d = np.array([0.5, 4.0, 1.0])
    sizes = [0 / 3 + np.sqrt(5.5 / 3), 1 / 3 + np.sqrt(1.5 / 3), 2 / 3 + np.sqrt(0.5 / 3), 1.0]
    assert bounds.tail_complexity(d) == pytest.approx(min(sizes))
    assert bounds.equivalent_trace(d) == 5.5
    assert bounds.rademacher_complexity(d, radius=2) == pytest.approx(2 * 2 / 3 * np.sqrt(3 * 5.5))


def test_rademacher_bound_holds_by_simulation():
    """sup over the ball of 2/K Σ σ_i f(x_i) is 2/K √(σᵀ K_matrix σ): its mean is below the bound."""
    rng = np.random.default_rng(torch.initial_seed())
    gram, y = random_problem(rng, points=12)
    path = self_distill(gram, y, relative_tolerance=0.1)
    kernel = path.equivalent_gram(2)
    signs = rng.choice([-1.0, 1.0], size=(4000, 12))
    suprema = 2 / 12 * np.sqrt(np.einsum("si,ij,sj->s", signs, kernel, signs))
    complexity, chance = suprema.mean(), 5 * suprema.std() / np.sqrt(len(signs))  # a diagonal kernel meets the bound
    bound = bounds.rademacher_complexity(path.equivalent_spectrum(2))
    assert complexity <= bound * SLACK + chance
    assert complexity > 0.5 * bound


def test_a_perfectly_conditioned_kernel():
    """κ = 1: a = 1, r_t = r₀ − t exactly, and all the counts agree."""
    path = self_distill(np.eye(4) * 4, np.array([1.0, 2, 3, 4]), relative_tolerance=(1 / 5.5) ** 2)
    np.testing.assert_allclose(sizes(path), 5.5 - np.arange(6), rtol=1e-12)
    np.testing.assert_allclose(bounds.norm_lower_bound(np.arange(6), 1.0, 5.5), 5.5 - np.arange(6), rtol=1e-12)
    assert bounds.guaranteed_fits_by_norm(1.0, 5.5) == bounds.guaranteed_fits(1.0, 5.5) == 4.5
    assert len(path) == 5 == bounds.fits_interval(5.5).lower


def test_whole_numbers_of_fits_stay_whole():
    """r₀² − 1 = 19 at a tolerance of 5 % is 19 fits, whichever way r₀ was rounded."""
    for share, upper in ((0.05, 19), (0.1, 9), (0.5, 1), (0.01, 99), (0.0499, 20)):
        assert bounds.fits_interval(share**-0.5).upper == upper
    assert list(bounds.fits_interval([2.0, 3.0, 3.1]).lower) == [1, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds.fits_interval(1.0), "relative_norm: got 1.0, wanted > 1"),
        (lambda: bounds.multiplier_interval([0.0, 0.0], 2.0), "eigenvalues: got 0 to 0"),
        (lambda: bounds.multiplier_interval([-1.0, 1.0], 2.0), "none negative"),
        (lambda: bounds.sparsity_index([1.0], 2.0, 1), "at least two"),
        (lambda: bounds.sparsity_index([0.0, 1.0], 2.0, 1), "the least is 0"),
        (lambda: bounds.sparsity_limit([0.0, 1.0]), "all positive"),
        (lambda: bounds.contraction(0.5, 2.0), "condition: got 0.5, wanted κ"),
        (lambda: bounds.norm_lower_bound(1, np.inf, 2.0), "condition: got inf, wanted finite"),
        (lambda: bounds.norm_lower_bound(-1, 2.0, 2.0), "fits: got -1.0, wanted none negative"),
        (lambda: bounds.relative_norm([1.0, 2.0], 0.0), "tolerance: got 0.0"),
        (lambda: bounds.filter_ratio_bound(1.0, 2.0, 0.5, 3.0, 1), "wanted d_k >= d_j >= d_min > 0"),
        (lambda: bounds.filter_ratio_bound(1.0, 0.0, 0.0, 3.0, 1), "wanted d_k >= d_j >= d_min > 0"),
        (lambda: bounds.rademacher_complexity([1.0], radius=0), "radius: got 0.0"),
        (lambda: bounds.tail_complexity(np.ones((2, 2))), r"eigenvalues: got shape \(2, 2\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_singular_kernel_has_no_condition_number():
    assert bounds.condition_number([0.0, 1.0]) == np.inf
    assert bounds.guaranteed_fits(np.inf, 3.0) == 0
