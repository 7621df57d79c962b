"""What PyTorch promises of an operation: autograd, compile, export, transforms, autocast, checkpointing."""

import pytest
import torch
from distillation_cases import DIVERGENCES, FORMS, make_teacher
from helpers import DTYPES, backends, interpreted, skip_what_takes_the_interpreter_minutes

import sdfast
from sdfast import distillation_loss
from sdfast.ops.distillation.description import TEACHER_FORMS

BACKENDS = backends(without=("cuda",))
ALPHAS = {"none": lambda n: None, "float": lambda n: 0.4, "tensor": lambda n: torch.tensor(0.4), "rows": torch.rand}


def inputs(rows=12, classes=7, dtype=torch.float32):
    logits, teacher = torch.randn(2, rows, classes, dtype=dtype).unbind()
    return logits.clone().requires_grad_(), teacher, torch.randint(0, classes, (rows,))


def loss_and_gradient(function, logits):
    loss = function(logits)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), gradient


def operation_arguments(dtype, form="logits", divergence=0, reduction=1, want_gradient=True, soft=False):
    logits, teacher, labels = inputs(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    indices = tail = None
    if form.startswith("top_k"):
        teacher, indices = teacher.log_softmax(-1).topk(3, -1)
        tail = torch.rand(12, dtype=wide)
    labels = torch.rand(12, 7).softmax(-1) if soft else labels
    return (
        logits.detach(), teacher, indices, tail, labels, torch.rand(12, dtype=wide), torch.rand(12, dtype=wide),
        1.0, 2.0, 3.0, divergence, TEACHER_FORMS[form], reduction, -100, 0.1, want_gradient,
    )  # fmt: skip


@pytest.mark.parametrize("form", TEACHER_FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, form):
    forward = torch.ops.sdfast._distillation.default
    for options in ({}, {"soft": True, "divergence": 1}, {"reduction": 0, "want_gradient": False, "divergence": 2}):
        arguments = operation_arguments(dtype, form, **options)
        torch.library.opcheck(forward, arguments)
    _, _, state = forward(*arguments)
    logits = arguments[0].t().contiguous().t()  # the gradient is contiguous all the same
    for upstream in (torch.rand(12, dtype=state.dtype), torch.rand((), dtype=state.dtype)):
        torch.library.opcheck(
            torch.ops.sdfast._distillation_backward.default,
            (upstream, state, logits, *arguments[1:12], -100, 0.1),
        )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, reduction, divergence):
    logits, teacher, labels = inputs(rows=4, dtype=torch.float64)
    for form in ("logits", "log_probabilities", "uniform"):  # a bucket's share moves with the logits: tested elsewhere
        given = make_teacher(teacher, form)
        assert torch.autograd.gradcheck(
            lambda x, t=given: distillation_loss(
                x, t, labels, alpha=0.3, divergence=divergence, reduction=reduction, backend=backend
            ),
            logits,
            fast_mode=interpreted(backend),  # one random direction, not each entry
        )


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_retain_graph(backend, reduction, alpha):
    """A second backward, with other upstream gradients in between, is as right as the first."""
    logits, teacher, labels = inputs()
    loss = distillation_loss(
        logits, teacher, labels, alpha=ALPHAS[alpha](12), reduction=reduction, backend=backend
    ).sum()
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    kept = first.clone()
    first.zero_()  # what came out belongs to the caller
    third = torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True)[0]
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(third, 3 * kept)
    torch.testing.assert_close(logits.grad, 2 * kept)


