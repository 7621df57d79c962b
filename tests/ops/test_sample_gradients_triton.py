"""The Triton backend of the gradients per sample: the tests of every backend, in a process with Triton's interpreter.

The interpreter must be chosen before triton is imported, hence the process of its own. Unproved on a GPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["test_sample_gradients", "test_sample_gradients_normalization"])
def test_all_in_the_interpreter(name):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "triton"]
    done = subprocess.run(
        [*command, str(HERE / f"{name}.py")], env=environment, capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", output)
    assert done.returncode == 0, output
    assert passed is not None, output
    assert int(passed[1]) > 20, output
