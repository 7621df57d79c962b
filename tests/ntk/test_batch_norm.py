"""Batch norm by running statistics: the same output, and torch's gradient of the input by one product."""

from fnmatch import fnmatch

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sdfast.ntk import batch_norm, gram
from sdfast.ntk.capture import ParameterMode

from .oracle import assert_exact, gram_of, jacobian

SHAPES = [(5, 3), (4, 3, 7), (4, 3, 5, 6), (2, 3, 2, 3, 4), (0, 3, 2)]


def statistics(dtype, channels=3):
    mean, variance, weight, bias = torch.randn(4, channels, dtype=dtype)
    return mean, variance.square(), weight, bias


@pytest.fixture
def products(monkeypatch):
    """How often the product took the place of torch's backward."""
    count = [0]
    backward = batch_norm._Scaled.backward

    def counted(ctx, *gradients):
        count[0] += 1
        return backward(ctx, *gradients)

    monkeypatch.setattr(batch_norm._Scaled, "backward", staticmethod(counted))
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_output_and_gradient(shape, affine, dtype, products):
    mean, variance, weight, bias = statistics(dtype)
    weight = weight if affine in ("both", "weight") else None
    bias = bias if affine in ("both", "bias") else None
    x, gradient = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=dtype)
    exactly = x.detach().double().requires_grad_()
    exact = functional.batch_norm(exactly, *(t if t is None else t.double() for t in (mean, variance, weight, bias)))
    (wanted,) = torch.autograd.grad(exact, exactly, gradient.double())
    torchs = functional.batch_norm(x, mean, variance, weight, bias)
    for func, args, kwargs in (
        (functional.batch_norm, (x, mean, variance, weight, bias), {}),
        (functional.batch_norm, (x, mean), {"running_var": variance, "bias": bias, "weight": weight, "eps": 1e-5}),
        (torch.batch_norm, (x, weight, bias, mean, variance, False, 0.1, 1e-5, True), {}),
    ):
        ours = batch_norm.run(func, args, kwargs, frozenset())
        assert torch.equal(ours, torchs)
        (got,) = torch.autograd.grad(ours, x, gradient)
        theirs = torch.autograd.grad(torchs, x, gradient, retain_graph=True)[0]
        if x.numel():
            error, ulp = (theirs - wanted).abs().max(), torch.finfo(dtype).eps * wanted.abs().max()
            assert (got - wanted).abs().max() <= 2 * error + ulp
    assert products[0] == 3


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_the_memory_format_and_epsilon(epsilon):
    mean, variance, weight, bias = statistics(torch.float64)
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    ours = batch_norm.run(
        functional.batch_norm, (x, mean, variance, weight, bias, False, 0.1, epsilon), {}, frozenset()
    )
    assert ours.is_contiguous(memory_format=torch.channels_last)
    theirs = functional.batch_norm(x, mean, variance, weight, bias, eps=epsilon)
    gradient = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, gradient), torch.autograd.grad(theirs, x, gradient), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["weight", "bias", "computed", "trains", "no statistics", "constant", "no gradients"])
def test_whose_gradients_autograd_may_be_asked_for_is_left_to_torch(kind, products):
    mean, variance, weight, bias = statistics(torch.float32)
    x = torch.randn(4, 3, 5, requires_grad=kind != "constant")
    wanted = {"weight": weight, "bias": bias}.get(kind, x)
    wanted.requires_grad_(kind != "constant")
    weight = weight.requires_grad_().exp() if kind == "computed" else weight
    running = (None, None) if kind == "no statistics" else (mean, variance)
    training = kind in ("trains", "no statistics")
    with torch.set_grad_enabled(kind != "no gradients"):
        result = batch_norm.run(
            functional.batch_norm, (x, *running, weight, bias, training), {}, {id(weight), id(bias)}
        )
    if kind in ("constant", "no gradients"):
        assert not result.requires_grad
    else:
        torch.autograd.grad(result.square().sum(), wanted)
    assert products[0] == 0


def test_a_tapped_weight_is_a_constant(products):
    mean, variance, weight, bias = statistics(torch.float32)
    x = torch.randn(4, 3, 5, requires_grad=True)
    weight.requires_grad_()
    result = batch_norm.run(functional.batch_norm, (x, mean, variance, weight, bias), {}, {id(bias)})
    gradients = torch.autograd.grad(result.square().sum(), (x, weight), allow_unused=True)
    assert gradients[1] is None
    assert products[0] == 1


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return 3 * weight

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


