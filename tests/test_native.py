"""The native libraries: what they link, and what happens when one is missing, broken or switched off."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sdfast
from sdfast import _dispatch, _native

PACKAGE = Path(sdfast.__path__[0])
CALL = (
    "import sdfast, torch; from sdfast import _native; "
    "print(sdfast.self_distillation_loss(torch.zeros(2, 3), torch.tensor([0, 1]), 0.5).item(), _native.CPU.reason)"
)


def run(code, folder, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def copied(tmp_path):
    """A copy of the package that may be broken."""
    shutil.copytree(PACKAGE, tmp_path / "sdfast", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_cpu_library_is_loaded_here():
    assert _native.CPU.loaded, _native.CPU.reason
    assert _dispatch.automatic("cpu") == "cpu"


def test_without_the_library_the_reference_runs_and_says_so(copied):
    (copied / "sdfast" / "_C_cpu.so").unlink()
    done = run(CALL, copied)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1.0986")
    assert "_C_cpu.so is not installed: build it with a C++ compiler" in done.stdout
    assert done.stderr.count("runs its slow plain PyTorch reference on cpu") == 1


def test_a_broken_library_is_a_reason_not_an_import_error(copied):
    (copied / "sdfast" / "_C_cpu.so").write_bytes(b"not a library")
    done = run(CALL, copied)
    assert done.returncode == 0, done.stderr
    assert "_C_cpu.so cannot be loaded" in done.stdout
    explicit = run(CALL.replace("0.5)", "0.5, backend='cpu')"), copied)
    assert "NotImplementedError: backend='cpu': _C_cpu.so cannot be loaded" in explicit.stderr


def test_native_code_can_be_switched_off(copied):
    done = run(CALL, copied, SDFAST_NATIVE="0")
    assert done.stdout.split(maxsplit=1)[1].strip() == "SDFAST_NATIVE=0 is set"
    assert "reference" not in done.stderr


def test_the_library_keeps_to_the_stable_abi():
    """No ATen, c10 or Python symbol: that is what lets one build serve every torch and Python."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", PACKAGE / "_C_cpu.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [line.split(maxsplit=1)[1] for line in symbols.splitlines() if line.strip()]
    assert names
    assert [name for name in names if name.startswith(("at::", "c10::", "Py", "torch::"))] == []


def test_importing_builds_nothing_and_needs_no_torch(tmp_path):
    """The package itself imports before torch does: the array wing must work where there is no torch."""
    done = run("import sys, sdfast; print('torch' in sys.modules, 'triton' in sys.modules)", PACKAGE.parent)
    assert done.stdout.split() == ["False", "False"], done.stderr
    used = run(
        "import sys, torch, sdfast; sdfast.self_distillation_loss; print('triton' in sys.modules)", PACKAGE.parent
    )
    assert used.stdout.split() == ["False"], used.stderr
