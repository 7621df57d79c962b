"""The Triton backend of the distillation loss and of the linear losses: every test of theirs that names a backend.

The interpreter must be chosen before triton is imported, so without a GPU this file runs those tests in a process of
their own; with one they run where they are.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import INTERPRETED, of_triton
from linear_cases import draw

import sdfast

HERE = Path(__file__).parent
FILES = (
    "test_distillation.py", "test_distillation_contract.py", "test_linear_self_distillation.py",
    "test_linear_distillation.py", "test_linear_numbers.py", "test_distillation_triton.py",
)  # fmt: skip


@pytest.mark.timeout(1200)
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="this process runs the tests itself")
@pytest.mark.parametrize("file", FILES)
def test_all_in_the_interpreter(file):
    chosen = "triton and not in_the_interpreter"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, HERE / file], env=environment, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", output)
    assert done.returncode == 0, output
    assert passed is not None, output
    assert int(passed[1]) > 0, output


@of_triton
def test_a_bad_list_makes_its_row_nan_and_no_other(backend):
    """On a GPU nobody looks at an index beforehand: out of range, or twice, it must not be a wrong number."""
    logits = torch.randn(4, 6)
    values = torch.full((4, 2), 0.4).log()
    indices = torch.tensor([[0, 1], [2, 2], [1, 6], [-1, 3]])
    for classes in (6, 9001):  # one tile, and several
        wide = torch.cat([logits, torch.randn(4, classes - 6)], 1).requires_grad_()
        bad = torch.where(indices == 6, classes, indices)
        for divergence in ("kl", "reverse_kl", "js"):
            for tail in ("bucket", "uniform"):
                losses = sdfast.distillation_loss(
                    wide, sdfast.TopK(values, bad, None, tail), divergence=divergence, reduction="none",
                    backend=backend,
                )  # fmt: skip
                assert losses.isnan().tolist() == [False, True, True, True]
                (gradient,) = torch.autograd.grad(losses.sum(), wide)
                assert gradient.isnan().any(-1).tolist() == [False, True, True, True]


@of_triton
def test_a_bad_label_or_tail_mass_makes_its_row_nan(backend):
    logits, teacher = torch.randn(2, 3, 6).unbind()
    losses = sdfast.distillation_loss(logits, teacher, torch.tensor([0, 6, -1]), reduction="none", backend=backend)
    assert losses.isnan().tolist() == [False, True, True]
    top = teacher.log_softmax(-1).topk(2, -1)
    losses = sdfast.distillation_loss(
        logits, sdfast.TopK(*top, torch.tensor([0.2, 1.2, -0.1])), reduction="none", backend=backend
    )
    assert losses.isnan().tolist() == [False, True, True]


@of_triton
def test_one_launch_each_way_in_place(backend, monkeypatch):
    """A chunk of the linear losses is turned into its gradient where it lies: no second buffer is asked for."""
    from sdfast.ops.distillation import triton_impl
    from sdfast.ops.self_distillation import triton_impl as self_impl

    seen = []
    for module in (triton_impl, self_impl):
        forward = module.forward

        def spied(logits, *rest, into=None, forward=forward, **options):
            value, gradient, state = forward(logits, *rest, into=into, **options)
            seen.append(gradient.data_ptr() == logits.data_ptr() == into.data_ptr())
            return value, gradient, state

        monkeypatch.setattr(module, "forward", spied)
    hidden, weight, bias, labels = draw()
    sdfast.linear_self_distillation_loss(hidden, weight, labels, 0.5, bias=bias, backend=backend, chunk_rows=25)
    sdfast.linear_distillation_loss(hidden, weight, hidden, weight, labels, backend=backend, chunk_rows=25)
    assert seen == [True] * 4


@of_triton
def test_opcheck_of_the_triton_operations(backend):
    logits, teacher, labels = torch.randn(3, 10), torch.randn(3, 10), torch.randint(0, 10, (3,))
    for reduction in (0, 1):
        for want_gradient in (False, True):
            arguments = (logits, teacher, None, None, labels, torch.rand(3), None, 1.0, 2.0, 3.0, 2, 0)
            forward = torch.ops.sdfast._distillation_triton.default
            given = (*arguments, reduction, -100, 0.1, want_gradient)
            torch.library.opcheck(forward, given)
    state = forward(*arguments, 0, -100, 0.1, False)[2]
    backward = torch.ops.sdfast._distillation_backward_triton.default
    torch.library.opcheck(backward, (torch.ones(3), state, *arguments, -100, 0.1))
