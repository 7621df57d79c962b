"""The multipliers against 40-digit arithmetic, at the ends of what can be asked."""

import subprocess
import sys

import mpmath
import numpy as np
import pytest
import torch

from sdfast.hilbert import secular

BACKENDS = [name for name in secular.BACKENDS if name == "array" or secular.why_not_native() is None]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def exact_multipliers(d, w, rounds):
    """c of each round in 40 digits, by bisection on log s."""
    with mpmath.workdps(40):
        d, w = [mpmath.mpf(float(x)) for x in d], [mpmath.mpf(float(x)) for x in w]
        found = []
        for _ in range(rounds):
            if sum(w) <= 1:
                break

            low, high = mpmath.mpf(-100), mpmath.mpf(150)
            while high - low > mpmath.mpf(10) ** -35:
                middle = (low + high) / 2
                s = mpmath.exp(middle)
                above = sum(x / (1 + s * e) ** 2 for x, e in zip(w, d, strict=True)) > 1
                low, high = (middle, high) if above else (low, middle)
            s = mpmath.exp(low)
            found.append(1 / s)
            w = [x * (s * e / (1 + s * e)) ** 2 for x, e in zip(w, d, strict=True)]
        return found


def condition(d, w, c):
    """|d log c / d log w|: what one rounding of the sum does to c."""
    t = c / (c + d)
    return 1 / (2 * (w * t**2 * d / (c + d)).sum())


# The label energy over Kε: near the collapse; ordinary; ε = 1e-14 of the energy. With κ up to 1e16.
@pytest.mark.parametrize("energy", [1 + 1e-9, 1.01, 30.0, 1e6, 1e14])
@pytest.mark.parametrize("decades", [1, 8, 16])
def test_against_40_digits(backend, energy, decades):
    rng = np.random.default_rng(torch.initial_seed())
    for _ in range(3):
        d = np.append(10 ** -rng.uniform(0, decades, 10), [1.0, 10.0**-decades])
        w = rng.normal(size=12) ** 2
        w *= energy / w.sum()
        exact = exact_multipliers(d, w, 3)
        c, fits = secular.solve_path(d, w[:, None], 3, backend=backend)
        assert int(fits[0]) == len(exact)
        accumulated = 0.0
        for t, value in enumerate(exact):
            accumulated += condition(d, w, float(value))
            error = abs(float((mpmath.mpf(float(c[t, 0])) - value) / value))
            assert error < 4e-15 * (4 + accumulated), (t, error, accumulated)
            w = w * (d / (float(value) + d)) ** 2


def test_zero_eigenvalues(backend):
    """Unreachable weight u < 1 lowers what is left for the others; u ≥ 1 has no root."""
    rng = np.random.default_rng(torch.initial_seed())
    d = np.append(0.0, 10 ** -rng.uniform(0, 5, 9))
    for unreachable in (0.0, 0.5, 1 - 1e-6):
        w = np.append(unreachable, rng.uniform(1, 3, 9))
        c, _ = secular.solve_path(d, w[:, None], 1, backend=backend)
        assert (w * (c[0, 0] / (c[0, 0] + d)) ** 2).sum() == pytest.approx(1, rel=1e-12)
    w = np.stack([np.append(1.5, np.ones(9)), np.append(0.1, np.ones(9))], axis=1)
    c, fits = secular.solve_path(d, w, 2, backend=backend)
    assert np.isnan(c[:, 0]).all()
    assert fits[0] == 0
    assert np.isfinite(c[0, 1])
    c, fits = secular.solve_path(np.zeros(3), np.full((3, 1), 2.0), 4, backend=backend)
    assert c.shape == (0, 1)
    assert not fits.any()


def test_a_collapsed_column_stays_beside_others(backend):
    d = np.array([1.0, 0.5, 0.1])
    w = np.array([[0.2, 9.0], [0.3, 9.0], [0.4, 9.0]])
    c, fits = secular.solve_path(d, w, 20, backend=backend)
    assert np.isinf(c[:, 0]).all()
    assert list(fits) == [0, len(c)]


def test_every_round_is_a_root(backend):
    rng = np.random.default_rng(torch.initial_seed())
    d = 10 ** -rng.uniform(0, 8, 300)
    w = rng.normal(size=(300, 4)) ** 2 * [[0.01, 0.1, 1.0, 50.0]]
    c, fits = secular.solve_path(d, w, 400, backend=backend)
    for t in range(len(c)):
        sums = (w / (1 + d[:, None] / c[t]) ** 2).sum(0)
        running = t < fits
        np.testing.assert_allclose(sums[running], 1, rtol=1e-12)
        w = np.where(running, w * (d[:, None] / (c[t] + d[:, None])) ** 2, 0)
    assert (w.sum(0) <= 1 + 1e-9).all() or len(c) == 400


