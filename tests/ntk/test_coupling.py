"""A sample's output and gradient are its own: whatever else it may depend on is found and refused, never mixed in."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sdfast.ntk import gram, sample_gradients
from sdfast.ntk.coupling import refuse_other_answers

from .oracle import assert_exact, gram_of, jacobian
from .test_layers import Functional
from .test_zoo import _double, _no_fallback  # noqa: F401

OTHER_SAMPLE = "changes with another sample"


class Shared(torch.autograd.Function):
    """Adds up the gradients of all samples, and shows nothing of it in the forward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g + g.sum(0, keepdim=True)


class Exchanged(Shared):
    """Gives all samples but the first each other's gradients."""

    @staticmethod
    def backward(ctx, g):
        return torch.cat([g[:1], g[1:].flip(0)])


def centred(s, x):
    out = F.linear(x, s.w)
    return out + out.mean(0) - out.mean(0).detach()


def by_the_sign_of_the_batch(s, x):
    out = F.linear(x, s.w)
    return out.tanh() if x.sum() > 0 else out


def beyond(size):
    """Coupled in batches that are larger than the probe's."""
    return lambda s, x: F.linear(x, s.w) + (F.linear(x, s.w).roll(size, 0) if len(x) > size else 0)


COUPLED = {
    "gradients by a detached mean": (centred, "the gradient of one sample's output by w " + OTHER_SAMPLE),
    "gradients by a backward of its own": (
        lambda s, x: Shared.apply(F.linear(x, s.w)),
        "the gradient of one sample's output by w " + OTHER_SAMPLE,
    ),
    "gradients of all samples but the first": (
        lambda s, x: Exchanged.apply(F.linear(x, s.w)),
        "the gradient of one sample's output by w " + OTHER_SAMPLE,
    ),
    "place": (
        lambda s, x: F.linear(x, s.w) * torch.arange(1.0, len(x) + 1)[:, None],
        "changes with its place in the batch, or with their number",
    ),
    "a parameter by place": (lambda s, x: F.linear(x, s.w) + s.t[: len(x)], "changes with its place"),
    "size": (lambda s, x: F.linear(x, s.w) * len(x), "changes with its place in the batch, or with their number"),
    "larger batches": (beyond(4), "the output of sample 0 is another in a batch of 8 than of 3"),
    # Which guard sees it first depends on the draw.
    "a path chosen by the batch": (by_the_sign_of_the_batch, "only batch norm in training mode may couple samples"),
}


@pytest.mark.parametrize("name", COUPLED)
def test_what_a_micro_batch_would_change_is_refused(name):
    forward, message = COUPLED[name]
    model = Functional(forward, w=(2, 3), t=(8, 2))
    x = torch.randn(8, 3)
    x[:4], x[4:] = x[:4] - x[:4].mean() - 0.5, x[4:] - x[4:].mean() + 0.7  # batches of either sign
    with pytest.raises(ValueError, match=message):
        gram(model, x, outputs="sum")


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 2, 2)])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_coupled_by_what_has_no_floats(kind, shape):
    x = torch.zeros(shape, dtype=kind)
    x[::2] = 1
    width = x[0].numel()
    model = Functional(lambda s, x: F.linear((x.double() - x.double().mean(0)).reshape(-1, width), s.w), w=(2, width))
    with pytest.raises(ValueError, match="of one sample " + OTHER_SAMPLE):
        gram(model, x, outputs="trace")


def test_masks_alone_are_samples_too():
    model = Functional(lambda s, x: F.linear(x.double(), s.w).tanh(), w=(2, 5))
    x = torch.rand(7, 5) > 0.5
    for size in (1, 3, 7):
        assert_exact(gram(model, x, outputs="trace", batch_size=size), gram_of(jacobian(model, x), "trace"))


def test_a_path_of_each_sample_s_own_is_exact():
    """Values are read, and no sample's path depends on another's."""

    def forward(s, x):
        return torch.stack([F.linear(row, s.a) if row.sum() > 0 else F.linear(row, s.b).tanh() for row in x])

    model, x = Functional(forward, a=(2, 3), b=(2, 3)), torch.randn(7, 3)
    x[:2] = torch.stack([x[0].abs(), -x[1].abs()])  # both ways are taken
    for size in (1, 3, 7):
        with pytest.warns(UserWarning, match="one backward pass for each sample and output"):
            got = gram(model, x, outputs="trace", batch_size=size)
        assert_exact(got, gram_of(jacobian(model, x), "trace"))


