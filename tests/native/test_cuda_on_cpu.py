"""The CUDA kernels' own source, run on the CPU.

g++ compiles it against `cuda_on_cpu.h`, which makes every CUDA thread a fibre. This proves indexing, masks, barriers
and formulas; not what nvcc makes of them, the memory model or speed.
"""

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sdfast.ops.self_distillation.description import (
    LABEL_FUNCTIONS,
    LOSSES,
    MIXINGS,
    REDUCTIONS,
    Description,
    accumulation_dtype,
    packed,
)
from sdfast.ops.self_distillation.reference import self_distillation_reference

HERE = Path(__file__).parent
TENSORS = ("labels", "alpha", "source", "class_weight", "row_weight")
DEFAULTS = {
    **dict.fromkeys(TENSORS), "alpha_value": 0.7, "adaptive": False, "label_fn": "hardmax", "label_parameter": 1.0,
    "loss": "cross_entropy", "reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0, "mixing": "arithmetic",
    "target_power": 1.0, "row_power": 0.0,
}  # fmt: skip


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = tmp_path_factory.mktemp("emulated") / "cuda_on_cpu.so"
    root = Path(torch.__file__).parent
    subprocess.run(
        [compiler, "-O1", "-std=c++17", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000",
         f"-I{root / 'include'}", str(HERE / "cuda_on_cpu.cpp"), "-o", str(built), f"-L{root / 'lib'}", "-ltorch_cpu"],
        check=True,
    )  # fmt: skip
    library = torch.library.Library("sdfast_emulated", "DEF")
    for name in ("_self_distillation", "_self_distillation_backward"):
        schema = str(getattr(torch.ops.sdfast, name).default._schema)
        library.define(schema.removeprefix("sdfast::"))
    library.define("_scale_in_place(Tensor(a!) gradient, Tensor upstream) -> ()")
    torch.ops.load_library(built)
    return Emulated(library, ctypes.CDLL(str(built)))


class Emulated:
    """The emulated operations, taking options by name."""

    def __init__(self, library, launches):
        self.library = library
        self._launches = launches
        self.ops = torch.ops.sdfast_emulated

    @property
    def launches(self):
        return self._launches.sdfast_emulated_launches()

    def forward(self, logits, want_gradient=True, want_stats=True, **options):
        o = coded(options)
        return self.ops._self_distillation(
            logits, *(o[name] for name in TENSORS), *packed(described(o), want_gradient, want_stats)
        )

    def backward(self, upstream, state, logits, **options):
        o = coded(options)
        if o["adaptive"]:
            o["alpha"] = state[0]
        return self.ops._self_distillation_backward(
            upstream, state, logits, *(o[name] for name in TENSORS), *packed(described(o))
        )


def coded(options):
    o = DEFAULTS | options
    codes = {"label_fn": LABEL_FUNCTIONS, "loss": LOSSES, "reduction": REDUCTIONS, "mixing": MIXINGS}
    return {name: codes[name][value] if name in codes else value for name, value in o.items()}


def described(o):
    return Description(*(o[name] for name in Description._fields))


def reference(logits, upstream=None, **options):
    """(loss, gradient, state) in float64."""
    o = coded(options)
    wide = logits.detach().double().requires_grad_()
    tensors = [o[n] if o[n] is None or not o[n].is_floating_point() else o[n].double() for n in TENSORS]
    value, state = self_distillation_reference(wide, *tensors, described(o))
    upstream = torch.ones_like(value) if upstream is None else upstream.double().expand_as(value)
    (gradient,) = torch.autograd.grad(value, wide, upstream, allow_unused=True)
    return value.detach(), torch.zeros_like(wide) if gradient is None else gradient, state


STEP = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def assert_near(name, got, wanted, tolerance, floor=1e-30):
    got, wanted = got.double(), wanted.double()
    finite = wanted.isfinite()
    torch.testing.assert_close(
        got[~finite], wanted[~finite], rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )
    scale = wanted[finite].abs().max().item() if finite.any() else 0.0
    torch.testing.assert_close(
        got[finite], wanted[finite], rtol=tolerance, atol=tolerance * max(scale, floor), msg=lambda m: f"{name}: {m}"
    )


