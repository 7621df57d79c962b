"""The CPU vector maths against NumPy in float64, compiled for each instruction set this machine runs."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

SOURCE = Path(__file__).parent / "vec_probe.cpp"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-Wno-psabi"]


def cpu_flags():
    return set(Path("/proc/cpuinfo").read_text().split())


# What the library's clones are compiled for; the machine must run it.
ARCHITECTURES = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def probe(request, tmp_path_factory):
    if ARCHITECTURES[request.param] not in cpu_flags():
        pytest.skip(f"this processor does not run {request.param}")
    library = tmp_path_factory.mktemp("probe") / "probe.so"
    subprocess.run(["g++", *FLAGS, f"-march={request.param}", SOURCE, "-o", library], check=True)
    library = ctypes.CDLL(str(library))
    library.probe_sum.restype = library.probe_max.restype = ctypes.c_float
    return library


def apply(function, x):
    x = np.ascontiguousarray(x, np.float32)
    padded = np.resize(x, -(-len(x) // 16) * 16)
    y = np.full_like(padded, np.nan)
    pointer = ctypes.POINTER(ctypes.c_float)
    function(padded.ctypes.data_as(pointer), y.ctypes.data_as(pointer), ctypes.c_long(len(padded)))
    return y[: len(x)]


def ulps(got, exact):
    return np.abs(got.astype(np.float64) - exact) / np.spacing(exact.astype(np.float32)).astype(np.float64)


def test_exp(probe):
    x = -np.float32(
        np.concatenate(
            [np.linspace(0, 87.3, 400_003), np.random.default_rng(torch.initial_seed()).exponential(3, 100_000)]
        )
    )
    x = x[x > -87.33]
    assert ulps(apply(probe.probe_exp, x), np.exp(x.astype(np.float64))).max() < 1.1


def test_exp_at_its_ends(probe):
    x = [0.0, -0.0, -87.34, -1e4, -np.inf, np.nan, -1e-30]
    np.testing.assert_array_equal(apply(probe.probe_exp, x), np.float32([1, 1, 0, 0, 0, np.nan, 1]))


def test_log(probe):
    tiny = np.finfo(np.float32).tiny
    x = np.float32(np.concatenate([np.geomspace(tiny, 1, 300_001), np.linspace(0.5, 2, 100_001), [3e38, 1e10]]))
    x = x[x >= tiny]
    exact = np.log(x.astype(np.float64))
    near_one = np.abs(exact) < 0.3
    got = apply(probe.probe_log, x)
    assert ulps(got[~near_one], exact[~near_one]).max() < 2.5
    assert np.abs(got - exact)[near_one].max() < 7.5e-8  # 2.5 ulp at 0.3


def test_log_at_its_ends(probe):
    x = [0.0, -0.0, 1e-40, 1.0, -1.0, np.nan, np.inf]
    got = apply(probe.probe_log, x)
    np.testing.assert_array_equal(got[:6], np.float32([0, 0, 0, 0, np.nan, np.nan]))


def test_reductions(probe):
    x = np.random.default_rng(torch.initial_seed()).normal(size=16).astype(np.float32)
    pointer = x.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert probe.probe_max(pointer) == x[:8].max()
    assert probe.probe_sum(pointer) == pytest.approx(x[:8].astype(np.float64).sum(), abs=1e-5)
