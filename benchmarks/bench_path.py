"""The distillation path against what one would write instead: ``python -m benchmarks.bench_path [--record FILE]``.

After the eigendecomposition: all rounds of all outputs, each with its own ε, by the native solver, by its NumPy
definition, by the Newton loop that a NumPy user writes, and by SciPy's brentq column by column. With it: `self_distill`
against scikit-learn's KernelRidge chained round after round, its alpha found by brentq. Results are compared before
anything is timed.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel

from benchmarks.environment import environment
from sdfast import _files
from sdfast.hilbert import secular, self_distill


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


def seconds(function, repeats):
    """The median of a few runs after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def native(d, w, rounds, threads):
    """The native solver on that many threads."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        return secular.solve_path(d, w, rounds, backend="native")[0]
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


def after_eigh(points, outputs, rounds, repeats):
    """Rows of (name, seconds) for the multipliers alone."""
    rng = np.random.default_rng(0)
    d = np.sort(np.arange(1, points + 1) ** -1.5) / 10  # the decay of a Laplace kernel in two dimensions
    w = rng.normal(size=(points, outputs)) ** 2
    w *= (1.5 * rounds) ** 2 / w.sum(0)  # r₀ = 1.5 rounds: no collapse within them
    threads = len(os.sched_getaffinity(0))
    wanted = numpy_newton(d, w, rounds)
    for got in (
        native(d, w, rounds, 1),
        native(d, w, rounds, threads),
        secular.solve_path(d, w, rounds, backend="array")[0],
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-7)
    np.testing.assert_allclose(brentq_column(d, w[:, 0], rounds), wanted[:, 0], rtol=1e-6)
    rows = {
        "sdfast, 1 thread": seconds(lambda: native(d, w, rounds, 1), repeats),
        f"sdfast, {threads} threads": seconds(lambda: native(d, w, rounds, threads), repeats),
        "sdfast's NumPy definition": seconds(lambda: secular.solve_path(d, w, rounds, backend="array"), 1),
        "NumPy Newton loop": seconds(lambda: numpy_newton(d, w, rounds), 1),
        "brentq, one column × outputs": outputs * seconds(lambda: brentq_column(d, w[:, 0], rounds), 1),
    }
    group = f"after eigh: {points} points, {outputs} outputs, {rounds} rounds"
    return [{"group": group, "name": name, "seconds": value} for name, value in rows.items()]


def with_eigh(points, rounds, repeats):
    """Rows of (name, seconds) from the Gram matrix on."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(points, 10))
    y = np.sin(x[:, 0]) + 0.5 * rng.normal(size=points)
    gram = rbf_kernel(x, gamma=0.1)
    epsilon = (y**2).mean() / (1.5 * rounds) ** 2
    path = self_distill(gram, y, tolerance=epsilon, rounds=rounds)
    if path.infeasible or len(path) < rounds:
        raise SystemExit(f"bench_path: the problem has {len(path)} of {rounds} rounds: {path.infeasible}")
    np.testing.assert_allclose(chained_kernel_ridge(gram, y, epsilon, rounds), path.c, rtol=1e-4)
    rows = {
        "sdfast": seconds(lambda: self_distill(gram, y, tolerance=epsilon, rounds=rounds).predictions, repeats),
        "KernelRidge and brentq": seconds(lambda: chained_kernel_ridge(gram, y, epsilon, rounds), 1),
    }
    group = f"with eigh: {points} points, {rounds} rounds"
    return [{"group": group, "name": name, "seconds": value} for name, value in rows.items()]


def main():
    """Prints the tables, and records the run where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--outputs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--gram-points", type=int, default=2_000)
    parser.add_argument("--gram-rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", type=Path, help="write the run here as JSON")
    arguments = parser.parse_args()
    if reason := secular.why_not_native():
        raise SystemExit(f"bench_path: {reason}")
    rows = after_eigh(arguments.points, arguments.outputs, arguments.rounds, arguments.repeats)
    rows += with_eigh(arguments.gram_points, arguments.gram_rounds, arguments.repeats)
    group = ""
    for row in rows:
        if row["group"] != group:
            group, first = row["group"], row["seconds"]
            print(f"\n{group}")
        print(f"  {row['name']:32} {row['seconds']:12.4f} s  {row['seconds'] / first:8.1f}x")
    if arguments.record:
        run = {"environment": environment("python -m benchmarks.bench_path"), "rows": rows}
        _files.write_text(arguments.record, json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