def check(emulated, logits, **options):
    """Forward with and without a gradient, statistics, and backward under an upstream gradient, by the reference."""
    accumulated = max(STEP[accumulation_dtype(logits.dtype)], 3e-6 if logits.element_size() == 2 else 0)
    value, gradient, state = emulated.forward(logits, **options)
    wanted_value, wanted_gradient, wanted_state = reference(logits, **options)
    assert_near("loss", value, wanted_value, 2 * accumulated, floor=1)  # a difference of logarithms
    floor = 1 / max(len(logits), 1)  # a gradient may be zero by cancellation of terms this large
    assert_near("gradient", gradient, wanted_gradient, STEP[logits.dtype], floor)
    assert_near("state", state, wanted_state, 4 * accumulated, floor=1)

    again, none, state = emulated.forward(logits, want_gradient=False, want_stats=False, **options)
    assert torch.equal(again.nan_to_num(7.0), value.nan_to_num(7.0))
    assert none.shape == (0,)
    upstream = torch.randn(wanted_value.shape, dtype=value.dtype)
    later = emulated.backward(upstream, state, logits, **options)
    _, wanted_gradient, _ = reference(logits, upstream, **options)
    if upstream.dim() and len(upstream):  # its own factor a row, and no mean
        floor = upstream.abs().max().item()
    assert_near("backward", later, wanted_gradient, STEP[logits.dtype], floor)


