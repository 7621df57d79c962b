"""The Triton backend against the float64 reference: compiled where a CUDA device is, else in Triton's interpreter.

The interpreter must be chosen before triton is imported, so without a GPU `test_all_in_the_interpreter` runs this file
again in a process of its own, and the others wait for that process.
"""

import math
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdfast
from sdfast.ops.self_distillation.description import (
    LABEL_FUNCTIONS,
    LOSSES,
    MIXINGS,
    REDUCTIONS,
    Description,
    packed,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
here = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_all_in_the_interpreter")
compiled = pytest.mark.cuda
if DEVICE == "cuda":
    here = compiled

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
HALVES = (torch.bfloat16, torch.float16)
PAIRS = [(loss, h) for loss in LOSSES for h in ("softmax", "hardmax")] + [("mse", "identity"), ("mse", "clip")]


@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="this process runs the tests itself")
def test_all_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", output)
    assert done.returncode == 0, output
    assert passed is not None, output
    assert int(passed[1]) > 0, output


def test_importing_sdfast_needs_no_triton():
    program = "import sys; sys.modules['triton'] = None; import sdfast; sdfast.self_distillation_loss"
    subprocess.run([sys.executable, "-c", program], check=True)


def loss_and_gradient(backend, logits, labels, alpha, upstream=None, **options):
    """(loss, gradient, stats) with every floating tensor as it is given."""
    leaf = logits.detach().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the no-op combinations; NumPy's NaN arithmetic in the interpreter
        value, stats = sdfast.self_distillation_loss(leaf, labels, alpha, return_stats=True, backend=backend, **options)
        gradient = torch.autograd.grad(value, leaf, torch.ones_like(value) if upstream is None else upstream)[0]
    return value.detach(), gradient, torch.stack(list(stats))


def double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def natural_scales(logits, upstream, options):
    """Sizes of what is added up in a loss and in a gradient, below which a result is what cancellation leaves."""
    rows, classes = logits.shape
    finite = logits.double()[logits.isfinite()]
    if finite.numel() == 0:
        return 1.0, 1.0
    if options.get("loss") == "mse":
        size = 1 + finite.abs().amax().item()
        loss, gradient = size**2, 2 * size / classes
    else:
        loss, gradient = 1 + math.log(classes) + (finite.amax() - finite.amin()).item(), 1.0
    reduction = options.get("reduction", "mean")
    given = 1.0 if upstream is None else upstream.abs().amax().item()
    return loss * (rows if reduction == "sum" else 1), gradient * given / (rows if reduction == "mean" else 1)


def assert_close(ours, exact, peer, floor, natural_scale):
    """At most twice torch's own error in the same dtype, plus `floor` of the values' scale."""
    ours, peer = ours.double(), peer.double()
    assert ours.shape == exact.shape
    assert torch.equal(ours.isnan(), exact.isnan())
    finite = exact.isfinite()
    assert torch.equal(ours[~finite].nan_to_num(), exact[~finite].nan_to_num())
    if finite.any():
        allowed = (
            2 * (peer - exact)[finite & peer.isfinite()].abs().amax().item() if peer[finite].isfinite().any() else 0
        )
        scale = max(natural_scale, exact[finite].abs().amax().item())
        assert (ours - exact)[finite].abs().amax().item() <= allowed + floor * scale


