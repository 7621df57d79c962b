"""What PyTorch promises of an operation: autograd, compile, export, transforms, autocast, checkpointing, processes."""

import warnings

import pytest
import torch
from helpers import DTYPES, backends

import sdfast
from sdfast import self_distillation_loss
from sdfast.ops.self_distillation.description import Description, packed

BACKENDS = backends()
ALPHAS = {
    "float": lambda n: 0.4,
    "tensor": lambda n: torch.tensor(0.4),
    "rows": lambda n: torch.rand(n),
    "adaptive": lambda n: sdfast.AdaptiveAlpha(0.8),
}


def inputs(rows=12, classes=7, dtype=torch.float32):
    return torch.randn(rows, classes, dtype=dtype).requires_grad_(), torch.randint(0, classes, (rows,))


def loss_and_gradient(function, logits):
    loss = function(logits)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), gradient


DESCRIPTION = Description(0.4, False, 1, 1.0, 0, 1, -100, 0.1, 0, 2.0, 0.7)


def operation_arguments(dtype, *, alpha=None, source=None, soft=False, reduction=1, want_gradient=True, adaptive=False):
    logits, labels = inputs(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    labels = torch.rand(12, 7).softmax(-1) if soft else labels
    description = DESCRIPTION._replace(row_power=0.0) if soft else DESCRIPTION
    return (
        logits.detach(),
        labels,
        alpha,
        source,
        torch.rand(7, dtype=wide),
        torch.rand(12, dtype=wide),
        *packed(description._replace(adaptive=adaptive, reduction=reduction), want_gradient, want_stats=True),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_forward(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for options in (
        {}, {"alpha": torch.rand(12, dtype=wide)}, {"source": torch.randn(7, 12).t()}, {"soft": True},
        {"reduction": 0, "want_gradient": False}, {"adaptive": True},
    ):  # fmt: skip
        torch.library.opcheck(torch.ops.sdfast._self_distillation.default, operation_arguments(dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_backward(dtype):
    arguments = operation_arguments(dtype, reduction=0, want_gradient=False)
    _, _, state = torch.ops.sdfast._self_distillation(*arguments)
    logits, labels, alpha, source, class_weight, row_weight = arguments[:6]
    logits = logits.t().contiguous().t()  # the gradient is contiguous all the same
    for upstream in (torch.rand(12, dtype=state.dtype), torch.rand((), dtype=state.dtype)):
        torch.library.opcheck(
            torch.ops.sdfast._self_distillation_backward.default,
            (upstream, state, logits, labels, alpha, source, class_weight, row_weight, *packed(DESCRIPTION)),
        )


@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "mse", "brier"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, reduction, loss):
    """A source tensor keeps the target fixed, which finite differences need."""
    logits, labels = inputs(rows=4, dtype=torch.float64)
    source = torch.randn(4, 7, dtype=torch.float64)
    for label_fn in ("hardmax", "softmax"):
        assert torch.autograd.gradcheck(
            lambda x, h=label_fn: self_distillation_loss(
                x, labels, 0.3, source=source, label_fn=h, loss=loss, reduction=reduction, backend=backend
            ),
            logits,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_of_any_value(backend):
    logits, labels = inputs()
    for reduction in ("mean", "sum", "none"):

        def run(which, upstream, reduction=reduction):
            loss = self_distillation_loss(logits, labels, 0.4, reduction=reduction, backend=which)
            return torch.autograd.grad(loss, logits, upstream)[0]

        scalars = (torch.tensor(1.0), torch.tensor(-3.5), torch.tensor(0.0), torch.tensor(65536.0))
        rows = (torch.randn(12), torch.zeros(12), torch.ones(1).expand(12), torch.randn(24)[::2])
        for upstream in rows if reduction == "none" else scalars:
            unit = upstream.abs().max().clamp(min=1)
            torch.testing.assert_close(run(backend, upstream) / unit, run("reference", upstream) / unit)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_retain_graph(backend, reduction, alpha):
    """A second backward, with other upstream gradients in between, is as right as the first."""
    logits, labels = inputs()
    loss = self_distillation_loss(logits, labels, ALPHAS[alpha](12), reduction=reduction, backend=backend).sum()
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    third = torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True)[0]
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(third, 3 * first)
    torch.testing.assert_close(logits.grad, 2 * first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_given_out_is_not_needed_again(backend):
    """While the graph is kept nobody gets the saved gradient: writing into what came out harms no later backward."""
    logits, labels = inputs()
    want = loss_and_gradient(lambda x: self_distillation_loss(x, labels, 0.4, backend=backend), logits)[1]
    loss = self_distillation_loss(logits, labels, 0.4, backend=backend)
    torch.autograd.grad(loss, logits, retain_graph=True)[0].zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, logits, retain_graph=True)[0], want)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], want)
    doubled = logits * 1
    doubled.register_hook(lambda gradient: gradient.mul_(2))
    loss = self_distillation_loss(doubled, labels, 0.4, backend=backend)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(logits.grad, 4 * want)


@pytest.mark.parametrize("scale", [1.0, 1024.0, 65536.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scaling_saves_float16_gradients(backend, scale):
    """The factor of a loss scaler comes before the rounding to float16: no underflow, no overflow of the factor."""
    rows = 4096
    logits, labels = torch.randn(rows, 200).half(), torch.randint(0, 200, (rows,))
    exact = logits.double().requires_grad_()
    self_distillation_loss(exact, labels, 0.5, backend="reference").backward()
    for function in (self_distillation_loss, torch.compile(self_distillation_loss, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        (function(x, labels, 0.5, backend=backend) * scale).backward()
        error = (x.grad.double() / scale - exact.grad).abs().max()
        assert error <= 2**-11 * exact.grad.abs().max() + 2**-24 / scale


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_can_be_traced_and_batched(backend):
    logits, labels = inputs()
    loss = self_distillation_loss(logits, labels, 0.4, backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    batched = torch.autograd.grad(loss, logits, torch.tensor([1.0, 2.0]), is_grads_batched=True)[0]
    torch.testing.assert_close(batched, torch.stack([gradient, 2 * gradient]))

    def step(x):
        return torch.autograd.grad(self_distillation_loss(x, labels, 0.4, backend=backend), x)[0]

    traced = torch.fx.experimental.proxy_tensor.make_fx(step)(logits)
    torch.testing.assert_close(traced(logits), gradient)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(logits.detach()).requires_grad_()
        assert step(fake).shape == logits.shape


def test_compile_of_transposed_logits():
    def run(a, b, labels, reduction):
        return self_distillation_loss((a @ b).t(), labels, 0.5, reduction=reduction).sum()

    a, b, labels = torch.randn(5, 7).requires_grad_(), torch.randn(7, 4), torch.randint(0, 5, (4,))
    for reduction in ("mean", "none"):
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True)
        torch.testing.assert_close(
            loss_and_gradient(lambda x, f=compiled, r=reduction: f(x, b, labels, r), a),
            loss_and_gradient(lambda x, r=reduction: run(x, b, labels, r), a),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_a_clear_error(backend):
    logits, labels = inputs()
    for reduction in ("mean", "none"):
        loss = self_distillation_loss(logits, labels, 0.4, reduction=reduction, backend=backend).sum()
        with pytest.raises(RuntimeError, match=r"no second derivative; pass backend='reference'"):
            torch.autograd.grad(loss, logits, create_graph=True)
    loss = self_distillation_loss(logits, labels, 0.4, backend="reference")
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), logits)[0].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_mutated(backend):
    logits, labels = inputs()
    source, class_weight, row_weight = torch.randn(12, 7), torch.rand(7), torch.rand(12)
    given = (logits, labels, source, class_weight, row_weight)
    before = [t.detach().clone() for t in given]
    versions = [t._version for t in given]
    for reduction in ("mean", "none"):
        self_distillation_loss(
            logits, labels, sdfast.AdaptiveAlpha(1.0), source=source, class_weight=class_weight, row_weight=row_weight,
            reduction=reduction, backend=backend,
        ).sum().mul(2).backward()  # fmt: skip
    assert all(torch.equal(t.detach(), b) for t, b in zip(given, before, strict=True))
    assert [t._version for t in given] == versions


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_not_copied(backend):
    """After a plain ``loss.backward()`` the leaf holds the very memory that the forward wrote."""
    logits, labels = inputs()
    loss = self_distillation_loss(logits, labels, 0.4, backend=backend)
    written = loss.grad_fn.saved_tensors[0].data_ptr()
    loss.backward()
    assert logits.grad.data_ptr() == written


def test_no_gradient_is_computed_where_none_is_wanted():
    logits, labels = inputs()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = self_distillation_loss(logits, labels, 0.4)
        assert loss.grad_fn is None
    assert self_distillation_loss(logits.detach(), labels, 0.4).grad_fn is None
    with torch.inference_mode():
        made_inside = self_distillation_loss(torch.randn(3, 4), torch.tensor([0, 1, 2]), 0.5)
    assert made_inside.isfinite()


def test_targets_stay_detached():
    """No option is differentiated by: what would ask for it raises, and the source is cut off."""
    logits, labels = inputs()
    source = torch.randn(12, 7).requires_grad_()
    for backend in (None, "reference"):
        loss = self_distillation_loss(logits, labels, 0.4, source=source, label_fn="softmax", backend=backend)
        assert torch.autograd.grad(loss, [logits, source], allow_unused=True)[1] is None
        hidden = logits * 2
        loss = self_distillation_loss(hidden, labels, 0.4, source=hidden, backend=backend)
        plain = self_distillation_loss(hidden, labels, 0.4, backend=backend)
        torch.testing.assert_close(*[torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (loss, plain)])


@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compile_with_a_dynamic_batch_and_twenty_alphas(mode):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda x, y, a: self_distillation_loss(x * 2, y, a), fullgraph=True, dynamic=True, backend=mode
    )
    for i in range(20):
        logits, labels = inputs(rows=16 + i)
        alpha = i / 20
        results = [
            loss_and_gradient(lambda x, f=f, y=labels, a=alpha: 3 * f(x, y, a), logits)
            for f in (compiled, lambda x, y, a: self_distillation_loss(x * 2, y, a))
        ]
        torch.testing.assert_close(*results)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction, alpha):
    torch._dynamo.reset()
    logits, labels = inputs()
    a = ALPHAS[alpha](12)
    source = torch.randn(12, 7)

    def run(x):
        loss, stats = self_distillation_loss(
            x, labels, a, source=source, label_fn="softmax", temperature=0.5, reduction=reduction, return_stats=True
        )
        return loss + 0 * stats.accuracy

    torch.testing.assert_close(
        loss_and_gradient(torch.compile(run, fullgraph=True, backend="aot_eager"), logits),
        loss_and_gradient(run, logits),
    )


def test_export():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(5, 7)

        def forward(self, x, labels):
            return self_distillation_loss(self.layer(x), labels, sdfast.AdaptiveAlpha(1.0))

    model, batch = Model(), torch.export.Dim("batch")
    exported = torch.export.export(
        model, (torch.randn(4, 5), torch.randint(0, 7, (4,))), dynamic_shapes=({0: batch}, {0: batch})
    )
    assert any("sdfast._self_distillation" in str(node.target) for node in exported.graph.nodes)
    x, labels = torch.randn(9, 5), torch.randint(0, 7, (9,))
    torch.testing.assert_close(exported.module()(x, labels), model(x, labels))


def test_functorch_transforms_take_the_reference():
    logits, labels = inputs(dtype=torch.float64)
    x = logits.detach()

    def loss(x, y=labels, backend=None):
        return self_distillation_loss(x, y, 0.4, label_fn="softmax", temperature=0.5, backend=backend)

    gradient = torch.autograd.grad(loss(logits), logits)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x), gradient)
    per_row = torch.func.vmap(torch.func.grad(lambda r, y: loss(r, y)))(x, labels)
    torch.testing.assert_close(per_row / 12, gradient)
    hessian = torch.func.hessian(loss)(x)
    exact = torch.autograd.functional.hessian(lambda z: loss(z, backend="reference"), x)
    torch.testing.assert_close(hessian, exact)
    _, tangent = torch.func.jvp(loss, (x,), (torch.ones_like(x).cumsum(-1),))
    torch.testing.assert_close(tangent, (gradient * torch.ones_like(x).cumsum(-1)).sum())
    for transformed in (torch.func.vmap(torch.func.grad(lambda r, y: loss(r, y))), torch.func.grad(loss)):
        torch._dynamo.reset()
        arguments = (x, labels) if transformed.__name__ != "loss" else (x,)
        compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), transformed(*arguments))
    with pytest.raises(NotImplementedError, match=r"no rule for torch\.func transforms"):
        torch.func.grad(lambda z: loss(z, backend="cpu"))(x)


