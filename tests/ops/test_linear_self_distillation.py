"""Both linear losses against the loss of the whole logits, in float64: gradients, chunks, memory, and the promises."""

import gc

import pytest
import torch
from helpers import (
    DTYPES,
    assert_as_good_as_torch,
    awkward,
    backends,
    skip_what_takes_the_interpreter_minutes,
)
from linear_cases import FORMS, distillation, draw, loss_and_gradients, self_distillation

import sdfast
from sdfast.ops import linear_chunks

BACKENDS = backends(without=("cuda",))
REDUCTIONS = ("mean", "sum", "none")


def cast(tensors, dtype):
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def check(form, backend, tensors, labels, **options):
    """Loss and gradients against the reference in float64, beside the reference in the same dtype."""
    dtype = tensors[0].dtype
    plan = {name: options.pop(name) for name in ("chunk_rows", "workspace") if name in options}
    rows = len(labels)
    upstream = torch.linspace(-1, 2, rows) if options.get("reduction") == "none" else None

    def run(which, compute, **more):
        wide = torch.float64 if compute == torch.float64 else torch.float32
        up = None if upstream is None else upstream.to(wide)
        if form == "distillation" and "teacher_dtype" not in options:
            more["teacher_dtype"] = torch.float64 if dtype == torch.float64 else torch.float32
        return loss_and_gradients(form, *cast(tensors, compute), labels, up, backend=which, **more, **options)

    got, peer, exact = run(backend, dtype, **plan), run("reference", dtype), run("reference", torch.float64)
    unit = 1 / rows if options.get("reduction", "mean") == "mean" else 1.0
    for name, g, t, e in zip(("loss", "hidden", "weight", "bias"), got, peer, exact, strict=False):
        # What is added up: `rows` terms of the size of hidden states, for the weight.
        scale = 40.0 if name == "loss" else 40 * unit * (rows if name != "hidden" else 1) ** 0.5
        assert_as_good_as_torch(name, g, t, e, scale)


