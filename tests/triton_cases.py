"""Calls of the self-distillation loss for the tests of its Triton kernels, each against the reference."""

import math
import os
import warnings

import pytest
import torch
from hypothesis import strategies as st

import sdfast
from sdfast.ops.self_distillation.description import LOSSES, MIXINGS, REDUCTIONS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
here = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_all_in_the_interpreter")
compiled = pytest.mark.cuda
if DEVICE == "cuda":
    here = compiled

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
HALVES = (torch.bfloat16, torch.float16)
PAIRS = [(loss, h) for loss in LOSSES for h in ("softmax", "hardmax")] + [("mse", "identity"), ("mse", "clip")]


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
    """Another one for each `seed` of a test and each run."""
    return torch.Generator().manual_seed((torch.initial_seed() + seed) % 2**63)


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