def test_autocast_and_grad_scaler():
    model, (x, labels) = torch.nn.Linear(7, 7), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x.detach())
        assert logits.dtype == torch.bfloat16
        loss = self_distillation_loss(logits, labels, 0.4)
    assert loss.dtype == torch.float32
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaled = model.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x.detach())
    self_distillation_loss(logits, labels, 0.4, backend="reference").backward()
    torch.testing.assert_close(scaled, model.weight.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    logits, labels = inputs()

    def run(x):
        return self_distillation_loss(x * 3, labels, sdfast.AdaptiveAlpha(1.0))

    torch.testing.assert_close(
        loss_and_gradient(lambda x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False), logits),
        loss_and_gradient(run, logits),
    )
    if reentrant:
        torch.utils.checkpoint.checkpoint(run, logits, use_reentrant=True).backward()
        torch.testing.assert_close(logits.grad, loss_and_gradient(run, logits)[1])


def _train_in_parallel(rank, world, port, results):
    """Accuracy 2/4 on one rank and 0/4 on the other: α = 1 − 2/8 on both."""
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model.module.weight.copy_(torch.eye(4))
    labels = torch.tensor([0, 1, 0, 0]) if rank == 0 else torch.tensor([1, 2, 3, 0])
    losses = []
    for alpha in (sdfast.AdaptiveAlpha(1.0, sync=True), sdfast.AdaptiveAlpha(1.0)):
        loss, stats = self_distillation_loss(model(torch.eye(4)), labels, alpha, return_stats=True)
        loss.backward()
        losses.append((loss.item(), stats.alpha.item()))
    results[rank] = (losses, model.module.weight.grad.tolist())
    torch.distributed.destroy_process_group()