@pytest.mark.parametrize("chunk_rows", [None, 1, 7, 50, 64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_loss_of_the_logits(backend, form, dtype, reduction, chunk_rows):
    skip_what_takes_the_interpreter_minutes(backend, chunk_rows in (1, 50, 64) or reduction == "sum")
    *tensors, labels = draw(dtype=dtype)
    check(form, backend, tensors, labels, reduction=reduction, chunk_rows=chunk_rows, row_weight=torch.rand(50))


SELF_OPTIONS = (
    {"alpha": sdfast.AdaptiveAlpha(0.8)},
    {"alpha": torch.rand(50)},
    {"alpha": torch.tensor(0.3), "label_fn": "softmax", "temperature": 0.5},
    {"loss": "kl", "label_smoothing": 0.1, "class_weight": torch.rand(33) + 0.1},
    {"loss": "brier", "label_fn": "softmax", "temperature": 2.0},
    {"loss": "mse", "label_fn": sdfast.ClipLabel(0.1), "alpha": 1.4},
    {"ignore_index": 3},
)
KD_OPTIONS = (
    {"alpha": 1.0},
    {"alpha": torch.rand(50), "divergence": "reverse_kl", "temperature": 2.0},
    {"alpha": torch.tensor(0.2), "divergence": "js", "label_smoothing": 0.1},
    {"teacher_temperature": 2.0, "temperature": 1.0},
    {"teacher_dtype": torch.bfloat16},
    {"teacher_dtype": torch.float64},
)


OPTIONS = {"self_distillation": SELF_OPTIONS, "distillation": KD_OPTIONS}
NAMED = [(form, number) for form, calls in OPTIONS.items() for number in range(len(calls))]


@pytest.mark.parametrize(("form", "number"), NAMED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_passes_through(backend, reduction, form, number):
    options = OPTIONS[form][number]
    *tensors, labels = draw()
    if options.get("ignore_index"):
        labels = labels.clamp(min=0)
    check(form, backend, tensors, labels, reduction=reduction, chunk_rows=16, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [50257, 151936])
@pytest.mark.parametrize("form", FORMS)
def test_vocabularies(form, classes, dtype):
    """Ragged widths, converted in several pieces in bfloat16."""
    *tensors, labels = draw(rows=5, width=80, classes=classes, dtype=dtype)
    check(form, "cpu", tensors, labels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_gradients_are_those_of_float64(backend, form):
    """Within 0.5 %: the logits of a chunk are never rounded to bfloat16, nor is a sum over chunks."""
    *tensors, labels = draw(rows=300, width=32, classes=400, dtype=torch.bfloat16, ignored=None)
    tensors = [(3 * t.detach()).requires_grad_() for t in tensors]
    options = {"temperature": 1.0, "divergence": "js", "teacher_dtype": torch.float32} if form == "distillation" else {}
    got = loss_and_gradients(form, *tensors, labels, backend=backend, chunk_rows=16, **options)
    exact = loss_and_gradients(form, *cast(tensors, torch.float64), labels, backend="reference", **options)
    for name, g, e in zip(("hidden", "weight", "bias"), got[1:], exact[1:], strict=True):
        assert (g.double() - e).norm() / e.norm() < 5e-3, name


@pytest.mark.parametrize(
    "which", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_those_that_require_them(form, dtype, which):
    *tensors, labels = draw(dtype=dtype)
    want = loss_and_gradients(form, *tensors, labels, chunk_rows=9)[1:]
    tensors = [t.detach().requires_grad_(on) for t, on in zip(tensors, which, strict=True)]
    got = loss_and_gradients(form, *tensors, labels, chunk_rows=9)[1:]
    assert len(got) == sum(which)
    for g, w in zip(got, (w for w, on in zip(want, which, strict=True) if on), strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("form", FORMS)
def test_without_bias(form):
    *tensors, labels = draw(bias=False)
    check(form, "cpu", tensors, labels, chunk_rows=9)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_chunk_size_changes_nothing(backend, form, reduction):
    """float64, 1e-12: and gradients add up over chunks of any size."""
    *tensors, labels = draw(rows=101, dtype=torch.float64)
    upstream = torch.randn(101, dtype=torch.float64) if reduction == "none" else None
    whole = loss_and_gradients(form, *tensors, labels, upstream, reduction=reduction, backend=backend, chunk_rows=101)
    for chunk_rows in (1, 10, 100) if backend == "cpu" else (33,):
        parts = loss_and_gradients(
            form, *tensors, labels, upstream, reduction=reduction, backend=backend, chunk_rows=chunk_rows
        )
        for w, p in zip(whole, parts, strict=True):
            torch.testing.assert_close(p, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_four_micro_batches_are_one_batch(form):
    *tensors, labels = draw(rows=40, dtype=torch.float64)
    teacher = torch.randn(40, 5, dtype=torch.float64), torch.randn(33, 5, dtype=torch.float64)

    def run(rows, reduction):
        hidden, weight, bias = tensors
        if form == "self_distillation":
            return self_distillation(hidden[rows], weight, labels[rows], bias=bias, reduction=reduction)
        return sdfast.linear_distillation_loss(
            hidden[rows], weight, teacher[0][rows], teacher[1], labels[rows], bias=bias, reduction=reduction
        )

    whole = torch.autograd.grad(run(slice(None), "mean"), tensors)
    kept = (labels != -100).sum()
    for begin in range(0, 40, 10):
        (run(slice(begin, begin + 10), "sum") / kept).backward()
    for tensor, gradient in zip(tensors, whole, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_upstream_gradients(form, reduction):
    """Any value, zeros and stride 0 included, and a second backward after the first."""
    *tensors, labels = draw()
    upstreams = (torch.randn(50), torch.zeros(50), torch.ones(1).expand(50), torch.randn(100)[::2])
    if reduction != "none":
        upstreams = [torch.tensor(value) for value in (1.0, -2.5, 0.0)]
    for upstream in upstreams:
        loss = FORMS[form](tensors[0], tensors[1], labels, bias=tensors[2], reduction=reduction, chunk_rows=16)
        want = loss_and_gradients(form, *tensors, labels, upstream, reduction=reduction, backend="reference")[1:]
        first = torch.autograd.grad(loss, tensors, upstream, retain_graph=True)
        torch.testing.assert_close(first, want, rtol=1e-4, atol=1e-5)
        for gradient in first:
            gradient.fill_(torch.nan)  # what came out belongs to the caller
        torch.testing.assert_close(torch.autograd.grad(loss, tensors, upstream), want, rtol=1e-4, atol=1e-5)


def peak_bytes(function):
    """The most that torch's allocator holds during the call beyond what it held before."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow_with_the_rows(form, reduction, dtype):
    """Beyond the hidden states' own gradient and a few numbers a row, 4,096 and 16,384 rows take the same."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    classes, width = 2000, 4
    peaks = []
    for rows in (4096, 16384):
        *tensors, labels = draw(rows, width, classes, dtype, bias=False)
        upstream = torch.ones(rows) if reduction == "none" else None

        def run(tensors=tensors, labels=labels, upstream=upstream):
            loss_and_gradients(form, *tensors, labels, upstream, reduction=reduction)

        run()
        own = rows * width * tensors[0].element_size()
        peaks.append(peak_bytes(run) - own)
    assert peaks[1] < 16384 * classes * tensors[0].element_size() / 2
    per_row = 200  # bytes: a teacher's hidden states, row factors, losses, labels' masks
    assert peaks[1] < peaks[0] + per_row * (16384 - 4096)


@pytest.mark.parametrize("workspace", [1 << 16, 1 << 20, 64 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_the_workspace_is_kept(form, dtype, workspace):
    torch.utils.deterministic.fill_uninitialized_memory = False
    rows, classes, width = 3000, 1000, 4
    *tensors, labels = draw(rows, width, classes, dtype, bias=False)

    def run():
        loss_and_gradients(form, *tensors, labels, workspace=workspace)

    run()
    gradients = rows * width * 4 + classes * width * 6
    assert peak_bytes(run) <= workspace + gradients + 200 * rows + (64 << 10)


def test_plans():
    """Chunks as large as the workspace allows; a CPU's stop where its matrix product has enough."""

    def plan(classes, dtype=torch.float32, device="cuda", buffers=1, chunk_rows=None, workspace=512 << 20):
        return linear_chunks.plan(classes, 4096, dtype, device, buffers, chunk_rows, workspace)

    for classes in (32000, 50257, 65536):
        assert plan(classes).chunk >= 2048
    assert plan(128256).chunk == (512 << 20) // (4 * 128256)
    assert plan(32000, buffers=2).chunk >= 2048
    assert plan(32000, torch.bfloat16).chunk == (512 << 20) // ((4 + 2) * 32000)
    assert plan(151936, torch.bfloat16, "cpu").chunk == 512
    assert plan(1000, chunk_rows=77).chunk == 77
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for device in ("cpu", "cuda"):
            for classes in (10, 1000, 151936):
                for buffers in (1, 2):
                    with pytest.raises(ValueError, match=r"one row of \d+ classes needs (\d+) bytes") as raised:
                        plan(classes, dtype, device, buffers, workspace=classes)
                    needed = int(str(raised.value).split()[-2])
                    assert plan(classes, dtype, device, buffers, workspace=needed).chunk == 1
                    with pytest.raises(ValueError, match="one row"):
                        plan(classes, dtype, device, buffers, workspace=needed - 1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_kept_gives_zero(backend, form, reduction):
    for rows in (0, 5):
        *tensors, labels = draw(rows=rows)
        labels.fill_(-100)
        upstream = torch.ones(rows) if reduction == "none" else None
        got = loss_and_gradients(form, *tensors, labels, upstream, reduction=reduction, backend=backend)
        assert all((t == 0).all() for t in got)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["transposed", "strided", "padded"])
def test_layouts_and_leading_dimensions(form, layout):
    *tensors, labels = draw(rows=24, bias=False)
    want = loss_and_gradients(form, *tensors, labels)
    moved = [awkward(t.detach(), layout).requires_grad_() for t in tensors[:2]]
    got = loss_and_gradients(form, *moved, None, labels)
    torch.testing.assert_close(got, want)
    shaped = tensors[0].detach().reshape(2, 3, 4, 12).requires_grad_()
    rows = FORMS[form](shaped, tensors[1], labels.reshape(2, 3, 4), reduction="none")
    assert rows.shape == (2, 3, 4)
    torch.testing.assert_close(rows.sum() / (labels != -100).sum(), want[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics(backend):
    *tensors, labels = draw(rows=64)
    for alpha in (0.3, torch.rand(64), sdfast.AdaptiveAlpha(0.9)):
        results = [
            sdfast.linear_self_distillation_loss(
                tensors[0], tensors[1], labels, alpha, bias=tensors[2], return_stats=True, chunk_rows=10, backend=which
            )
            for which in (backend, "reference")
        ]
        torch.testing.assert_close(tuple(results[0][1]), tuple(results[1][1]))
        torch.testing.assert_close(results[0][0], results[1][0])


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    *tensors, labels = draw(rows=6, width=3, classes=5, dtype=torch.float64)
    options = {"alpha": 1.0} if form == "self_distillation" else {"alpha": 0.3}  # a model's own target is cut off
    for reduction in REDUCTIONS:
        assert torch.autograd.gradcheck(
            lambda h, w, b, r=reduction: FORMS[form](h, w, labels, bias=b, reduction=r, chunk_rows=4, **options),
            tensors,
        )


def test_opcheck():
    hidden, weight, bias, labels = (t.detach() for t in draw())
    alpha, row_weight, class_weight, plan = torch.rand(50), torch.rand(50), torch.rand(33), (9, 3, 33)
    for reduction, wanted in ((1, (True, True, True)), (2, (True, False, False)), (0, (False,) * 3)):
        shared = (hidden, weight, bias, labels, alpha)
        arguments = (*shared, class_weight, row_weight, 1.0, 1, 1.0, 0, reduction, -100, 0.1, *plan, *wanted)
        torch.library.opcheck(torch.ops.sdfast._linear_self_distillation.default, ("cpu", *arguments, True))
        teacher = (torch.randn(50, 4), torch.randn(33, 4), None)
        with_teacher = (
            hidden,
            weight,
            bias,
            *teacher,
            labels,
            alpha,
            row_weight,
            1.0,
            2.0,
            2.0,
            2,
            reduction,
            -100,
            0.1,
        )
        arguments_of_teacher = (*with_teacher, *plan, *wanted)
        torch.library.opcheck(torch.ops.sdfast._linear_distillation.default, ("cpu", *arguments_of_teacher))
    upstream = torch.rand(50)
    wanted = (True, False, True)
    torch.library.opcheck(
        torch.ops.sdfast._linear_self_distillation_backward.default,
        ("cpu", upstream, torch.ones(5), *arguments[:-3], *wanted),
    )
    torch.library.opcheck(
        torch.ops.sdfast._linear_distillation_backward.default,
        ("cpu", upstream, torch.ones(1), *with_teacher, *plan, *wanted),
    )
    torch.library.opcheck(torch.ops.sdfast._linear_count_correct.default, (hidden, weight, bias, labels, -100, *plan))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_compile_fullgraph_with_a_dynamic_batch(form, reduction):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def run(hidden, weight, bias, labels, teacher):
        if form == "self_distillation":
            return sdfast.linear_self_distillation_loss(
                hidden, weight, labels, sdfast.AdaptiveAlpha(0.5), bias=bias, reduction=reduction
            )
        return sdfast.linear_distillation_loss(hidden, weight, *teacher, labels, bias=bias, reduction=reduction)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (20, 31, 47):
        *tensors, labels = draw(rows=rows)
        teacher = torch.randn(rows, 12), torch.randn(33, 12)
        results = [torch.autograd.grad(f(*tensors, labels, teacher).sum(), tensors) for f in (compiled, run)]
        torch.testing.assert_close(*results)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("form", FORMS)
def test_export(form):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(12, 33)

        def forward(self, hidden, teacher, labels):
            if form == "self_distillation":
                return sdfast.linear_self_distillation_loss(hidden, self.layer.weight, labels, 0.5)
            return sdfast.linear_distillation_loss(hidden, self.layer.weight, teacher, self.layer.weight, labels)

    model, batch = Model(), torch.export.Dim("batch")
    example = (torch.randn(4, 12), torch.randn(4, 12), torch.randint(0, 33, (4,)))
    exported = torch.export.export(model, example, dynamic_shapes=({0: batch},) * 3)
    assert any("sdfast._linear" in str(node.target) for node in exported.graph.nodes)
    example = (torch.randn(9, 12), torch.randn(9, 12), torch.randint(0, 33, (9,)))
    torch.testing.assert_close(exported.module()(*example), model(*example))


@pytest.mark.parametrize("form", FORMS)
def test_functorch_transforms_take_the_reference(form):
    *tensors, labels = draw(rows=6, dtype=torch.float64)
    want = loss_and_gradients(form, *tensors, labels)[1:]
    values = [t.detach() for t in tensors]
    got = torch.func.grad(lambda h, w, b: FORMS[form](h, w, labels, bias=b), (0, 1, 2))(*values)
    torch.testing.assert_close(got, want)
    with pytest.raises(NotImplementedError, match=r"no rule for torch\.func transforms"):
        torch.func.grad(lambda h: FORMS[form](h, values[1], labels, backend="cpu"))(values[0])


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form):
    """As a linear layer: bfloat16 operands; the parameters' gradients come in their own dtype."""
    *tensors, labels = draw(rows=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss_and_gradients(form, *tensors, labels)
    # Of the operands as rounded: a tie between two classes may fall another way before.
    rounded = cast(cast(tensors, torch.bfloat16), torch.float64)
    exact = loss_and_gradients(form, *rounded, labels, backend="reference")
    assert got[0].dtype == torch.float32
    for tensor, g, e in zip(tensors, got[1:], exact[1:], strict=True):
        assert g.dtype == tensor.dtype == torch.float32
        assert (g.double() - e).norm() / e.norm() < 2e-2


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("form", FORMS)
def test_loss_scaling_saves_float16_gradients(form, scale):
    *tensors, labels = draw(rows=2048, dtype=torch.float16, ignored=None)
    exact = loss_and_gradients(form, *cast(tensors, torch.float64), labels, backend="reference")
    loss = FORMS[form](tensors[0], tensors[1], labels, bias=tensors[2]) * scale
    for g, e in zip(torch.autograd.grad(loss, tensors), exact[1:], strict=True):
        error = (g.double() / scale - e).abs().max()
        assert error <= 2**-9 * e.abs().max() + 2**-24 / scale


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_activation_checkpointing(form, reentrant):
    *tensors, labels = draw()
    want = loss_and_gradients(form, *tensors, labels)[1:]
    run = FORMS[form]
    loss = torch.utils.checkpoint.checkpoint(
        lambda h, w, b: run(h, w, labels, bias=b), *tensors, use_reentrant=reentrant
    )
    loss.backward()
    for tensor, gradient in zip(tensors, want, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("form", FORMS)
def test_double_backward_is_a_clear_error(form):
    *tensors, labels = draw()
    for reduction in ("mean", "none"):
        loss = FORMS[form](tensors[0], tensors[1], labels, bias=tensors[2], reduction=reduction).sum()
        with pytest.raises(RuntimeError, match=f"linear_{form}_loss: .* no second derivative"):
            torch.autograd.grad(loss, tensors, create_graph=True)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_mutated_and_nothing_computed_that_nobody_wants(form):
    *tensors, labels = draw()
    before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    for reduction in ("mean", "none"):
        FORMS[form](tensors[0], tensors[1], labels, bias=tensors[2], reduction=reduction).sum().mul(3).backward()
    assert all(torch.equal(t.detach(), b) for t, b in zip(tensors, before, strict=True))
    assert [t._version for t in tensors] == versions
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert FORMS[form](tensors[0], tensors[1], labels).grad_fn is None


@pytest.mark.parametrize("form", FORMS)
def test_repeats_bit_for_bit(form):
    *tensors, labels = draw(rows=200, width=64, classes=300)
    first, second = (loss_and_gradients(form, *tensors, labels, chunk_rows=33) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_synchronised_alpha_without_processes_says_so():
    hidden, weight, _, labels = draw()
    with pytest.raises(RuntimeError, match="init_process_group"):
        self_distillation(hidden, weight, labels, alpha=sdfast.AdaptiveAlpha(1.0, sync=True))


H, W, Y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 4, -100])

BAD_CALLS = {
    "hidden integers": (lambda f: f(H.long(), W, Y), TypeError, "hidden: got int64, wanted float32"),
    "weight of another width": (
        lambda f: f(H, W[:, :2], Y), ValueError, r"weight: got shape \(5, 2\), wanted \(classes, 3\) for hidden"),
    "weight a vector": (lambda f: f(H, W[0], Y), ValueError, r"weight: got shape \(3,\), wanted \(classes, width\)"),
    "weight of no class": (lambda f: f(H, W[:0], Y), ValueError, r"weight: got shape \(0, 3\)"),
    "weight of another dtype": (lambda f: f(H, W.double(), Y), TypeError, "weight: got float64, wanted float32 as hid"),
    "weight on another device": (lambda f: f(H, W.to("meta"), Y), ValueError, "weight: is on meta, wanted cpu"),
    "bias of another length": (lambda f: f(H, W, Y, bias=H[0]), ValueError, r"bias: got shape \(3,\), wanted \(5,\)"),
    "bias of another dtype": (
        lambda f: f(H, W, Y, bias=W[:, 0].half()), TypeError, "bias: got float16, wanted float32 as hidden"),
    "labels too few": (lambda f: f(H, W, Y[:3]), ValueError, r"labels: got int64 of shape \(3,\)"),
    "labels probabilities": (
        lambda f: f(H, W, torch.rand(4, 5)), ValueError,
        r"labels: got float32 of shape \(4, 5\), wanted \(4,\) class indices, not probabilities"),
    "labels out of range": (lambda f: f(H, W, Y + 1, chunk_rows=1), IndexError, "labels: row 2 is 5, wanted 0 <= lab"),
    "labels out of range, reference": (
        lambda f: f(H, W, Y + 1, backend="reference"), IndexError, "labels: row 2 is 5, wanted 0 <= label < 5"),
    "alpha above one": (lambda f: f(H, W, Y, alpha=1.5), ValueError, "alpha: got 1.5, wanted within"),
    "alpha tensor above one": (
        lambda f: f(H, W, Y, alpha=torch.tensor([0, 1, 0, 2.0]), chunk_rows=1), ValueError, "alpha: row 3 is 2"),
    "chunk of no row": (lambda f: f(H, W, Y, chunk_rows=0), ValueError, "chunk_rows: got 0, wanted a positive integer"),
    "workspace negative": (lambda f: f(H, W, Y, workspace=-1), ValueError, "workspace: got -1, wanted a positive"),
    "workspace a string": (lambda f: f(H, W, Y, workspace="1GB"), ValueError, "workspace: got '1GB'"),
    "workspace too small": (
        lambda f: f(H, W, Y, workspace=10), ValueError, r"workspace: got 10 bytes, but one row of 5 classes needs \d+"),
    "workspace too small for the chunk": (
        lambda f: f(H, W, Y, workspace=1000, chunk_rows=100), ValueError, "but 100 rows of 5 classes needs"),
    "a backend without this kernel": (
        lambda f: f(H, W, Y, backend="cuda"), NotImplementedError, "backend='cuda': this operation has no such kernel"),
    "unknown reduction": (lambda f: f(H, W, Y, reduction="batchmean"), ValueError, "reduction: got 'batchmean'"),
    "row_weight of another length": (
        lambda f: f(H, W, Y, row_weight=torch.rand(5)), ValueError, r"row_weight: got shape \(5,\), wanted \(4,\)"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_named_in_one_line(name, form):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message) as raised:
        call(self_distillation if form == "self_distillation" else distillation)
    assert "\n" not in str(raised.value)