@pytest.mark.parametrize("scale", [1.0, 1024.0, 65536.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scaling_saves_float16_gradients(backend, scale):
    """The factor of a loss scaler comes before the rounding to float16: no underflow, no overflow of the factor."""
    skip_what_takes_the_interpreter_minutes(backend, scale != 1024)
    rows = 256 if interpreted(backend) else 4096
    logits, teacher = torch.randn(2, rows, 100).half().unbind()
    exact = logits.double().requires_grad_()
    distillation_loss(exact, teacher, backend="reference").backward()
    for function in (distillation_loss, torch.compile(distillation_loss, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        (function(x, teacher, backend=backend) * scale).backward()
        error = (x.grad.double() / scale - exact.grad).abs().max()
        assert error <= 2**-11 * exact.grad.abs().max() + 2**-24 / scale


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_a_clear_error(backend):
    logits, teacher, labels = inputs()
    for reduction in ("mean", "none"):
        loss = distillation_loss(logits, teacher, labels, reduction=reduction, backend=backend).sum()
        with pytest.raises(RuntimeError, match=r"no second derivative; pass backend='reference'"):
            torch.autograd.grad(loss, logits, create_graph=True)
    loss = distillation_loss(logits, teacher, labels, backend="reference")
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), logits)[0].abs().sum() > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_mutated_and_the_teacher_is_not_differentiated(backend, form):
    logits, teacher, labels = inputs()
    teacher = teacher.requires_grad_()
    made = make_teacher(teacher, form)
    alpha, row_weight = torch.rand(12), torch.rand(12)
    tensors = [t for t in (made if isinstance(made, tuple) else (made,)) if isinstance(t, torch.Tensor)]
    given = (logits, labels, alpha, row_weight, *tensors)
    before, versions = [t.detach().clone() for t in given], [t._version for t in given]
    for reduction in ("mean", "none"):
        loss = distillation_loss(
            logits, made, labels, alpha=alpha, row_weight=row_weight, reduction=reduction, backend=backend
        ).sum()
        assert torch.autograd.grad(2 * loss, [logits, teacher], allow_unused=True)[1] is None
    assert all(torch.equal(t.detach(), b) for t, b in zip(given, before, strict=True))
    assert [t._version for t in given] == versions


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_not_copied(backend):
    logits, teacher, _ = inputs()
    loss = distillation_loss(logits, teacher, backend=backend)
    written = loss.grad_fn.saved_tensors[0].data_ptr()
    loss.backward()
    assert logits.grad.data_ptr() == written


def test_no_gradient_is_computed_where_none_is_wanted():
    logits, teacher, labels = inputs()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert distillation_loss(logits, teacher, labels).grad_fn is None
    assert distillation_loss(logits.detach(), teacher, labels).grad_fn is None
    with torch.inference_mode():
        assert distillation_loss(torch.randn(3, 4), torch.randn(3, 4)).isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_can_be_traced_and_batched(backend):
    logits, teacher, labels = inputs()
    loss = distillation_loss(logits, teacher, labels, backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    batched = torch.autograd.grad(loss, logits, torch.tensor([1.0, 2.0]), is_grads_batched=True)[0]
    torch.testing.assert_close(batched, torch.stack([gradient, 2 * gradient]))

    def step(x):
        return torch.autograd.grad(distillation_loss(x, teacher, labels, backend=backend), x)[0]

    traced = torch.fx.experimental.proxy_tensor.make_fx(step)(logits)
    torch.testing.assert_close(traced(logits), gradient)


@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compile_with_a_dynamic_batch_and_twenty_alphas(mode):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def run(x, t, y, a):
        return distillation_loss(x * 2, t, y, alpha=a)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=mode)
    for i in range(20):
        logits, teacher, labels = inputs(rows=16 + i)
        results = [
            loss_and_gradient(lambda x, f=f, t=teacher, y=labels, a=i / 20: 3 * f(x, t, y, a), logits)
            for f in (compiled, run)
        ]
        torch.testing.assert_close(*results)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction, form):
    torch._dynamo.reset()
    logits, teacher, labels = inputs()
    given = make_teacher(teacher, form)

    def run(x):
        return distillation_loss((x.t() * 1).t(), given, labels, divergence="js", reduction=reduction)

    torch.testing.assert_close(
        loss_and_gradient(torch.compile(run, fullgraph=True, backend="aot_eager"), logits),
        loss_and_gradient(run, logits),
    )


def test_export():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(5, 7)

        def forward(self, x, teacher, labels):
            return distillation_loss(self.layer(x), teacher, labels)

    model, batch = Model(), torch.export.Dim("batch")
    example = (torch.randn(4, 5), torch.randn(4, 7), torch.randint(0, 7, (4,)))
    exported = torch.export.export(model, example, dynamic_shapes=({0: batch},) * 3)
    assert any("sdfast._distillation" in str(node.target) for node in exported.graph.nodes)
    example = (torch.randn(9, 5), torch.randn(9, 7), torch.randint(0, 7, (9,)))
    torch.testing.assert_close(exported.module()(*example), model(*example))


@pytest.mark.parametrize("form", FORMS)
def test_functorch_transforms_take_the_reference(form):
    logits, teacher, labels = inputs(dtype=torch.float64)
    x = logits.detach()

    def loss(x, t=teacher, y=labels, backend=None):
        return distillation_loss(x, make_teacher(t, form), y, backend=backend)

    gradient = torch.autograd.grad(loss(logits), logits)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x), gradient)
    per_row = torch.func.vmap(torch.func.grad(lambda r, t, y: loss(r, t, y)))(x, teacher, labels)
    torch.testing.assert_close(per_row / 12, gradient)
    direction = torch.ones_like(x).cumsum(-1)
    _, tangent = torch.func.jvp(loss, (x,), (direction,))
    torch.testing.assert_close(tangent, (gradient * direction).sum())
    hessian = torch.func.hessian(loss)(x)
    exact = torch.autograd.functional.hessian(lambda z: loss(z, backend="reference"), x)
    torch.testing.assert_close(hessian, exact)
    with pytest.raises(NotImplementedError, match=r"no rule for torch\.func transforms"):
        torch.func.grad(lambda z: loss(z, backend="cpu"))(x)


def test_compiled_transforms_keep_their_gradient():
    logits, teacher, labels = inputs(dtype=torch.float64)
    torch._dynamo.reset()
    gradient = torch.func.grad(lambda x: distillation_loss(x, teacher, labels))
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits.detach()), gradient(logits.detach()))


def test_autocast_and_grad_scaler():
    model, (x, teacher, labels) = torch.nn.Linear(7, 7), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x.detach())
        assert logits.dtype == torch.bfloat16
        loss = distillation_loss(logits, teacher, labels)
    assert loss.dtype == torch.float32
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaled = model.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x.detach())
    distillation_loss(logits, teacher, labels, backend="reference").backward()
    torch.testing.assert_close(scaled, model.weight.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    logits, teacher, labels = inputs()

    def run(x):
        return distillation_loss(x * 3, teacher, labels)

    torch.utils.checkpoint.checkpoint(run, logits, use_reentrant=reentrant).backward()
    got = logits.grad
    torch.testing.assert_close(got, loss_and_gradient(run, logits.detach().requires_grad_())[1])


def test_every_public_operation_gives_a_gradient():
    """opcheck passes operations without any backward; this does not."""
    logits, teacher, _ = inputs()
    distillation_loss(logits, teacher).backward()
    assert logits.grad.abs().sum() > 0
    assert sdfast.distillation_loss is distillation_loss