def test_adaptive_alpha_over_two_processes():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_train_in_parallel, (2, port, results), nprocs=2)
        (losses0, gradient0), (losses1, gradient1) = results[0], results[1]
    assert [alpha for _, alpha in losses0] == [0.75, 0.5]
    assert [alpha for _, alpha in losses1] == [0.75, 1.0]
    assert gradient0 == gradient1


def test_sync_without_a_process_group_says_so():
    logits, labels = inputs()
    with pytest.raises(RuntimeError, match="init_process_group"):
        self_distillation_loss(logits, labels, sdfast.AdaptiveAlpha(1.0, sync=True))


def test_the_no_op_trap_warns_once(monkeypatch):
    from sdfast.ops.self_distillation import arguments

    logits, labels = inputs()
    no_ops = [{"label_fn": "softmax", "loss": loss} for loss in ("cross_entropy", "kl", "brier")]
    no_ops.append({"label_fn": "identity", "loss": "mse"})
    for options in no_ops:
        monkeypatch.setattr(arguments, "_warned", False)
        with pytest.warns(UserWarning, match="exactly alpha times the plain loss's gradient"):
            self_distillation_loss(logits, labels, 0.4, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self_distillation_loss(logits, labels, 0.4, **options)
    monkeypatch.setattr(arguments, "_warned", False)
    taught = ({"label_fn": "softmax", "temperature": 0.5}, {"label_fn": "hardmax"},
              {"label_fn": "softmax", "source": logits.detach()}, {"label_fn": "identity", "loss": "mse",
              "source": logits.detach()}, {"label_fn": "softmax", "class_weight": torch.rand(7)})  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in taught:
            self_distillation_loss(logits, labels, 0.4, **options)
        self_distillation_loss(logits, labels, 1.0, label_fn="softmax")


def test_every_public_operation_gives_a_gradient():
    """opcheck passes operations without any backward; this does not."""
    logits, labels = inputs()
    self_distillation_loss(logits, labels, 0.4).backward()
    assert logits.grad.abs().sum() > 0