def test_few_steps(monkeypatch):
    steps = []
    plain = secular._step
    monkeypatch.setattr(secular, "_step", lambda *arguments: steps.append(0) or plain(*arguments))
    rng = np.random.default_rng(torch.initial_seed())
    rounds = 0
    for _ in range(300):
        d = 10 ** -rng.uniform(0, rng.uniform(0, 12), 50)
        w = rng.normal(size=(50, 1)) ** 2
        w *= rng.uniform(1.1, 2000) / w.sum()
        rounds += int(secular.solve_path(d, w, 10, backend="array")[1].sum())
    assert len(steps) / rounds < 8  # those at 0 and at the last root counted


def test_tiny_and_huge_units(backend):
    rng = np.random.default_rng(torch.initial_seed())
    d, w = 10 ** -rng.uniform(0, 4, 20), rng.uniform(1, 9, (20, 1))
    wanted, _ = secular.solve_path(d, w, 5, backend=backend)
    for unit in (1e-200, 1e200):
        c, _ = secular.solve_path(d * unit, w, 5, backend=backend)
        np.testing.assert_allclose(c / unit, wanted, rtol=1e-12)


def test_long_paths_are_those_of_the_definition():
    """Where the native solver foresees the next root: spectra that decay, jump and repeat, to the collapse."""
    if secular.why_not_native():
        pytest.skip(secular.why_not_native())
    rng = np.random.default_rng(torch.initial_seed())
    for spectrum in (
        np.sort(np.arange(1, 301) ** -1.5),
        10 ** -rng.uniform(0, 12, 300),  # in no order
        np.repeat(10.0 ** -np.arange(0, 9, 3), 7),
        np.ones(5),
        np.append(np.zeros(9), rng.uniform(0.1, 1, 40)),
    ):
        w = rng.normal(size=(len(spectrum), 5)) ** 2
        w *= np.array([3.0, 40, 400, 1e3, 2e4]) / w.sum(0)
        w *= np.where(spectrum > 0, 1, 1e-5)[:, None]
        wanted, fits = secular.solve_path(spectrum, w, 150, backend="array")
        got, native_fits = secular.solve_path(spectrum, w, 150, backend="native")
        np.testing.assert_array_equal(native_fits, fits)
        np.testing.assert_allclose(got, wanted, rtol=1e-10)


def test_ties_collapse(backend):
    """On a flat spectrum √(Σ w) falls by 1 a round, from r₀ to exactly 1: r₀ − 1 fits, however rounding falls."""
    rng = np.random.default_rng(torch.initial_seed())
    for r0 in (2, 3, *rng.integers(4, 150, 12)):
        for points, columns in ((1, 1), (7, 3), (200, 16)):  # the last are many enough to be folded
            w = rng.normal(size=(points, columns)) ** 2
            w *= r0**2 / w.sum(0)
            c, fits = secular.solve_path(np.full(points, 10 ** rng.uniform(-3, 3)), w, 1000, backend=backend)
            assert (fits == r0 - 1).all(), (r0, points, fits)
            assert c.shape == (r0 - 1, columns)


def test_a_first_energy_just_above_the_threshold_is_fitted(backend):
    """What rounds may add to the energy is no excuse before the first."""
    d = np.array([1.0, 0.5, 0.25, 0.125])
    for excess, wanted in ((0.0, 0), (2.0**-50, 0), (2.0**-48, 1), (1e-9, 1)):
        c, fits = secular.solve_path(d, np.full((4, 1), (1 + excess) / 4), 9, backend=backend)
        assert list(fits) == [wanted]
        assert len(c) == wanted


def exact_by_newton(d, w, c):
    """c of each round in 40 digits, from approximate ones, and what rounding does to each: accumulated condition."""
    with mpmath.workdps(40):
        d, w = [mpmath.mpf(float(x)) for x in d], [mpmath.mpf(float(x)) for x in w]
        accumulated = mpmath.mpf(0)
        for start in c:
            s = 1 / mpmath.mpf(float(start))
            for _ in range(3):
                t = [1 / (1 + s * e) for e in d]
                value = sum(x * y**2 for x, y in zip(w, t, strict=True))
                slope = sum(x * y**3 * e for x, y, e in zip(w, t, d, strict=True))
                step = value * (mpmath.sqrt(value) - 1) / slope
                s += step
            assert abs(step) < s * mpmath.mpf(10) ** -35
            accumulated += 1 / (2 * s * slope)
            yield 1 / s, float(accumulated)
            w = [x * (s * e / (1 + s * e)) ** 2 for x, e in zip(w, d, strict=True)]


