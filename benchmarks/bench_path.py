"""The distillation path on NumPy arrays, float64, against what one would write instead.

`POINTSxOUTPUTSxROUNDS`: the multipliers alone, after the eigendecomposition; each output has its own ε, and no round
collapses. Beside the native solver: its NumPy definition, the Newton loop that a NumPy user writes, and SciPy's brentq
column by column. `gram-POINTSxROUNDS`: `self_distill` from the Gram matrix on, eigendecomposition included, against
scikit-learn's KernelRidge chained round after round, its alpha found by brentq. Results are compared before they are
timed; the peak is NumPy's, beside the inputs.
"""

import functools
import os
import tracemalloc

import numpy as np
import pytest
from scipy.optimize import brentq
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel

from benchmarks.harness import DEVICE, Case, interleaved, measure
from sdfast.hilbert import secular, self_distill

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="these arrays are NumPy's: no figure of a GPU's")

MULTIPLIERS = {"1000x10x20": (1000, 10, 20), "10000x100x100": (10_000, 100, 100)}  # points, outputs, rounds
FROM_GRAM = {"gram-300x10": (300, 10), "gram-2000x10": (2000, 10)}  # points, rounds
LONG = ("10000x100x100", "gram-2000x10")  # whose peers take many seconds: one round a turn
TURNS = 3

PEERS = {"NumPy Newton loop": "NumPy Newton", "brentq": "brentq", "chained KernelRidge": "KernelRidge"}
TARGETS = {
    "10000x100x100": {"sdfast, 1 thread": (1 / 12, 1 / 100, None)},
    "gram-2000x10": {"sdfast": (None, None, 1 / 5)},
}


def numpy_newton(d, w, rounds):
    """Newton on 1/‖z/(1 + sd)‖ from s = 0, all columns at once: the loop a NumPy user writes."""
    found = []
    for _ in range(rounds):
        s = np.zeros(w.shape[1])
        for _ in range(100):
            t = 1 / (1 + d[:, None] * s)
            value = (w * t**2).sum(0)
            step = value * (np.sqrt(value) - 1) / (w * t**3 * d[:, None]).sum(0)
            s += step
            if np.all(np.abs(step) <= 1e-9 * s):
                break
        found.append(1 / s)
        w = w * (d[:, None] / (1 / s + d[:, None])) ** 2
    return np.array(found)


def brentq_column(d, w, rounds):
    """One column by SciPy's brentq on log c."""
    found = []
    for _ in range(rounds):

        def excess(log_c, w=w):
            c = np.exp(log_c)
            return (w * (c / (c + d)) ** 2).sum() - 1

        c = np.exp(brentq(excess, np.log(d.min()) - 40, np.log(d.max()) + 40, xtol=1e-12))
        found.append(c)
        w = w * (d / (c + d)) ** 2
    return np.array(found)


def chained_kernel_ridge(gram, y, epsilon, rounds):
    """scikit-learn's KernelRidge on its own predictions, alpha = K c by brentq."""
    points, found = len(gram), []
    for _ in range(rounds):

        def fit(log_c, y=y):
            return KernelRidge(alpha=points * np.exp(log_c), kernel="precomputed").fit(gram, y).predict(gram)

        log_c = brentq(lambda x, y=y, fit=fit: ((fit(x) - y) ** 2).sum() / points / epsilon - 1, -25, 5, xtol=1e-9)
        found.append(np.exp(log_c))
        y = fit(log_c)
    return np.array(found)


def native(d, w, rounds, threads):
    """The native solver on that many threads."""
    if reason := secular.why_not_native():
        raise RuntimeError(reason)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        return secular.solve_path(d, w, rounds, backend="native")[0]
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


SOLVERS = {
    "sdfast": lambda d, w, rounds: native(d, w, rounds, len(os.sched_getaffinity(0))),
    "sdfast, 1 thread": lambda d, w, rounds: native(d, w, rounds, 1),
    "sdfast's NumPy definition": lambda d, w, rounds: secular.solve_path(d, w, rounds, backend="array")[0],
    "NumPy Newton loop": numpy_newton,
    "brentq, column by column": lambda d, w, rounds: np.stack([brentq_column(d, z, rounds) for z in w.T], axis=1),
}
CHAINS = {
    "sdfast": lambda gram, y, epsilon, rounds: self_distill(gram, y, tolerance=epsilon, rounds=rounds).c,
    "KernelRidge and brentq": chained_kernel_ridge,
}


@functools.lru_cache(maxsize=1)
def multiplier_problem(group):
    """Eigenvalues with the decay of a Laplace kernel in two dimensions, weights, and the multipliers."""
    points, outputs, rounds = MULTIPLIERS[group]
    d = np.sort(np.arange(1, points + 1) ** -1.5) / 10
    w = np.random.default_rng(0).normal(size=(points, outputs)) ** 2
    w *= (1.5 * rounds) ** 2 / w.sum(0)  # r₀ = 1.5 rounds: no collapse within them
    return d, w, rounds, numpy_newton(d, w, rounds)


@functools.lru_cache(maxsize=1)
def gram_problem(group):
    """A Gram matrix, labels, their tolerance, and the multipliers that meet it."""
    points, rounds = FROM_GRAM[group]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(points, 10))
    y = np.sin(x[:, 0]) + 0.5 * rng.normal(size=points)
    gram, epsilon = rbf_kernel(x, gamma=0.1), (y**2).mean() / (1.5 * rounds) ** 2
    path = self_distill(gram, y, tolerance=epsilon, rounds=rounds)
    if len(path) < rounds:
        raise RuntimeError(f"{group}: the problem has {len(path)} fits: {path.infeasible}")
    np.testing.assert_allclose(path.training_error, epsilon, rtol=1e-9)
    return gram, y, epsilon, rounds, path.c


def ready(group, name, step, wanted):
    """The row, its result compared and its memory measured in one run."""
    tracemalloc.start()
    try:
        got = step()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(got, wanted, rtol=1e-4 if "brentq" in name else 1e-7)
    about = {"dtype": "float64", "peak_bytes": peak}
    return Case(step, floor_flops=floor_flops(group), rounds=1 if group in LONG else None, about=about)


def floor_flops(group):
    """One evaluation of every output's equation a round, five operations a point; from a Gram matrix n³ · 4 / 3."""
    if group in MULTIPLIERS:
        points, outputs, rounds = MULTIPLIERS[group]
        return 5 * points * outputs * rounds
    points, _ = FROM_GRAM[group]
    return 4 * points**3 // 3  # to tridiagonal form alone


def prepare_multipliers(group, name):
    """A row after the eigendecomposition."""
    d, w, rounds, wanted = multiplier_problem(group)
    return ready(group, name, lambda: SOLVERS[name](d, w, rounds), wanted)


def prepare_from_gram(group, name):
    """A row with it."""
    *problem, wanted = gram_problem(group)
    return ready(group, name, lambda: CHAINS[name](*problem), wanted)


@interleaved(MULTIPLIERS, SOLVERS, TURNS)
def test_multipliers(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare_multipliers)


@interleaved(FROM_GRAM, CHAINS, TURNS)
def test_from_gram(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare_from_gram)
