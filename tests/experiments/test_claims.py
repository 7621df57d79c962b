"""The sign-flip test against its definition, and the claims built on it."""

import itertools

import numpy as np
import pytest

from sdfast.experiments.claims import above, sign_flip_test, within


def by_definition(values):
    sums = [
        sum(s * v for s, v in zip(signs, values, strict=True))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    return np.mean([total >= sum(values) - 1e-9 for total in sums])


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_p_is_the_share_of_sign_patterns(count):
    for shift in (-0.5, 0.0, 0.7):
        values = np.random.default_rng(count).normal(shift, 1, count).tolist()
        assert sign_flip_test(values) == pytest.approx(by_definition(values))


def test_ties_and_zeros_count_against_the_claim():
    assert sign_flip_test([1.0] * 4) == 1 / 16
    assert sign_flip_test([0.0] * 4) == 1.0
    assert sign_flip_test([-1.0] * 4) == 1.0
    assert sign_flip_test([0.1 + 0.2, -0.3]) == pytest.approx(0.75)  # equal but for rounding


def test_many_seeds_are_sampled():
    values = np.random.default_rng(0).normal(0.4, 1, 20).tolist()
    exact = by_definition_of_twenty(values)
    assert sign_flip_test(values) == pytest.approx(exact, abs=5 * np.sqrt(exact / 100_000) + 1e-5)


def by_definition_of_twenty(values):
    patterns = np.arange(2**20)[:, None] >> np.arange(20) & 1
    return np.mean((1 - 2 * patterns) @ np.array(values) >= sum(values) - 1e-9)


def test_a_true_hypothesis_is_rarely_refused():
    """Differences that are symmetric about 0: p ≤ .05 in at most 5 % of the cases, but for chance (5 sigma)."""
    rng = np.random.default_rng(1)
    rejected = sum(sign_flip_test(rng.standard_t(2, 8)) <= 0.05 for _ in range(2000))
    assert rejected <= 100 + 5 * np.sqrt(2000 * 0.05 * 0.95)


def test_claims():
    claim = above("it grows", [0.02, 0.03, 0.01, 0.02, 0.04])
    assert (claim.holds, claim.seeds, claim.p) == (True, 5, 1 / 32)
    assert claim.size == "+2.4 ± 1.1 points"
    assert above("it grows", [0.02, -0.03, 0.01, 0.02, -0.01]).holds is False
    assert above("it grows", [0.02] * 4).holds is None  # four seeds cannot show it
    assert within("it stays", [0.001, -0.002, 0.0, 0.001, -0.001], 0.01).holds
    assert not within("it stays", [0.02, 0.03, 0.02, 0.03, 0.02], 0.01).holds
    assert not within("it stays", [-0.02, -0.03, -0.02, -0.03, -0.02], 0.01).holds


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_bad_input(values):
    with pytest.raises(ValueError, match="differences: got"):
        sign_flip_test(values)