def check(logits, labels, alpha, upstream=None, **options):
    """Triton's loss, gradient and statistics against the reference in float64 and in the logits' own dtype."""
    ours = loss_and_gradient("triton", logits, labels, alpha, upstream, **options)
    exact_options = {name: double(value) for name, value in options.items()}
    exact = loss_and_gradient(
        "reference", double(logits), double(labels), double(alpha), double(upstream), **exact_options
    )
    peer = loss_and_gradient("reference", logits, labels, alpha, upstream, **options)
    real = EPS[torch.float64 if logits.dtype == torch.float64 else torch.float32]
    floor = 8 * real
    stored = EPS[logits.dtype] if logits.dtype in HALVES else 0  # the interpreter truncates what it stores in bfloat16
    loss_scale, gradient_scale = natural_scales(logits, upstream, options)
    assert_close(ours[0], exact[0], peer[0], floor, loss_scale)
    assert_close(ours[1], exact[1], peer[1], floor + stored, gradient_scale)
    assert_close(ours[2], exact[2], peer[2], 4 * floor, 1.0)
    return ours


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed, scale=3.0, dtype=torch.float32):
    return (torch.randn(shape, generator=generator(seed), dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def rand(*shape, seed, dtype=torch.float32):
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64).to(dtype).to(DEVICE)


def indices(rows, classes, seed):
    return torch.randint(0, classes, (rows,), generator=generator(seed)).to(DEVICE)


def laid_out(tensor, layout):
    """The same values with other strides; an expanded tensor repeats its first row."""
    rows, classes = tensor.shape
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "stepped":
        wide = tensor.new_full((rows, 2 * classes + 1), float("nan"))
        wide[:, 1::2] = tensor
        return wide[:, 1::2]
    if layout == "expanded":
        return tensor[:1].expand(rows, classes)
    return tensor


@st.composite
def calls(draw):
    """(logits, labels, alpha, upstream, options) of any valid call."""
    rows, classes = draw(st.integers(1, 5)), draw(st.sampled_from([1, 3, 10, 33]))
    seed = draw(st.integers(0, 2**20))
    loss, h = draw(st.sampled_from(PAIRS))
    dtype = draw(st.sampled_from(list(EPS)))
    layouts = st.sampled_from(["contiguous", "transposed", "stepped", "expanded"])
    scale, offset = draw(st.sampled_from([0.1, 3.0, 30.0])), draw(st.sampled_from([0.0, 0.0, 1000.0]))
    logits = laid_out(
        (randn(rows, classes, seed=seed, scale=scale, dtype=torch.float64) + offset).to(dtype), draw(layouts)
    )
    soft = draw(st.booleans())
    options = {"loss": loss, "label_fn": sdfast.ClipLabel(0.2) if h == "clip" else h}
    if soft:
        label_dtype = draw(st.sampled_from(list(EPS)))
        labels = laid_out(randn(rows, classes, seed=seed + 1).softmax(-1).to(label_dtype), draw(layouts))
    else:
        labels = indices(rows, classes, seed + 1)
        if draw(st.booleans()):
            labels[draw(st.integers(0, rows - 1))] = -100
    if draw(st.booleans()):
        source_dtype = draw(st.sampled_from(list(EPS)))
        options["source"] = laid_out(randn(rows, classes, seed=seed + 2, dtype=source_dtype), draw(layouts))
    alpha = draw(st.sampled_from([0.0, 0.3, 1.0, "scalar", "rows", "adaptive"]))
    if alpha == "adaptive":
        alpha = sdfast.AdaptiveAlpha(draw(st.sampled_from([0.0, 0.7, 3.0])))
    elif isinstance(alpha, str):
        alpha = rand(*([] if alpha == "scalar" else [rows]), seed=seed + 3)
    if h == "softmax":
        options["temperature"] = draw(st.sampled_from([1.0, 0.5, 4.0]))
    if not (soft and loss == "mse"):
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    if loss in ("cross_entropy", "kl") and draw(st.booleans()):
        options["class_weight"] = rand(classes, seed=seed + 4) + 0.1
    if draw(st.booleans()):
        gce = not soft and loss != "mse" and draw(st.booleans())
        options["row_weight"] = sdfast.GeneralizedCrossEntropy(0.4) if gce else rand(rows, seed=seed + 5)
    if loss != "mse":
        options["target_temperature"] = draw(st.sampled_from([1.0, 1.0, 0.5]))
        if h == "softmax" and (soft or options["label_smoothing"]):
            options["mixing"] = draw(st.sampled_from(list(MIXINGS)))
    options["reduction"] = draw(st.sampled_from(list(REDUCTIONS)))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = randn(*([rows] if options["reduction"] == "none" else []), seed=seed + 6, dtype=real)
    return logits, labels, alpha, upstream, options


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
@pytest.mark.parametrize("classes", [10, 9001])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_a_class_without_target_mass_adds_nothing_at_minus_infinity(classes, loss):
    logits = randn(2, classes, seed=11)
    logits[0, 3] = logits[1, classes - 1] = -torch.inf
    value, gradient, _ = check(logits, torch.tensor([1, 2], device=DEVICE), 0.7, loss=loss)
    assert value.isfinite()
    assert gradient[0, 3] == 0


@here
def test_a_logit_of_minus_infinity_at_the_label_is_an_infinite_loss():
    logits = randn(2, 10, seed=12)
    logits[0, 4] = -torch.inf
    value, _, _ = check(
        logits, torch.tensor([4, 4], device=DEVICE), 0.5, torch.ones(2, device=DEVICE), reduction="none"
    )
    assert value[0] == torch.inf
    assert value[1].isfinite()


@here
@pytest.mark.parametrize("classes", [10, 9001])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "brier"])
def test_a_common_offset_changes_no_bit(classes, loss):
    logits = (randn(2, classes, seed=13) * 64).round() / 64  # 1e4 more is exact in float32
    labels = indices(2, classes, 14)
    plain = loss_and_gradient("triton", logits, labels, 0.4, loss=loss)
    shifted = loss_and_gradient("triton", logits + 1e4, labels, 0.4, loss=loss)
    assert all(map(torch.equal, plain, shifted))


