"""Convolutions run with the channels last where that is faster, with the same result; other models as they are."""

import functools
import warnings

import pytest
import torch
from torch import nn

from sdfast.ntk import gram, memory_format, operator, plan, probe, sample_gradients
from sdfast.ntk.repeated import RepeatedGram

from .oracle import assert_exact, gram_of, jacobian

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


class Pictures(nn.Module):
    """Two convolutions; notes the memory format of what it is called with."""

    seen: list[bool] = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, 2), nn.Linear(36, 2)

    def forward(self, x):
        Pictures.seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return self.last(self.flat(torch.tanh(self.second(torch.tanh(self.first(x))))))

    def flat(self, x):
        return x.flatten(1)


class Views(Pictures):
    def flat(self, x):
        if not x.is_contiguous():
            warnings.warn("strides", stacklevel=1)
        return x.view(len(x), -1)


class LooksAtStrides(Pictures):
    def flat(self, x):
        return x.flatten(1) * (1 if x.is_contiguous() else 1.5)


class LooksAtStridesALittle(Pictures):
    def flat(self, x):
        return x.flatten(1) * (1 if x.is_contiguous() else 1.0009)


class TakesAnotherPath(Pictures):
    def flat(self, x):
        return x.flatten(1) if x.is_contiguous() else (x + 0).flatten(1)