def make(rows, classes, dtype=torch.float32, soft=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    if soft:
        labels = torch.rand(rows, classes, generator=generator, dtype=torch.float64)
        return logits, (labels / labels.sum(-1, keepdim=True)).to(dtype)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[1::5] = -100
    return logits, labels


# Every team size and its borders: 1-4 pieces a row, a part of a warp, a warp, four warps, a block; aligned and not.
CLASSES = (1, 2, 3, 8, 10, 31, 64, 100, 129, 256, 1000, 1024, 1028, 2500, 4096, 9000)


@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_every_row_length(emulated, classes, dtype):
    logits, labels = make(max(3, min(40, 6000 // classes)), classes, dtype)
    check(emulated, logits, labels=labels)
    check(emulated, logits, labels=labels, label_fn="softmax", label_parameter=2.0, reduction="none")
    check(emulated, logits, labels=labels, adaptive=True, alpha_value=0.9, loss="brier", reduction="sum")


OPTIONS = [
    (loss, label_fn, soft, source)
    for loss, label_fn, soft, source in itertools.product(
        LOSSES, LABEL_FUNCTIONS, (False, True), (None, "same", "other")
    )
    if loss == "mse" or label_fn in ("hardmax", "softmax")
]


@pytest.mark.parametrize(("loss", "label_fn", "soft", "source"), OPTIONS)
def test_every_option(emulated, loss, label_fn, soft, source):
    logits, labels = make(13, 37, torch.float32, soft)
    options = {"labels": labels, "loss": loss, "label_fn": label_fn}
    options["label_parameter"] = {"softmax": 0.6, "clip": 0.2}.get(label_fn, 1.0)
    if source is not None:
        options["source"] = make(13, 37, torch.float32 if source == "same" else torch.bfloat16, seed=1)[0]
        if source == "other":
            options["source"] = options["source"].t().contiguous().t()
    for smoothing, weighted, alpha in itertools.product((0.0, 0.2), (False, True), ("float", "rows", "adaptive")):
        if loss == "mse" and soft and smoothing:
            continue
        more = {"label_smoothing": smoothing, "adaptive": alpha == "adaptive", "row_weight": None}
        if alpha == "rows":
            more["alpha"] = torch.linspace(0, 1, 13)
        if weighted:
            more["row_weight"] = torch.rand(13) + 0.5
            if loss in ("cross_entropy", "kl"):
                more["class_weight"] = torch.rand(37) + 0.1
        check(emulated, logits, **options, **more)


RESHAPED = [
    {"row_power": 0.7}, {"target_power": 2.0}, {"target_power": 2.5, "label_fn": "softmax", "label_smoothing": 0.1},
    {"mixing": "geometric", "label_fn": "softmax", "label_parameter": 0.7, "label_smoothing": 0.2},
    {"mixing": "geometric", "label_fn": "softmax", "label_smoothing": 0.1, "target_power": 3.0, "row_power": 0.4},
]  # fmt: skip


@pytest.mark.parametrize("classes", [1, 3, 10, 37, 129, 1000, 4096])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "brier"])
@pytest.mark.parametrize("options", RESHAPED, ids=str)
def test_reshaped_targets_and_weighted_rows(emulated, options, loss, classes):
    logits, labels = make(11, classes)
    source = make(11, classes, torch.bfloat16, seed=1)[0]
    for alpha in ({"alpha_value": 0.0}, {"alpha": torch.linspace(0, 1, 11)}, {"adaptive": True, "alpha_value": 0.9}):
        for given in ({}, {"source": source}):
            check(emulated, logits, labels=labels, loss=loss, **options, **alpha, **given)
    if "row_power" not in options:
        _, soft = make(11, classes, soft=True, seed=2)
        check(emulated, logits, labels=soft, loss=loss, source=source, reduction="none", **options)


@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize("options", RESHAPED, ids=str)
def test_reshaped_targets_of_every_dtype(emulated, options, dtype):
    logits, labels = make(9, 100, dtype)
    check(emulated, logits, labels=labels, **options)
    check(emulated, logits, labels=labels, reduction="none", class_weight=torch.rand(100) if dtype != torch.float64
          else torch.rand(100, dtype=dtype), **options)  # fmt: skip


def test_a_weight_of_zero_beats_an_infinite_loss(emulated):
    logits, labels = make(4, 10)
    labels = labels.clamp(0)
    logits[0, labels[0]] = -torch.inf
    logits[1, 3] = torch.nan
    options = {"labels": labels, "row_power": 0.5, "alpha_value": 1.0, "reduction": "none"}
    value, gradient, _ = emulated.forward(logits, **options)
    assert value[0] == 0
    assert (gradient[0] == 0).all()
    assert value.isnan().tolist() == [False, True, False, False]
    bad = torch.tensor([99, 0, 1, 2])
    check(emulated, logits, **{**options, "labels": bad, "alpha_value": 0.5})
    check(emulated, logits, **{**options, "labels": bad, "target_power": 2.0, "alpha_value": 0.5})


def test_alpha_one_is_plain_training_bit_for_bit(emulated):
    logits, labels = make(40, 100)
    plain = emulated.forward(logits, labels=labels, alpha_value=1.0)
    nan = torch.full_like(logits, torch.nan)
    for options in ({"label_fn": "softmax"}, {"source": nan}, {"source": nan, "label_fn": "softmax"}):
        for alpha in ({"alpha_value": 1.0}, {"alpha": torch.ones(())}, {"alpha": torch.ones(40)}):
            value, gradient, _ = emulated.forward(logits, labels=labels, **options, **alpha)
            assert torch.equal(value, plain[0])
            assert torch.equal(gradient, plain[1])


@pytest.mark.parametrize("classes", [10, 1000, 4096])
def test_hard_rows(emulated, classes):
    logits, labels = make(12, classes)
    labels[:] = torch.arange(12) % classes
    logits[0] += 1e4
    logits[1] = 0.0  # ties everywhere
    logits[2, labels[2]] += 60  # saturated
    logits[3, labels[3] + 1 :] = -torch.inf
    logits[4, labels[4]] = -torch.inf  # infinite loss
    logits[5] = -torch.inf
    logits[6, classes // 2] = torch.nan
    logits[7, classes - 1] = torch.inf
    for loss, label_fn in itertools.product(LOSSES, ("hardmax", "softmax")):
        if loss == "mse":
            continue
        check(emulated, logits, labels=labels, loss=loss, label_fn=label_fn, reduction="none", alpha_value=0.5)
        check(emulated, logits[:3], labels=labels[:3], loss=loss, label_fn=label_fn, alpha_value=0.0)


def test_zero_target_mass_at_minus_infinity(emulated):
    logits, labels = make(6, 50)
    logits[:, 40:] = -torch.inf
    weight = torch.rand(50)
    weight[labels[0]] = 0
    logits[0, labels[0]] = -torch.inf
    labels = labels.clamp(0, 39)
    for options in ({}, {"label_fn": "softmax"}, {"class_weight": weight}, {"loss": "kl", "class_weight": weight}):
        check(emulated, logits, labels=labels, **options)


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_out_of_range_poison_their_row_alone(emulated, loss):
    logits, labels = make(9, 20)
    labels[3], labels[5] = 20, -(2**40)
    for label_fn in ("hardmax", "softmax"):
        check(emulated, logits, labels=labels, loss=loss, label_fn=label_fn, reduction="none")
        value, gradient, _ = emulated.forward(logits, labels=labels, loss=loss, label_fn=label_fn, reduction="none")
        bad = torch.tensor([3, 5])
        assert value[bad].isnan().all()
        assert gradient[bad].isnan().all()
        assert value.isnan().sum() == 2
    if loss == "cross_entropy":
        check(emulated, logits, labels=labels, class_weight=torch.rand(20))


@pytest.mark.parametrize("loss", LOSSES)
def test_nan_alpha_gives_nan(emulated, loss):
    logits, labels = make(4, 10)
    value, gradient, _ = emulated.forward(
        logits, labels=labels, alpha=torch.tensor(torch.nan), loss=loss, reduction="none"
    )
    kept = labels != -100
    assert value[kept].isnan().all()
    assert gradient[kept].isnan().all()
    assert (gradient[~kept] == 0).all()


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_nothing_kept(emulated, rows):
    logits, labels = make(rows, 10)
    logits[:] = torch.nan
    labels[:] = -100
    for options in (
        {},
        {"adaptive": True},
        {"class_weight": torch.rand(10)},
        {"reduction": "sum"},
        {"reduction": "none"},
    ):
        value, gradient, _ = emulated.forward(logits, labels=labels, **options)
        assert (value == 0).all()
        assert (gradient == 0).all()
        check(emulated, logits, labels=labels, **options)


def test_one_column(emulated):
    logits, _ = make(30, 1)
    signs = torch.randint(2, (30, 1)).float() * 2 - 1
    check(emulated, logits, labels=signs, loss="mse", label_fn="clip", label_parameter=0.1, adaptive=True)


@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize("shared", [8192 + 512 * 16, 8192 + 3 * 512 * 16, 227 << 10])
def test_rows_longer_than_shared_memory(emulated, monkeypatch, shared, dtype):
    monkeypatch.setenv("SDFAST_EMULATED_SHARED", str(shared))
    for classes in (40001, 40960):
        logits, labels = make(3, classes, dtype)
        check(emulated, logits, labels=labels)
        check(emulated, logits, labels=labels, label_fn="softmax", label_parameter=3.0, loss="kl")


def test_strided_inputs(emulated):
    logits, labels = make(20, 24)
    wide = torch.full((20, 70), torch.nan)
    for view in (wide[:, 3:27], wide[:, 4:28], wide[:, :48:2], torch.full((24, 20), torch.nan).t()):
        view.copy_(logits)
        check(emulated, view, labels=labels)
        check(emulated, view, labels=labels, source=view, label_fn="softmax")
    check(emulated, logits, labels=labels[:1].expand(20).clone().fill_(3))
    check(emulated, logits[:1].expand(20, 24), labels=labels)
    check(emulated, logits, labels=torch.stack([labels, labels * 0], 1)[:, 0])


@pytest.mark.parametrize("classes", [10, 1000, 4096])
def test_a_row_does_not_depend_on_its_batch(emulated, classes):
    logits, labels = make(60, classes)
    labels = labels.clamp(0)
    for label_fn in ("hardmax", "softmax"):
        options = {"label_fn": label_fn, "reduction": "none", "alpha_value": 0.4}
        value, gradient, _ = emulated.forward(logits, labels=labels, **options)
        for rows in (slice(0, 1), slice(7, 20), slice(59, 60)):
            part, part_gradient, _ = emulated.forward(logits[rows].clone(), labels=labels[rows].clone(), **options)
            assert torch.equal(part, value[rows])
            assert torch.equal(part_gradient, gradient[rows])


@pytest.mark.parametrize(("rows", "classes", "wanted"), [(128, 10, 1), (128, 100, 1), (1, 50257, 1), (700, 30, 2)])
def test_launches(emulated, rows, classes, wanted):
    logits, labels = make(rows, classes)
    for options in ({}, {"adaptive": True}, {"reduction": "sum"}, {"class_weight": torch.rand(classes)}):
        before = emulated.launches
        _, _, state = emulated.forward(logits, labels=labels, **options)
        assert emulated.launches - before == wanted
        emulated.backward(torch.ones(()), state, logits, labels=labels, **options)
        assert emulated.launches - before == wanted + 1


@pytest.mark.parametrize("dtype", STEP, ids=str)
def test_scale_in_place(emulated, dtype):
    for count in (1, 7, 64, 5001):
        gradient = torch.randn(count).to(dtype)
        for factor in (1.0, -0.37, 0.0):
            upstream = torch.tensor(factor, dtype=accumulation_dtype(dtype))
            scaled = gradient.clone()
            emulated.ops._scale_in_place(scaled, upstream)
            assert torch.equal(scaled, (gradient.to(upstream.dtype) * upstream).to(dtype))