@here
def test_saturated_rows_keep_the_gradient_of_the_true_class():
    logits = torch.tensor([[0.0, -8.0, -8.5], [0.0, -30.0, -40.0]], device=DEVICE)
    labels = torch.tensor([0, 1], device=DEVICE)
    _, gradient, _ = check(logits, labels, 1.0, reduction="sum")
    exact = logits[0].double().softmax(-1)[0] - 1
    assert abs(gradient[0, 0].item() / exact.item() - 1) < 5e-3


@here
@pytest.mark.parametrize("classes", [10, 9001])
@pytest.mark.parametrize(("loss", "h"), PAIRS)
def test_a_nan_logit_makes_its_row_nan_and_no_other(classes, loss, h):
    logits = randn(3, classes, seed=15)
    logits[1, classes - 1] = torch.nan
    label_fn = sdfast.ClipLabel(0.1) if h == "clip" else h
    labels = indices(3, classes, 16)
    value, gradient, _ = check(
        logits, labels, 0.5, torch.ones(3, device=DEVICE), loss=loss, label_fn=label_fn, reduction="none"
    )
    assert value.isnan().tolist() == [False, True, False]
    assert not gradient[[0, 2]].isnan().any()
    assert gradient[1, classes - 1].isnan()


@here
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_rows_of_one_infinity_or_nan_are_nan(value):
    for classes in (3, 9001):
        logits = torch.full((1, classes), value, device=DEVICE)
        assert check(logits, torch.tensor([1], device=DEVICE), 0.5)[0].isnan()


@here
@pytest.mark.parametrize(
    ("classes", "later"), [(10, 9), (9001, 9000), (9001, 2 + 2 * 4096)]
)  # the last: in the same lane
def test_a_tie_goes_to_the_first_index(classes, later):
    logits = torch.zeros(2, classes, device=DEVICE)
    logits[1, [2, later]] = 5.0
    labels = torch.tensor([0, 2], device=DEVICE)
    _, gradient, stats = check(logits, labels, 0.5, reduction="sum")
    assert stats[1] == 1
    assert gradient[1, 2] < 0 < gradient[1, later]
    # A target of two equal entries keeps the label only where the label comes first.
    _, _, stats = check(logits[1:], torch.tensor([later], device=DEVICE), 0.5)
    assert stats[3] == 0


@here
@pytest.mark.parametrize("reduction", list(REDUCTIONS))
def test_ignored_rows_count_for_nothing_whatever_they_hold(reduction):
    logits, source, row_weight = randn(4, 10, seed=17), randn(4, 10, seed=18), rand(4, seed=19)
    labels = torch.tensor([3, 99, 1, 99], device=DEVICE)
    for tensor, value in ((logits, torch.nan), (source, torch.nan), (row_weight, torch.inf)):
        tensor[labels == 99] = value
    options = {"source": source, "ignore_index": 99, "reduction": reduction, "class_weight": rand(10, seed=20)}
    value, gradient, _ = loss_and_gradient("triton", logits, labels, 0.4, row_weight=row_weight, **options)
    kept = labels != 99
    options["source"] = source[kept]
    alone = loss_and_gradient("triton", logits[kept], labels[kept], 0.4, row_weight=row_weight[kept], **options)
    assert torch.equal(gradient[~kept], torch.zeros(2, 10, device=DEVICE))
    assert torch.equal(gradient[kept], alone[1])
    assert torch.equal(value[kept] if reduction == "none" else value, alone[0])
    if reduction == "none":
        assert torch.equal(value[~kept], torch.zeros(2, device=DEVICE))


