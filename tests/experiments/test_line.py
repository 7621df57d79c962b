"""Figure 2 of Mobahi et al.: which draws cannot be fitted, and the fits against ridge regression."""

import numpy as np
import pytest
from scipy.optimize import brentq

from sdfast.experiments.mobahi2020_figure2 import Settings, _rounds
from sdfast.hilbert import kernels

SETTINGS = Settings()


def test_a_draw_is_infeasible_where_its_ends_are_out_of_reach():
    """The kernel vanishes at 0 and 1: labels there cost y₁² + y₁₁², which must stay below K ε."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        noise = 0.5 * rng.normal(size=11)
        for labels, end in (("sine", 0.0), ("line", 1.0)):
            out_of_reach = noise[0] ** 2 + (noise[-1] + end) ** 2 > 11 * 0.04
            found = _rounds(SETTINGS, labels, "ends", noise)
            assert ("infeasible" in found) == out_of_reach
            seen.add(out_of_reach)
            assert "infeasible" not in _rounds(SETTINGS, labels, "inside", noise)
    assert seen == {True, False}


def test_the_errors_are_those_of_ridge_regression_round_after_round():
    noise = 0.5 * np.random.default_rng(3).normal(size=11)
    found = _rounds(SETTINGS, "sine", "inside", noise)
    x, at = np.arange(1, 12) / 12, np.linspace(0, 1, 201)
    gram, cross = kernels.gram("spline", x[:, None]) / 11, kernels.gram("spline", at[:, None], x[:, None]) / 11
    y, errors = np.sin(2 * np.pi * x) + noise, []
    while (y**2).mean() > 0.04:

        def residual(log_c, y=y):
            c = np.exp(log_c)
            return ((c * np.linalg.solve(c * np.eye(11) + gram, y)) ** 2).mean() - 0.04

        weights = np.linalg.solve(np.exp(brentq(residual, -40, 40)) * np.eye(11) + gram, y)
        errors.append(((cross @ weights - np.sin(2 * np.pi * at)) ** 2).mean())
        y = gram @ weights
    assert found["errors"] == pytest.approx(errors, rel=1e-5)
    assert found["zero"] == pytest.approx(0.5, rel=1e-2)
    assert found["contrast"] == sorted(found["contrast"])