@pytest.mark.parametrize("spectrum", ["one octave", "six octaves", "decay"])
def test_folded_columns_against_40_digits(spectrum):
    """Many eigenvalues in few octaves, columns and rounds enough: the native solver works on 32 nodes an octave."""
    if secular.why_not_native():
        pytest.skip(secular.why_not_native())
    rng = np.random.default_rng(torch.initial_seed())
    d = {
        "one octave": 2 ** rng.uniform(0, 1, 200),
        "six octaves": 2 ** rng.uniform(0, 6, 800),
        "decay": np.arange(1, 801) ** -2.0,
    }[spectrum]
    d = np.sort(d) / d.max()
    points = len(d)
    w = rng.normal(size=(points, 16)) ** 2
    w *= 10 ** rng.uniform(2.5, 6.7, 16) / w.sum(0)
    folded = secular._native.solve_path(d, np.ascontiguousarray(w.T), 16, 1)[2]
    assert folded > 0
    c, fits = secular.solve_path(d, w, 16, backend="native")
    assert (fits == 16).all()
    for column in (0, 15):
        for t, (exact, accumulated) in enumerate(exact_by_newton(d, w[:, column], c[:, column])):
            error = abs(float((mpmath.mpf(float(c[t, column])) - exact) / exact))
            assert error < 4e-15 * (4 + accumulated), (t, error, accumulated)


def test_folded_columns_are_those_of_the_definition():
    """To the collapse, with spectra that fold well, badly (all at an octave's end, where rounding grows) and not."""
    if secular.why_not_native():
        pytest.skip(secular.why_not_native())
    rng = np.random.default_rng(torch.initial_seed())
    energies = (np.geomspace(3, 100, 20).round() + 0.5) ** 2  # far from ties, where c is all rounding
    folded = {}
    for name, spectrum in {
        "decay": np.sort(np.arange(1, 1001) ** -1.5),
        "wide": np.sort(10 ** -rng.uniform(0, 2, 500)),
        "in no order": 10 ** -rng.uniform(0, 2, 500),
        "zeros": np.append(np.zeros(20), np.sort(rng.uniform(0.1, 1, 300))),
        "an octave's start": np.append(0.5 * (1 + 0.2 * np.sort(rng.uniform(size=300)) ** 9), 1.0),
        "one spot": np.sort(1 + 1e-4 * rng.uniform(size=300)),
        "no octave of many": 2.0 ** -np.arange(200),
    }.items():
        w = rng.normal(size=(len(spectrum), 20)) ** 2
        w *= energies / w.sum(0)
        w *= np.where(spectrum > 0, 1, 1e-6)[:, None]
        folded[name] = secular._native.solve_path(spectrum / spectrum.max(), np.ascontiguousarray(w.T), 150, 1)[2]
        wanted, fits = secular.solve_path(spectrum, w, 150, backend="array")
        got, native_fits = secular.solve_path(spectrum, w, 150, backend="native")
        np.testing.assert_array_equal(native_fits, fits)
        np.testing.assert_allclose(got, wanted, rtol=1e-10)
    assert folded["decay"] > 0
    assert folded["an octave's start"] < (energies > 17**2).sum()  # the others were solved point by point after all
    assert folded["in no order"] == folded["one spot"] == folded["no octave of many"] == 0


def test_spectra_beyond_what_two_roots_multiply_to(backend):
    d = 10.0 ** -np.arange(0, 300, 30)
    w = np.full((10, 1), 4.0)
    c, fits = secular.solve_path(d, w, 25, backend=backend)
    for t in range(int(fits[0])):
        assert (w[:, 0] * (c[t, 0] / (c[t, 0] + d)) ** 2).sum() == pytest.approx(1, rel=1e-12)
        w = w * (d / (c[t, 0] + d))[:, None] ** 2
    assert c[0, 0] < 1e-200


def test_an_interrupt_ends_the_work():
    """Ctrl-C while the native threads run is heard at the next column."""
    if secular.why_not_native():
        pytest.skip(secular.why_not_native())
    script = (
        "import os, signal, threading, numpy as np\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's children ignore it\n"
        "from sdfast.hilbert import secular\n"
        "w = np.ones((2000, 4000)) * 1e4\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        "    secular.solve_path(np.linspace(1e-6, 1, 2000), w, 10_000)\n"
        "except KeyboardInterrupt:\n"
        "    print('heard')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "heard\n", done.stderr
