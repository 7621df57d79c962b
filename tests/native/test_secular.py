"""The native secular solver against the definition: the CPU library, and the CUDA kernel on CPU threads or a GPU."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sdfast.hilbert import secular

ROOT = Path(__file__).parent.parent.parent
HEADER = ROOT / "csrc" / "secular" / "secular.h"


def problem(rng, points, columns, decades=6.0):
    d = np.sort(10 ** rng.uniform(-decades, 0, points)) * 10 ** rng.uniform(-3, 3)
    w = rng.normal(size=(points, columns)) ** 2
    return d, w * rng.uniform(1.01, 400, columns) / w.sum(0)


# 1 and 3: less than a vector; 8: whole strides; 1003: many strides and a rest.
@pytest.mark.parametrize("points", [1, 3, 8, 1003])
@pytest.mark.parametrize("threads", ["1", "3"])
def test_cpu_against_the_definition(points, threads, monkeypatch):
    if secular.why_not_native():
        pytest.skip(secular.why_not_native())
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(secular, "_ENTRIES_PER_THREAD", 1)
    rng = np.random.default_rng(torch.initial_seed())
    for _ in range(20):
        d, w = problem(rng, points, 5)
        d[rng.random(points) < 0.1] = 0
        d[-1] = 1.0
        before = d.copy(), w.copy()
        c, fits = secular.solve_path(d, w, 60, backend="native")
        wanted, wanted_fits = secular.solve_path(d, w, 60, backend="array")
        np.testing.assert_array_equal(fits, wanted_fits)
        np.testing.assert_allclose(c, wanted, rtol=1e-9)
        np.testing.assert_array_equal(d, before[0])
        np.testing.assert_array_equal(w, before[1])


def test_results_do_not_depend_on_the_threads(monkeypatch):
    if secular.why_not_native():
        pytest.skip(secular.why_not_native())
    rng = np.random.default_rng(torch.initial_seed())
    spectrum, plain = problem(rng, 500, 7, decades=1)
    folded = rng.normal(size=(500, 20)) ** 2
    folded *= 400 / folded.sum(0)
    assert secular._native.solve_path(spectrum / spectrum[-1], np.ascontiguousarray(folded.T), 40, 1)[2] > 0
    for w in (plain, folded):
        check_threads(spectrum, w, monkeypatch)


def check_threads(d, w, monkeypatch):
    results = []
    monkeypatch.setattr(secular, "_ENTRIES_PER_THREAD", 1)
    for threads in ("1", "2", "7"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        results.append(secular.solve_path(d, w, 40, backend="native")[0])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_bad_arguments_of_the_library():
    if secular.why_not_native():
        pytest.skip(secular.why_not_native())
    from sdfast import _secular

    with pytest.raises(ValueError, match="secular: wanted d"):
        _secular.solve_path(np.ones(3), np.ones((2, 4)), 1, 1)
    with pytest.raises(TypeError):
        _secular.solve_path(np.ones(3, np.float32), np.ones((2, 3), np.float32), 1, 1)


def test_without_the_library_the_definition_serves():
    code = (
        "import numpy as np; from sdfast.hilbert import secular, self_distill\n"
        "assert secular.why_not_native() == 'SDFAST_NATIVE=0 is set'\n"
        "print(self_distill(np.diag([1.0, 2, 3]), np.array([1.0, 2, 3]), tolerance=0.1).c.tolist())\n"
        "try: secular.solve_path(np.ones(2), np.ones((2, 1)), 1, backend='native')\n"
        "except NotImplementedError as error: print(error)"
    )
    environment = os.environ | {"SDFAST_NATIVE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "backend: 'native' is not here: SDFAST_NATIVE=0 is set" in done.stdout


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    library = tmp_path_factory.mktemp("secular") / "secular.so"
    source = Path(__file__).parent / "secular_on_cpu.cpp"
    command = ["g++", "-std=c++20", "-O2", "-fPIC", "-shared", "-pthread", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_cuda_kernel_on_the_cpu(emulated, threads):
    rng = np.random.default_rng(torch.initial_seed())
    for points in (1, 5, 40):
        d, w = problem(rng, points, 3)
        d = d / d.max()
        wanted, wanted_fits = secular.solve_path(d, w, 12, backend="array")
        consumed = np.ascontiguousarray(w.T)
        c, fits = np.full((3, 12), np.inf), np.full(3, -1, dtype=np.int64)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (d, consumed, c, fits)]
        sizes = [ctypes.c_longlong(size) for size in (points, 3, 12)]
        emulated.run(pointers[0], pointers[1], *sizes, pointers[2], pointers[3], ctypes.c_int(threads))
        np.testing.assert_array_equal(fits, wanted_fits)
        np.testing.assert_allclose(c.T[: len(wanted)], wanted, rtol=1e-9)


def test_ties_collapse_in_the_cuda_kernel(emulated):
    """√(Σ w) from r₀ down by 1 a round, to exactly 1."""
    rng = np.random.default_rng(torch.initial_seed())
    for r0 in (2, 3, 7, 12, 29):
        d, w = np.ones(6), rng.normal(size=(3, 6)) ** 2
        w *= r0**2 / w.sum(1, keepdims=True)
        c, fits = np.full((3, 40), np.inf), np.full(3, -1, dtype=np.int64)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (d, w, c, fits)]
        sizes = [ctypes.c_longlong(size) for size in (6, 3, 40)]
        emulated.run(pointers[0], pointers[1], *sizes, pointers[2], pointers[3], ctypes.c_int(4))
        assert (fits == r0 - 1).all(), (r0, fits)


def test_the_header_is_one_and_includes_nothing():
    assert (ROOT / "sdfast" / "hilbert" / "secular.h").read_text() == HEADER.read_text()
    assert "#include" not in HEADER.read_text()


def test_the_header_compiles_for_cuda(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    source = tmp_path / "secular.cu"
    source.write_text(f'#include "{HEADER}"\n')
    command = ["nvcc", "-c", str(source), "-o", str(tmp_path / "secular.o"), "-std=c++17"]
    subprocess.run([*command, "-gencode", "arch=compute_80,code=sm_80"], check=True)


@pytest.mark.cuda
def test_cuda_on_a_gpu():
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(torch.initial_seed())
    for points in (1, 100, 3000):
        d, w = problem(rng, points, 6)
        wanted, wanted_fits = secular.solve_path(d, w, 50, backend="array")
        for backend in ("native", "array"):
            c, fits = secular.solve_path(cupy.asarray(d), cupy.asarray(w), 50, backend=backend)
            np.testing.assert_array_equal(fits.get(), wanted_fits)
            np.testing.assert_allclose(c.get(), wanted, rtol=1e-9)