def computed_weight(norm, x):
    return functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight.exp())


def used_unseen(norm, x):
    """The weight is used where no torch function shows it."""
    return norm(x) * Hidden.apply(norm.weight).view(1, -1, 1, 1)


def of_its_input(norm, x):
    x = norm(x)
    return x + torch.autograd.grad(x.square().sum(), x, create_graph=True)[0]


def of_its_weight(norm, x):
    """Looks at a gradient, and does not use it."""
    x = norm(x)
    if norm.weight.requires_grad:
        torch.autograd.grad(x.square().mean(), norm.weight, retain_graph=True)[0].norm()
    return x


def backwards(norm, x):
    leaf = x.detach().requires_grad_()
    norm(leaf).square().sum().backward()
    assert norm.weight.grad is not None or not norm.weight.requires_grad
    norm.weight.grad = norm.bias.grad = None
    return norm(x)


def by_name(norm, x):
    """Looks at its own graph."""
    x = norm(x)
    return x * (2 if "BatchNorm" in x.grad_fn.name() else 1)


def checkpointed(norm, x, **options):
    return checkpoint(norm, x, use_reentrant=False, **options)


def unchecked(norm, x):
    return checkpointed(norm, x, determinism_check="none")


def rounded(norm, x):
    """What it keeps for its backward is rounded."""
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept.bfloat16(), lambda kept: kept.double()):
        return norm(x)


def transformed(norm, x):
    """Its gradient, by ``torch.func``."""
    return torch.func.grad(lambda data: norm(data).pow(3).sum())(x)


def forward_mode(norm, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(norm(forward_ad.make_dual(x, x))).tangent


USES = [computed_weight, used_unseen, of_its_input, of_its_weight, backwards, by_name, checkpointed, unchecked, rounded,
        transformed, forward_mode]  # fmt: skip


class Blocks(nn.Module):
    """A convolution and batch norm twice, the second one used in a way of its own."""

    def __init__(self, use=lambda norm, x: norm(x)):
        super().__init__()
        self.use = use
        self.first, self.one = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 2)
        for norm in (self.one, self.two):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, x):
        x = torch.tanh(self.one(self.first(x)))
        return self.last(self.use(self.two, self.second(x)).mul_(2).square().mean((2, 3)))


def assert_kernels_exact(model, x, params=None):
    names = {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (params is None or any(fnmatch(name, pattern) for pattern in params))
    }
    exact = gram_of(jacobian(model, x, names), "trace")
    for options in ({}, {"batch_size": 4}, {"memory": 5000}):
        assert_exact(gram(model, x, outputs="trace", params=params, **options), exact)


@pytest.mark.parametrize("params", [None, ["*weight"], ["two.bias"], ["one.weight", "second.bias"]], ids=str)
def test_kernels_are_exact_for_every_part_of_the_parameters(params, products):
    assert_kernels_exact(Blocks().double(), torch.randn(9, 3, 6, 6, dtype=torch.float64), params)
    assert products[0] or params == ["two.bias"], "of that none is below batch norm"


@pytest.mark.filterwarnings("ignore:one backward pass", "ignore:no output depends")
@pytest.mark.parametrize("frozen", [False, True], ids=["trains", "frozen"])
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_kernels_of_models_that_would_see_it_are_exact(use, frozen):
    """Models that take gradients inside, keep little for the backward, or look at their graph."""
    model, x = Blocks(use).double(), torch.randn(9, 3, 6, 6, dtype=torch.float64)
    if frozen:
        model.two.requires_grad_(False)
    elif use in (rounded, transformed, forward_mode):
        pytest.skip("gradients of its weight are rounded, or cannot be tapped, whatever batch norm does")
    assert_kernels_exact(model, x)


def test_the_product_is_used_whatever_part_of_the_parameters_a_pass_follows(products):
    model, x = Blocks(), torch.randn(9, 3, 6, 6)
    gram(model, x, outputs="trace", memory=9 * 2 * 4 * 60)
    assert products[0] > 20


def test_a_mode_that_does_not_tap_leaves_it_to_torch(products):
    model, x = Blocks(), torch.randn(3, 3, 6, 6)
    with ParameterMode(dict(model.named_parameters())):
        output = model(x)
    torch.autograd.grad(output.sum(), list(model.parameters()))
    assert products[0] == 0