class GivesOthersGradients(Pictures):
    class Flat(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.shape, ctx.scale = x.shape, 1 if x.is_contiguous() else 1.5
            return x.flatten(1)

        @staticmethod
        def backward(ctx, gradient):
            return ctx.scale * gradient.reshape(ctx.shape)

    def flat(self, x):
        return self.Flat.apply(x)


class GivesNearlyTheirGradients(GivesOthersGradients):
    class Flat(GivesOthersGradients.Flat):
        @staticmethod
        def backward(ctx, gradient):
            return (1 if ctx.scale == 1 else 1.03) * gradient.reshape(ctx.shape)


class FailsBackwards(GivesOthersGradients):
    class Flat(GivesOthersGradients.Flat):
        @staticmethod
        def backward(ctx, gradient):
            if ctx.scale != 1:
                raise RuntimeError("view size is not compatible")
            return gradient.reshape(ctx.shape)


def given_last(compute):
    """What it gives, and the memory formats of the calls."""
    Pictures.seen.clear()
    result = compute()
    return result, list(Pictures.seen)


@pytest.fixture
def as_given(monkeypatch):
    """Computes with all models in the format of their inputs."""

    def compute(step):
        with monkeypatch.context() as patch:
            patch.setattr(probe, "may_be_faster", lambda *arguments: False)
            return given_last(step)

    return compute


def test_convolutions_are_given_their_channels_last(as_given):
    model, x = Pictures(), torch.randn(50, 3, 9, 9)
    exact = gram_of(jacobian(model.double(), x.double()), "trace")
    model.float()
    whole, formats = given_last(lambda: gram(model, x, outputs="trace", batch_size=20))
    assert not any(formats[:5]), "the guards see the model as it was given"
    assert all(formats[-3:])
    assert_exact(whole, exact, 1e-5)
    again, formats = given_last(lambda: gram(model, x, outputs="trace", batch_size=20))
    assert all(formats)
    assert torch.equal(again, whole)
    columns = gram(model, x, x[:7], outputs="trace")
    torch.testing.assert_close(columns, whole[:, :7], rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
    assert x.is_contiguous()
    assert model.first.weight.is_contiguous()


def test_gradients_and_products_are_those_of_the_model_as_it_is_given(as_given):
    model, x = Pictures(), torch.randn(40, 3, 9, 9)
    ours, formats = given_last(lambda: sample_gradients(model, x, outputs=0))
    assert all(formats[-1:])
    theirs, formats = as_given(lambda: sample_gradients(unknown_copy(model), x, outputs=0))
    assert not any(formats)
    for name, rows in theirs.items():
        torch.testing.assert_close(ours[name], rows, rtol=1e-4, atol=1e-5)
    vectors = torch.randn(80, 3)
    product, formats = given_last(lambda: operator(model, x, outputs="full") @ vectors)
    assert all(formats[-1:])
    other, _ = as_given(lambda: operator(unknown_copy(model), x, outputs="full") @ vectors)
    torch.testing.assert_close(product, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert plan(model, x, outputs="sum", calibrate=True).seconds.total > 0


def unknown_copy(model):
    """The same model, of which nothing is known yet."""
    copied = type(model)()
    copied.load_state_dict(model.state_dict())
    return copied


@pytest.mark.parametrize(
    "network",
    [Views, LooksAtStrides, LooksAtStridesALittle, TakesAnotherPath, GivesOthersGradients, GivesNearlyTheirGradients,
     FailsBackwards],
    ids=lambda network: network.__name__,
)  # fmt: skip
def test_a_model_that_minds_is_run_as_it_is(network, as_given):
    model, x = network(), torch.randn(50, 3, 9, 9)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        whole, formats = given_last(lambda: gram(model, x, outputs="trace"))
    assert not told
    assert any(formats), "it was not tried"
    assert not any(formats[-1:])
    plain, formats = as_given(lambda: gram(unknown_copy(model), x, outputs="trace"))
    assert not any(formats)
    assert torch.equal(whole, plain)


def test_pictures_that_are_so_already_stay_so():
    model, x = Pictures(), torch.randn(50, 3, 9, 9).to(memory_format=torch.channels_last)
    _, formats = given_last(lambda: gram(model, x, outputs="trace"))
    assert all(formats)


@pytest.mark.parametrize("before", [4, 50], ids=["few before", "many before"])
def test_the_same_call_computes_the_same_bits_whatever_came_before(before):
    """Findings of other sizes, by which the other memory format was chosen, do not serve."""
    model, x = Pictures(), torch.randn(50, 3, 9, 9)
    now = x[: 54 - before]
    fresh, formats = given_last(lambda: gram(unknown_copy(model), now, outputs="trace"))
    assert formats[-1] == (before == 4)
    gram(model, x[:before], outputs="trace")
    for compute in (lambda: gram(model, now, outputs="trace"), lambda: RepeatedGram("trace")(model, now)[0]):
        kept, seen = given_last(compute)
        assert seen[-1] == formats[-1]
        assert torch.equal(kept, fresh)


class Switched(Pictures):
    views = False

    def flat(self, x):
        return x.view(len(x), -1) if Switched.views else x.flatten(1)


@pytest.mark.parametrize("outputs", ["sum", "trace"])
def test_a_model_that_minds_by_now_is_run_as_it_is(outputs, monkeypatch):
    """By what no attribute of its modules shows."""
    model, x = Switched(), torch.randn(50, 3, 9, 9)
    before, formats = given_last(lambda: gram(model, x, outputs=outputs))
    assert formats[-1]
    monkeypatch.setattr(Switched, "views", True)
    now, formats = given_last(lambda: gram(model, x, outputs=outputs))
    assert not formats[-1]
    torch.testing.assert_close(now, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


class MindsManySamples(Pictures):
    """Fails where the trial, of three samples, did not."""

    def flat(self, x):
        if len(x) > 3 and not x.is_contiguous():
            raise RuntimeError("view size is not compatible")
        return x.flatten(1)


class TakesAnotherPathOnManySamples(Pictures):
    def flat(self, x):
        return x.flatten(1) if len(x) <= 3 or x.is_contiguous() else (x + 0).flatten(1)


@pytest.mark.filterwarnings("error:one backward pass")
@pytest.mark.parametrize("network", [MindsManySamples, TakesAnotherPathOnManySamples])
@pytest.mark.parametrize("outputs", ["sum", "trace"])
def test_a_model_that_minds_on_more_samples_is_run_as_it_is(outputs, network, as_given, tmp_path):
    x = torch.randn(50, 3, 9, 9)
    for number, compute in enumerate(
        (
            lambda model: gram(model, x, outputs=outputs),
            lambda model: gram(model, x, outputs=outputs, checkpoint=tmp_path / "c.pt"),
            lambda model: gram(model, x[:7], x, outputs=outputs),
            lambda model: RepeatedGram(outputs)(model, x)[0],
            lambda model: operator(model, x, outputs=outputs).to_dense(),
            lambda model: plan(model, x, outputs=outputs, calibrate=True).flops,
        )
    ):
        model = network()
        ours, formats = given_last(functools.partial(compute, model))
        assert number == 2 or any(formats)  # of few rows it is not tried
        assert not formats[-1]
        again, formats = given_last(functools.partial(compute, model))
        assert not any(formats), "it was tried again"
        (tmp_path / "c.pt").unlink(missing_ok=True)
        theirs, _ = as_given(functools.partial(compute, unknown_copy(model)))
        assert ours == again == theirs if number == 5 else torch.equal(ours, theirs) and torch.equal(ours, again)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True)], ids=["group", "instance"])
def test_the_last_micro_batch_may_be_of_one_sample(norm):
    model, x = Pictures(), torch.randn(21, 3, 9, 9)
    model.first = nn.Sequential(nn.Conv2d(3, 6, 3), norm)
    exact = gram_of(jacobian(model.double(), x.double()), "trace")
    model.float()
    whole, formats = given_last(lambda: gram(model, x, outputs="trace", batch_size=10))
    assert all(formats[-3:])
    assert_exact(whole, exact, 1e-5)
    alone = gram(model, x[:1].to(memory_format=torch.channels_last), outputs="trace")
    assert_exact(alone, exact[:1, :1], 1e-5)


def test_sizes_decide():
    """Two convolutions or more in float32 on pictures, small beside the activations."""
    model, x = Pictures(), torch.randn(50, 3, 9, 9)
    convolutions = {"first.weight": ["convolution 2d"], "second.weight": ["convolution 2d"], "last.weight": ["linear"]}
    parameters = dict(model.named_parameters())
    weights = 4 * (6 * 27 + 4 * 54)
    enough = -(-8 * weights // 50)

    def tried(inputs=x, named=parameters, rules=convolutions, activations=enough):
        return memory_format.may_be_faster(memory_format.Inputs({0: inputs}, x.device, "x"), named, rules, activations)

    assert tried()
    assert not tried(activations=enough - 1)
    assert not tried(inputs=x[:49])
    assert tried(inputs=torch.randn(128, 3, 9, 9), activations=-(-8 * weights // 128))
    assert not tried(inputs=torch.randn(500, 3, 9, 9), activations=-(-8 * weights // 128) - 1)
    assert not tried(rules={"first.weight": ["convolution 2d"], "last.weight": ["linear"]})
    assert not tried(named={name: value.double() for name, value in parameters.items()})
    assert not tried(inputs=x.to(memory_format=torch.channels_last))
    assert not tried(inputs=torch.randn(50, 12))
