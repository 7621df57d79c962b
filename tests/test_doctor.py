"""sdfast doctor is right with the native library, without it, with a broken one, and with it switched off."""

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
import torch

import sdfast
from sdfast import _native, doctor
from sdfast.hilbert import secular

PACKAGE = Path(sdfast.__file__).parent


def doctor_of(folder, *words, **environment):
    """(exit code, stdout) of the doctor of the package in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", "sdfast", "doctor", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        timeout=120,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.fixture
def without_library(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "sdfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_without_the_library_the_reference_serves_and_nothing_is_broken(without_library):
    code, out = doctor_of(without_library, "--json")
    findings = json.loads(out)
    on_cpu = findings["operations"]["self_distillation_loss"]["cpu"]
    assert code == 0
    assert findings["broken"] == []
    assert on_cpu["automatic"] == "reference"
    assert on_cpu["backends"]["reference"] == "works"
    assert on_cpu["backends"]["cpu"].startswith("no: _C_cpu.so is not installed")
    assert findings["libraries"][0]["loaded"] is False
    assert any("C++17 compiler" in advice for advice in findings["advice"])
    solver = findings["secular_solver"]
    assert (solver["loaded"], solver["broken"]) == (False, False)
    assert solver["reason"].startswith(f"sdfast._secular is not installed for this Python, {solver['python']}: ")
    assert "fast rounds on kernels: install sdfast again by this Python" in " ".join(findings["advice"])


def test_the_secular_solver_of_another_python_is_passed_over(without_library):
    (without_library / "sdfast" / "_secular.cpython-399-x86_64-linux-gnu.so").write_bytes(b"for another Python")
    code, out = doctor_of(without_library)
    assert code == 0
    assert "secular solver of sdfast.hilbert: NumPy: sdfast._secular is not installed for this Python" in out
    assert "there are those of cpython-399-x86_64-linux-gnu" in out


def test_a_library_that_cannot_load_is_broken_and_named(without_library):
    (without_library / "sdfast" / "_C_cpu.so").write_bytes(b"this is no library")
    code, out = doctor_of(without_library)
    assert code == 1
    assert "BROKEN: _C_cpu.so cannot be loaded: " in out
    assert "self_distillation_loss on cpu takes: reference" in out
    assert "all that is installed works" not in out


def test_a_secular_solver_that_cannot_load_is_broken_and_named(without_library):
    (without_library / "sdfast" / f"_secular{EXTENSION_SUFFIXES[0]}").write_bytes(b"this is no library")
    code, out = doctor_of(without_library)
    assert code == 1
    assert "BROKEN: sdfast._secular cannot be loaded: " in out
    assert "secular solver of sdfast.hilbert: NumPy: sdfast._secular cannot be loaded" in out


def test_a_library_switched_off_is_not_broken():
    code, out = doctor_of(PACKAGE.parent, "--json", SDFAST_NATIVE="0")
    findings = json.loads(out)
    assert code == 0
    assert findings["libraries"][0]["reason"] == "SDFAST_NATIVE=0 is set"
    assert findings["advice"][0] == "fast CPU kernels: unset SDFAST_NATIVE"
    assert findings["secular_solver"]["reason"] == "SDFAST_NATIVE=0 is set"
    assert not any("rounds on kernels" in advice for advice in findings["advice"])


@pytest.mark.skipif(not _native.CPU.loaded, reason="the native CPU library is not built here")
def test_with_the_library_it_serves():
    findings = doctor.examine()
    on_cpu = findings["operations"]["self_distillation_loss"]["cpu"]
    assert on_cpu["automatic"] == "cpu"
    assert on_cpu["backends"]["cpu"] == "works"
    assert on_cpu["backends"]["cuda"] == "no: serves CUDA tensors, not cpu"
    assert findings["libraries"][0] == {"name": "_C_cpu.so", "loaded": True, "reason": None, "broken": False}
    assert not any("CPU kernels" in advice for advice in findings["advice"])


@pytest.mark.skipif(secular.why_not_native() is not None, reason="the native solver is not built for this Python")
def test_the_secular_solver_is_tried(monkeypatch):
    findings = doctor.examine()
    tag = sys.implementation.cache_tag
    assert findings["secular_solver"] == {
        "name": "_secular", "python": tag, "loaded": True, "reason": None, "broken": False,
    }  # fmt: skip
    assert f"secular solver of sdfast.hilbert: native, for this Python, {tag}" in doctor.describe(findings)

    class Wrong:
        def solve_path(self, d, w, rounds, threads):
            return np.ones((len(w), rounds)), np.full(len(w), rounds), 0

    monkeypatch.setattr(secular, "_native", Wrong())
    findings = doctor.examine()
    assert findings["broken"] == ["sdfast._secular gives other multipliers than its NumPy definition"]


def test_the_versions_are_those_imported(capsys):
    findings = doctor.examine()
    assert findings["versions"]["torch"] == torch.__version__
    assert findings["versions"]["sdfast"] == sdfast.__version__
    assert findings["devices"][0]["name"] == "cpu"
    text = doctor.describe(findings)
    assert f"torch {torch.__version__}" in text
    assert "native libraries" in text


def test_a_backend_that_gives_other_numbers_or_fails_is_broken(monkeypatch):
    def wrong(logits, labels, alpha, *, backend):
        return logits.sum() if backend == "reference" else 2 * logits.sum()

    monkeypatch.setattr(doctor, "self_distillation_loss", wrong)
    monkeypatch.setattr(doctor._dispatch, "why_not", lambda backend, device_type: None)
    findings = doctor.examine()
    assert "self_distillation_loss on cpu, backend cpu: fails: its gradient is 1.0e+00 off" in findings["broken"][0]

    def failing(logits, labels, alpha, *, backend):
        if backend == "triton":
            raise RuntimeError("no such\nkernel")
        return logits.sum()

    monkeypatch.setattr(doctor, "self_distillation_loss", failing)
    assert doctor.examine()["broken"] == ["self_distillation_loss on cpu, backend triton: fails: no such kernel"]
