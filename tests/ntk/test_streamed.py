"""Layers whose factors are held, and gradients formed a few columns at a time: against the Jacobian by autograd."""

import pytest
import torch
from torch import nn

from sdfast.ntk import costs, gram, plan

from .oracle import assert_exact, gram_of, jacobian

POSITIONS = 5


class Layers(nn.Module):
    """An embedding, a linear layer, a product and an addmm over several positions, and two outputs."""

    def __init__(self, padding=None):
        super().__init__()
        self.entry = nn.Embedding(11, 12, padding_idx=padding)
        self.linear = nn.Linear(12, 13)
        self.matrix = nn.Parameter(torch.randn(13, 14) / 4)
        self.offset = nn.Parameter(torch.randn(15))
        self.other = nn.Parameter(torch.randn(14, 15) / 4)
        self.head = nn.Linear(15, 2)

    def forward(self, tokens):
        x = torch.tanh(self.linear(self.entry(tokens)))
        x = torch.tanh(x @ self.matrix)
        x = torch.addmm(self.offset, x.flatten(0, 1), self.other).view(*tokens.shape, 15)
        return self.head(torch.sin(x).mean(1))


WEIGHTS = {"entry.weight", "linear.weight", "matrix", "other"}


@pytest.fixture(params=["all columns at once", "a few at a time"], autouse=True)
def columns(request, monkeypatch):
    """Panels of a whole layer, and of few of its columns, the last of them ragged."""
    if request.param == "a few at a time":
        monkeypatch.setattr(costs, "TERMS", 1)
        monkeypatch.setattr(costs, "_PANEL", 8 * 9 * 25)


def tokens(n, vocabulary=11):
    return torch.randint(0, vocabulary, (n, POSITIONS))


def streamed(made):
    return {entry.name for entry in made.entries if entry.method == "stream"}


@pytest.mark.parametrize("outputs", ["sum", "trace", "mean", "per_class", "full", 1])
@pytest.mark.parametrize("padding", [None, 3])
def test_every_form_is_exact(outputs, padding):
    model, x, other = Layers(padding).double(), tokens(9), tokens(4)
    assert streamed(plan(model, x, outputs=outputs)) == WEIGHTS
    mine, theirs = jacobian(model, x), jacobian(model, other)
    for batch_size in (None, 2):  # one micro-batch; several, the last of them ragged
        assert_exact(gram(model, x, outputs=outputs, batch_size=batch_size), gram_of(mine, outputs))
        assert_exact(gram(model, x, other, outputs=outputs, batch_size=batch_size), gram_of(mine, outputs, theirs))


def test_several_tiles():
    model, x = Layers().double(), tokens(530)
    rows = jacobian(model, x).sum(1)
    assert streamed(plan(model, x, outputs="sum")) >= WEIGHTS
    got = gram(model, x, outputs="sum")
    assert_exact(got, rows @ rows.T)
    assert torch.equal(got, got.T)


def test_an_output_that_does_not_reach_a_layer():
    """It delivers no factors: its gradients are zero."""

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(12, 13), nn.Linear(12, 13)

        def forward(self, x):
            return torch.stack([self.left(x).tanh().sum((1, 2)), self.right(x).sin().sum((1, 2))], 1)

    model, x = Apart().double(), torch.randn(7, POSITIONS, 12, dtype=torch.float64)
    for outputs in ("per_class", "trace", "full"):
        assert streamed(plan(model, x, outputs=outputs)) == {"left.weight", "right.weight"}
        assert_exact(gram(model, x, outputs=outputs, batch_size=3), gram_of(jacobian(model, x), outputs))


def test_an_input_that_is_kept_in_a_buffer():
    """The next micro-batch writes over it: every parameter is looped, and said to be."""

    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 13)
            self.memory = torch.zeros(4, POSITIONS, 12, dtype=torch.float64)

        def forward(self, x):
            if len(x) != len(self.memory):
                return self.layer(x).tanh().sum((1, 2))
            return self.layer(self.memory.copy_(x)).tanh().sum((1, 2))

    model, x = Buffered().double(), torch.randn(8, POSITIONS, 12, dtype=torch.float64)
    assert streamed(plan(model, x)) == {"layer.weight"}
    wanted = gram_of(torch.cat([jacobian(model, few.clone()) for few in x.split(4)]), None)
    with pytest.warns(UserWarning, match="overwritten by a later"):
        got = gram(model, x, batch_size=4)
    assert_exact(got, wanted)


def test_gradients_of_a_broadcast_output():
    """Their entries are one number in many places: a layout that no product takes."""
    model = nn.Sequential(nn.Linear(12, 13)).double()
    x = torch.randn(6, POSITIONS, 12, dtype=torch.float64)
    assert streamed(plan(model, x, outputs="sum")) == {"0.weight"}
    assert_exact(gram(model, x, outputs="sum", batch_size=4), gram_of(jacobian(model, x), "sum"))


def test_a_gradient_that_is_not_finite_is_named():
    model, x = Layers(), tokens(6)
    with torch.no_grad():
        model.linear.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"model: gradients of .*linear\.weight"):
        gram(model, x, outputs="sum")


def test_float32_is_as_exact_as_torch():
    model, x = Layers(), tokens(40)
    exact = jacobian(model.double(), x).sum(1)
    exact = exact @ exact.T
    rows = jacobian(model.float(), x).sum(1)
    assert streamed(plan(model, x, outputs="sum")) >= WEIGHTS
    error, theirs = ((h.double() - exact).norm() / exact.norm() for h in (gram(model, x, outputs="sum"), rows @ rows.T))
    assert error <= 2 * max(theirs, 2.0**-24)


def test_what_the_plan_says():
    """Factors are held in place of gradients: one pass where whole gradients would take several."""
    model, x = Layers(), tokens(20)
    made = plan(model, x, outputs="sum", calibrate=True)
    entry = next(entry for entry in made.entries if entry.name == "linear.weight")
    assert entry.memory == 20 * POSITIONS * (12 + 13) * 4
    assert entry.gradient_flops == 20 * 2 * POSITIONS * 12 * 13
    assert entry.product_flops == 20 * 20 * 12 * 13
    assert entry.bytes == 2 * entry.memory + 2 * 20 * 12 * 13 * 4
    assert made.passes == 1
    assert min(made.seconds) > 0
    small = plan(model, x, outputs="sum", memory=20 * 4 * 13)
    assert not streamed(small)
    assert small.passes > 1
