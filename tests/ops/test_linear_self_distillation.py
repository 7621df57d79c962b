"""Both linear losses against the loss of the whole logits, in float64; PyTorch's promises; errors."""

import pytest
import torch
from helpers import (
    DTYPES,
    awkward,
    backends,
    skip_what_takes_the_interpreter_minutes,
)
from linear_cases import FORMS, cast, check, distillation, draw, loss_and_gradients, self_distillation

import sdfast

BACKENDS = backends(without=("cuda",))
REDUCTIONS = ("mean", "sum", "none")


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
    "chunk of True": (
        lambda f: f(H, W, Y, chunk_rows=True), ValueError, "chunk_rows: got True, wanted a positive integer or None"),
    "workspace True": (lambda f: f(H, W, Y, workspace=True), ValueError, "workspace: got True, wanted a positive"),
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
