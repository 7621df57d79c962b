"""The Triton backend of the prediction bank, in Triton's interpreter: the tests of all backends, and its own.

The interpreter must be chosen before triton is imported, so those tests run again in a process of their own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import INTERPRETED, of_triton

from sdfast import PredictionBank, elr_loss, self_distillation_loss

FILES = (
    "test_prediction_bank.py", "test_prediction_bank_contract.py", "test_prediction_bank_options.py",
    "test_prediction_bank_compiled.py", "test_prediction_bank_numbers.py", "test_prediction_bank_triton.py",
)  # fmt: skip


@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="this process runs the tests itself")
@pytest.mark.parametrize("file", FILES)
def test_all_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "triton",
               str(Path(__file__).parent / file)]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", output)
    assert done.returncode == 0, output
    assert passed is not None, output
    assert int(passed[1]) > 0, output


@of_triton
def test_an_index_out_of_range_poisons_its_row_alone(backend):
    bank = PredictionBank(6, 5, dtype=torch.float64)
    logits, labels = torch.randn(5, 5, dtype=torch.float64).requires_grad_(), torch.tensor([0, 1, 2, 3, -100])
    for _ in range(2):
        for loss in (
            lambda rows: self_distillation_loss(logits, labels, 0.5, source=rows, reduction="none", backend=backend),
            lambda rows: elr_loss(logits, labels, rows, reduction="none", backend=backend),
        ):
            before = bank.seen.clone()
            value = loss(bank.rows(torch.tensor([0, -1, 5, 6, 2**40])))
            (gradient,) = torch.autograd.grad(value.sum(), logits)
            assert value.isnan().tolist() == [False, True, False, True, False]
            assert gradient.isnan().all(-1).tolist() == [False, True, False, True, False]
            assert (bank.seen - before).tolist() == [1, 0, 0, 0, 0, 1]
            assert bank.predictions.isfinite().all()
            assert (bank._claims == 0).all()


@of_triton
def test_a_forbidden_duplicate_poisons_all_but_the_last(backend):
    bank = PredictionBank(6, 5, unique=True)
    logits, labels = torch.randn(5, 5), torch.zeros(5, dtype=torch.int64)
    value = elr_loss(logits, labels, bank.rows(torch.tensor([3, 0, 3, 1, 3])), reduction="none", backend=backend)
    assert value.isnan().tolist() == [True, False, True, False, False]
    with torch.no_grad():
        elr_loss(logits, labels, bank.rows(torch.tensor([3, 0, 3, 1, 3])), backend=backend)
    assert (bank._claims == 0).all()


@of_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("classes", "k"), [(5, 1), (5, 4), (40, 7), (9001, 3)])  # one tile, and several
def test_the_largest_are_kept_and_of_equal_ones_the_first(backend, classes, k, dtype):
    logits = torch.randint(4, (6, classes)).to(dtype).requires_grad_()  # ties everywhere
    indices, labels = torch.tensor([2, 0, 2, 3, 9, 2]), torch.tensor([0, 1, 2, 3, -100, 1])
    banks = [PredictionBank(4, classes, 0.5, dtype=dtype, top_k=k) for _ in range(2)]
    for visit in range(3):
        for bank, which in zip(banks, (backend, "reference"), strict=True):
            elr_loss(logits, labels, bank.rows(indices), backend=which)
        assert torch.equal(banks[0].seen, banks[1].seen)
        torch.testing.assert_close(banks[0].predictions, banks[1].predictions)
        if visit == 0:  # later what rounding makes of a tie decides
            assert torch.equal(banks[0].classes, banks[1].classes)
        torch.testing.assert_close(banks[0].predictions.sum(1)[[0, 2, 3]], torch.ones(3, dtype=dtype))
