"""The Triton backend against the float64 reference: compiled where a CUDA device is, else in Triton's interpreter.

The interpreter must be chosen before triton is imported, so without a GPU `test_all_in_the_interpreter` runs these
files again in processes of their own, and their tests wait for those.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from triton_cases import (
    DEVICE,
    INTERPRETED,
    PAIRS,
    calls,
    check,
    compiled,
    here,
    indices,
    loss_and_gradient,
    rand,
    randn,
)

import sdfast
from sdfast.ops.self_distillation.description import (
    LABEL_FUNCTIONS,
    LOSSES,
    MIXINGS,
    REDUCTIONS,
    Description,
    packed,
)

FILES = (
    "test_self_distillation_triton.py", "test_self_distillation_triton_rows.py", "test_self_distillation_numbers.py",
    "test_self_distillation_options.py",
)  # fmt: skip


@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="this process runs the tests itself")
@pytest.mark.parametrize("file", FILES)
def test_all_in_the_interpreter(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "triton",
               str(Path(__file__).parent / file)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", output)
    assert done.returncode == 0, output
    assert passed is not None, output
    assert int(passed[1]) > 0, output


def test_importing_sdfast_needs_no_triton():
    program = "import sys; sys.modules['triton'] = None; import sdfast; sdfast.self_distillation_loss"
    subprocess.run([sys.executable, "-c", program], check=True)


@here
@settings(max_examples=100, deadline=None, database=None)
@given(calls())
def test_any_call_equals_the_reference(call):
    logits, labels, alpha, upstream, options = call
    check(logits, labels, alpha, upstream, **options)


# One tile of several rows, of one row, and a row of three column tiles: the three shapes the kernel has.


@here
@pytest.mark.parametrize("classes", [1, 3, 10, 1000, 5000, 9001])
def test_any_number_of_classes(classes):
    check(randn(3, classes, seed=1), indices(3, classes, 2), 0.6)
    check(randn(3, classes, seed=3, dtype=torch.bfloat16), indices(3, classes, 4), sdfast.AdaptiveAlpha(0.5))


@here
@pytest.mark.parametrize(("loss", "h"), PAIRS)
@pytest.mark.parametrize("soft", [False, True])
def test_rows_of_many_tiles(loss, h, soft):
    rows, classes = 2, 9001
    options = {"loss": loss, "label_fn": sdfast.ClipLabel(0.1) if h == "clip" else h}
    if not soft:
        options["source"] = randn(rows, classes, seed=5)
        options["label_smoothing"] = 0.1
    if loss in ("cross_entropy", "kl") and h == "hardmax":
        options["class_weight"] = rand(classes, seed=6)
    if h == "softmax":
        options["temperature"] = 2.0
    labels = randn(rows, classes, seed=7).softmax(-1) if soft else indices(rows, classes, 7)
    check(randn(rows, classes, seed=8), labels, rand(rows, seed=9), **options)


@here
@pytest.mark.parametrize("soft", [False, True])
def test_launches(soft, monkeypatch):
    from sdfast.ops.self_distillation import triton_impl

    launches = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(grid)
            return self.kernel[grid]

    for name in ("rows_kernel", "count_kernel"):
        monkeypatch.setattr(triton_impl, name, Counted(getattr(triton_impl, name)))

    def launched(rows, alpha, **options):
        launches.clear()
        labels = rand(rows, 4, seed=35) if soft else indices(rows, 4, 35)
        sdfast.self_distillation_loss(
            randn(rows, 4, seed=36).requires_grad_(), labels, alpha, backend="triton", **options
        ).backward()
        return len(launches)

    assert launched(64, 0.5) == 1
    assert launched(4097, 0.5, reduction="sum") == 1
    assert launched(4097, 0.5) == (1 if soft else 2)
    assert launched(64, sdfast.AdaptiveAlpha(1.0)) == 2


@here
def test_a_second_backward_and_the_signs_of_one_column():
    logits = randn(5, 1, seed=37).requires_grad_()
    labels = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], device=DEVICE)
    losses = sdfast.self_distillation_loss(
        logits, labels, 0.5, loss="mse", label_fn=sdfast.ClipLabel(0.3), reduction="none", backend="triton"
    )
    first = torch.autograd.grad(losses, logits, labels, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(losses, logits, labels)[0])
    for alpha in (0.5, 1.7, sdfast.AdaptiveAlpha(0.5)):  # mse takes any alpha
        check(logits.detach(), labels, alpha, loss="mse", label_fn=sdfast.ClipLabel(0.3))


@here
def test_inputs_are_not_changed():
    tensors = [randn(3, 10, seed=38), randn(3, 10, seed=39), rand(10, seed=40), rand(3, seed=41), rand(3, seed=42)]
    copies = [tensor.clone() for tensor in tensors]
    logits, source, class_weight, row_weight, alpha = tensors
    loss_and_gradient(
        "triton", logits, indices(3, 10, 43), alpha, source=source, class_weight=class_weight, row_weight=row_weight
    )
    assert all(map(torch.equal, tensors, copies))


@here
@pytest.mark.parametrize("reduction", list(REDUCTIONS))
@pytest.mark.parametrize("want_gradient", [False, True])
def test_opcheck(reduction, want_gradient):
    logits, labels, alpha = randn(3, 10, seed=44), indices(3, 10, 45), rand(3, seed=46)
    description = Description(
        1.0, False, LABEL_FUNCTIONS["softmax"], 2.0, LOSSES["kl"], REDUCTIONS[reduction], -100, 0.1,
        MIXINGS["geometric"], 2.0, 0.7,
    )  # fmt: skip
    forward = torch.ops.sdfast._self_distillation_triton.default
    given = (alpha, randn(3, 10, seed=47), rand(10, seed=48), None)
    arguments = (logits, labels, *given, *packed(description, want_gradient, want_stats=True))
    torch.library.opcheck(forward, arguments)
    state = forward(*arguments)[2]
    upstream = torch.ones(3 if reduction == "none" else (), device=DEVICE)
    backward = torch.ops.sdfast._self_distillation_backward_triton.default
    torch.library.opcheck(backward, (upstream, state, logits, labels, *given, *packed(description)))


@compiled
def test_offsets_beyond_32_bits():
    wide = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    logits = wide.as_strided((2, 10), (2**31, 1))
    logits.copy_(randn(2, 10, seed=49))
    check(logits, indices(2, 10, 50), 0.5)


@compiled
def test_no_host_read_and_graph_capture():
    logits, labels = randn(5000, 100, seed=51).requires_grad_(), indices(5000, 100, 52)

    def run():
        loss = sdfast.self_distillation_loss(logits, labels, sdfast.AdaptiveAlpha(0.7), backend="triton")
        return loss, torch.autograd.grad(loss, logits)[0]

    expected = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        graph.replay()
        assert all(map(torch.equal, expected, captured))
