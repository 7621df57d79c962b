"""The house keeps its order: what every operation has, and what no file may hold."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPERATIONS = sorted(path.parent.name for path in (ROOT / "sdfast" / "ops").glob("*/op.py"))


def test_there_are_operations():
    assert "self_distillation" in OPERATIONS


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_whole(operation):
    folder = ROOT / "sdfast" / "ops" / operation
    wanted = [folder / name for name in ("__init__.py", "op.py", "reference.py", "triton_impl.py", "README.md")]
    wanted += [ROOT / "csrc" / operation / name for name in ("kernel.h", "cpu.cpp")]
    wanted += [ROOT / "tests" / "ops" / f"test_{operation}.py", ROOT / "benchmarks" / f"bench_{operation}.py"]
    assert [str(path.relative_to(ROOT)) for path in wanted if not path.exists()] == []


def test_enumerations_of_python_and_cpp_agree():
    from sdfast.ops.self_distillation import description

    kernel = (ROOT / "csrc" / "self_distillation" / "kernel.h").read_text()
    for table in (description.LABEL_FUNCTIONS, description.LOSSES, description.MIXINGS, description.REDUCTIONS):
        for name, code in table.items():
            constant = "k" + "".join(part.capitalize() for part in name.split("_"))
            assert re.search(rf"\b{constant} = {code}\b", kernel), f"{constant} = {code} is not in kernel.h"
    assert f"kStateSize = {description.STATE_SIZE}" in kernel


def test_torch_is_included_in_one_place():
    including = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and "#include <torch" in path.read_text()
    ]
    assert including == ["csrc/common/stable.h"]
    assert not any("ATen" in line for line in (ROOT / "csrc/common/stable.h").read_text().splitlines() if "#" in line)


def test_files_stay_readable():
    sources = [*ROOT.glob("sdfast/**/*.py"), *ROOT.glob("csrc/*/*"), *ROOT.glob("benchmarks/*.py")]
    long = {str(path.relative_to(ROOT)): n for path in sources if (n := len(path.read_text().splitlines())) > 420}
    assert long == {}


def test_no_assert_on_a_users_input():
    asserting = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in ROOT.glob("sdfast/**/*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.match(r"\s*assert\b", line)
    ]
    assert asserting == []