@here
@pytest.mark.parametrize("alpha", [0.5, sdfast.AdaptiveAlpha(1.0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_with_every_row_ignored_has_loss_zero(alpha, weighted):
    labels = torch.full((3,), -100, device=DEVICE)
    weight = rand(10, seed=21) if weighted else None
    value, gradient, _ = check(randn(3, 10, seed=22), labels, alpha, class_weight=weight)
    assert value == 0
    assert not gradient.any()


@here
@pytest.mark.parametrize("reduction", list(REDUCTIONS))
@pytest.mark.parametrize("soft", [False, True])
def test_an_empty_batch(reduction, soft):
    labels = torch.zeros(0, 3, device=DEVICE) if soft else torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for alpha in (0.5, torch.tensor(0.5, device=DEVICE), sdfast.AdaptiveAlpha(1.0)):
        value, gradient, _ = check(torch.zeros(0, 3, device=DEVICE), labels, alpha, reduction=reduction)
        assert value.sum() == 0
        assert gradient.shape == (0, 3)


@here
@pytest.mark.parametrize("classes", [10, 9001])
@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("h", ["hardmax", "softmax"])
def test_alpha_one_is_plain_training_bit_for_bit(classes, loss, h):
    logits, labels = randn(3, classes, seed=23), indices(3, classes, 24)
    source = torch.full_like(logits, torch.nan)
    plain = loss_and_gradient("triton", logits, labels, 1.0, loss=loss)
    for alpha in (1.0, torch.ones((), device=DEVICE), torch.ones(3, device=DEVICE)):
        for teacher in (None, source):
            mixed = loss_and_gradient("triton", logits, labels, alpha, loss=loss, label_fn=h, source=teacher)
            assert all(map(torch.equal, plain, mixed))


@here
@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("bad", [-1, 10, 2**40, -(2**62)])
def test_an_out_of_range_label_makes_its_row_nan_and_touches_no_other(loss, bad):
    logits = laid_out(randn(3, 10, seed=25), "stepped")  # NaN all around
    labels = torch.tensor([2, bad, 4], device=DEVICE)
    options = {"loss": loss, "reduction": "none"}
    value, gradient, stats = loss_and_gradient("triton", logits, labels, 0.6, **options)
    good = loss_and_gradient("triton", logits, torch.tensor([2, 0, 4], device=DEVICE), 0.6, **options)
    assert value.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all()
    assert torch.equal(value[[0, 2]], good[0][[0, 2]])
    assert torch.equal(gradient[[0, 2]], good[1][[0, 2]])
    assert stats[1] <= 2 / 3  # never correct
    weighted = {"class_weight": rand(10, seed=26)} if loss in ("cross_entropy", "kl") else {}
    assert loss_and_gradient("triton", logits, labels, 0.6, loss=loss, **weighted)[0].isnan()


@here
@pytest.mark.parametrize(("loss", "h"), PAIRS)
def test_a_nan_alpha_gives_nan(loss, h):
    logits, labels = randn(3, 10, seed=27), indices(3, 10, 28)
    options = {"loss": loss, "label_fn": sdfast.ClipLabel(0.1) if h == "clip" else h}
    value, gradient, _ = loss_and_gradient("triton", logits, labels, torch.tensor(torch.nan, device=DEVICE), **options)
    assert value.isnan()
    assert gradient.isnan().all()
    alpha = torch.tensor([0.5, torch.nan, 0.5], device=DEVICE)
    value, gradient, _ = loss_and_gradient("triton", logits, labels, alpha, reduction="none", **options)
    assert value.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(-1).tolist() == [False, True, False]


@here
@pytest.mark.parametrize(("rows", "classes"), [(300, 10), (4, 1000), (3, 9001)])
def test_a_row_depends_on_no_other_row_and_repeats_bitwise(rows, classes):
    logits, labels, alpha = randn(rows, classes, seed=29), indices(rows, classes, 30), rand(rows, seed=31)
    first = loss_and_gradient("triton", logits, labels, alpha, reduction="none")
    again = loss_and_gradient("triton", logits, labels, alpha, reduction="none")
    assert all(map(torch.equal, first, again))
    row = rows - 1
    alone = loss_and_gradient("triton", logits[row:], labels[row:], alpha[row:], reduction="none")
    assert torch.equal(first[0][row:], alone[0])
    assert torch.equal(first[1][row:], alone[1])


@here
@pytest.mark.parametrize("alpha", [0.8, sdfast.AdaptiveAlpha(0.9)])
def test_more_than_65535_rows(alpha):
    rows = 66_000
    labels = indices(rows, 3, 32)
    labels[::7] = -100
    check(randn(rows, 3, seed=33), labels, alpha, class_weight=rand(3, seed=34))


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