@pytest.mark.parametrize("kind", ["buffer", "attribute", "generator", "spectral norm"])
def test_a_state_between_calls_is_no_coupling(kind):
    """It is refused as what it is."""
    calls, generator = itertools.count(1), torch.Generator()
    model = {
        "buffer": Functional(lambda s, x: F.linear(x, s.w) * s.calls.add_(1), w=(2, 3)),
        "attribute": Functional(lambda s, x: F.linear(x, s.w) * next(calls), w=(2, 3)),
        "generator": Functional(lambda s, x: F.linear(x, s.w) * torch.rand(2, generator=generator), w=(2, 3)),
        "spectral norm": nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)),
    }[kind]
    model.register_buffer("calls", torch.zeros(()))
    with pytest.raises(
        ValueError, match=r"model: called again on the same samples .* keeps a state or draws .*eval\(\)"
    ):
        gram(model, torch.randn(5, 3), outputs="sum")
    assert model.calls == 0


def test_few_bits_inside_are_refused():
    def cast(s, x):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, s.w).float()

    for forward in (cast, lambda s, x: F.linear(x, s.w).bfloat16().float()):
        model, x = Functional(forward, w=(2, 3)).float(), torch.randn(5, 3, dtype=torch.float32)
        with pytest.raises(
            TypeError, match=r"model: .* computes in bfloat16, and gradients are taken in full precision"
        ):
            gram(model, x, outputs="sum")


def test_a_backbone_in_inference_mode_is_a_constant():
    backbone = nn.Sequential(nn.Linear(3, 4), nn.Tanh())

    def forward(s, x):
        with torch.inference_mode():
            x = backbone(x)
        return F.linear(x.clone(), s.w)

    model, x = Functional(forward, w=(2, 4)), torch.randn(5, 3)
    assert_exact(gram(model, x, outputs="trace"), gram_of(jacobian(model, x), "trace"))
    model = Functional(torch.inference_mode()(lambda s, x: F.linear(x, s.w)), w=(2, 3))
    with pytest.raises(ValueError, match="model: its output is a constant"):
        gram(model, x, outputs="sum")


def test_parameters_without_elements_or_without_a_shape():
    model, x = Functional(lambda s, x: F.linear(x, s.w) + s.e.sum(), w=(2, 3), e=(0, 3)), torch.randn(5, 3)
    assert_exact(gram(model, x, outputs="trace"), gram_of(jacobian(model, x), "trace"))
    assert sample_gradients(model, x, outputs="sum")["e"].shape == (5, 0, 3)
    with pytest.raises(ValueError, match="model: parameter weight has no shape yet; call the model once"):
        gram(nn.LazyLinear(2), x, outputs="sum")


def test_a_sparse_buffer_and_weights_that_a_forward_clips():
    model = Functional(
        lambda s, x: (s.w.data.clamp_(-0.1, 0.1), torch.sparse.mm(s.graph, F.linear(x, s.w).T).T)[1], w=(3, 3)
    )
    model.register_buffer("graph", torch.eye(3).to_sparse())
    before = model.w.detach().clone()
    x = torch.randn(5, 3)
    got = gram(model, x, outputs="trace")
    assert torch.equal(model.w, before)
    assert_exact(got, gram_of(jacobian(model, x), "trace"))


class Looking(nn.Module):
    """Takes another path where one number of the batch is large."""

    def __init__(self, look):
        super().__init__()
        self.layer, self.look = nn.Linear(4, 1), look

    def forward(self, x):
        return self.layer(torch.tanh(x)) * (3 if self.look(x) else 1)


LOOKS = {
    "torch.equal": lambda x: not torch.equal(x.clamp(max=50), x),
    "torch.allclose": lambda x: not torch.allclose(x.clamp(max=50), x),
    "an array": lambda x: bool((np.asarray(x) > 50).any()),
    "in": lambda x: 77.0 in x,
    "a length": lambda x: len(x[x > 50]) > 0,
    "a shape": lambda x: x[x > 50].shape[0] > 0,
    "numel": lambda x: torch.nonzero(x > 50).numel() > 0,
}


@pytest.mark.filterwarnings("ignore:one backward pass")
@pytest.mark.parametrize("look", LOOKS)
def test_whatever_makes_python_of_values_is_seen(look):
    x = torch.randn(200, 4).double().clamp(-5, 5)
    x[70, 0] = 77.0  # none of those that the probe looks at, and not in the same half of a micro-batch as all others
    with pytest.raises(ValueError, match="only batch norm in training mode may couple samples"):
        gram(Looking(LOOKS[look]).double(), x)


def test_an_output_that_is_nearly_zero_is_no_coupling():
    """A sum of large numbers is rounded by their size, whatever is left of it."""
    columns = torch.randn(40, 1, dtype=torch.float32) + 10
    columns[7] = 1e-4
    refuse_other_answers({107: columns[7] + 1e-5}, columns, 100)
    with pytest.raises(ValueError, match="the output of sample 107 is another in a batch of 40 than of 3"):
        refuse_other_answers({107: columns[7] + 0.1}, columns, 100)
