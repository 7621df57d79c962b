"""The documents as a reader runs them: every Python block, and every command of the README in CI as it is printed."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("sdfast/ops/*/README.md"))]
BLOCKS = [
    (page.relative_to(ROOT).as_posix(), number, block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), 1)
]


def test_the_readme_has_code():
    assert any(page == "README.md" for page, _, _ in BLOCKS)


@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=[f"{page}-{number}" for page, number, _ in BLOCKS])
def test_python_blocks_run(page, number, block, tmp_path):
    for package in re.findall(r"^(?:import|from) (transformers|lightning)\b", block, re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install '.[integrations]'")
    script = tmp_path / "block.py"
    script.write_text(block)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *(launcher if block.startswith("# torchrun --nproc-per-node 2 ") else []), script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{page}, block {number}:\n{done.stderr}"


def test_readme_commands_are_those_of_ci():
    """The `make` commands that the README shows are run by .ci/run in these very words."""
    readme = (ROOT / "README.md").read_text()
    shown = re.findall(
        r"^(?:    )?(make (?:demo|test))\b", "\n".join(re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)), re.M
    )
    ci = (ROOT / ".ci" / "run").read_text()
    assert {"make demo", "make test"} <= set(shown)
    assert all(f"step {command}\n" in ci for command in shown)


def test_readme_calls_of_sdfast_run(tmp_path):
    """Beside `make`, the README shows calls of the command line; `pip install` is run by .ci/run."""
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    calls = re.findall(r"^sdfast .*$", shell, re.MULTILINE)
    assert calls
    for call in calls:
        command = [sys.executable, "-m", *shlex.split(call)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{call}:\n{done.stderr}"
    assert 'step pip install ".[plot]"' in (ROOT / ".ci" / "run").read_text()
    assert 'pip install ".[plot]"\n' in shell


def test_links_lead_somewhere():
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES + [ROOT / "CONTRIBUTING.md"]
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []
