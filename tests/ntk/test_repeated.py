"""The kernel of a model that trains: equal to a fresh one in every bit, whatever is kept from look to look."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sdfast.ntk import gram, repeated
from sdfast.ntk.repeated import RepeatedGram

from . import zoo


def moved(model):
    """As a step of training moves it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


@pytest.fixture
def probes(monkeypatch):
    """Of each Source made for a look, whether it probed."""
    seen = []
    original = repeated.Source

    def counted(*arguments, **options):
        seen.append(len(arguments) < 6)
        return original(*arguments, **options)

    monkeypatch.setattr(repeated, "Source", counted)
    return seen


class Switching(nn.Module):
    """Takes another path where it is told to, by a plain attribute, or by a list that nobody watches."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)
        self.twice, self.hidden = False, [False]

    def forward(self, x):
        x = torch.tanh(self.first(x))
        if self.twice or self.hidden[0]:
            x = torch.sigmoid(x) + F.linear(x, self.first.weight @ self.first.weight.T)
        return self.second(x)


def same(kernel, model, x, outputs="trace"):
    got, output = kernel(model, x)
    assert torch.equal(got, gram(model, x, outputs=outputs))
    assert torch.allclose(output, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outputs", ["trace", "sum", 1])
def test_every_look_is_a_fresh_gram(outputs, probes):
    for model, x in ((zoo.mlp(), torch.randn(70, 4)), (zoo.GPT().eval(), zoo.tokens(5))):
        kernel = RepeatedGram(outputs, afresh=3)
        probes.clear()
        for _ in range(7):
            same(kernel, model, x, outputs)
            moved(model)
        assert probes == [True, False, False, True, False, False, True]


def test_a_change_is_seen(probes):
    model, x = Switching(), torch.randn(9, 4)
    kernel = RepeatedGram("trace")

    def look(fresh):
        probes.clear()
        same(kernel, model, x)
        assert probes[-1] is fresh

    look(True)
    look(False)
    model.twice = True
    look(True)
    model.second = nn.Linear(5, 3)
    look(True)
    model.first.bias.requires_grad_(False)
    look(True)
    model.first.weight = nn.Parameter(torch.randn(5, 4))
    look(True)
    look(False)
    x[0] += 1
    look(True)
    x = x.clone()
    look(True)
    handle = model.first.register_forward_hook(lambda module, inputs, output: output * 2)
    look(True)
    handle.remove()
    handle = model.first.register_forward_hook(lambda module, inputs, output: output * 3)  # as many as before
    look(True)
    handle.remove()
    look(True)
    model.scale = (1, 2.0)
    look(True)
    model.scale = (1, 3.0)
    look(True)
    look(False)


def test_a_change_that_nobody_watches_shows_in_the_path(probes):
    model, x = Switching(), torch.randn(9, 4)
    kernel = RepeatedGram("trace")
    same(kernel, model, x)
    probes.clear()
    model.hidden[0] = True
    same(kernel, model, x)
    assert probes[-1] is True
    same(kernel, model, x)
    assert probes[-1] is False


class Hidden(Switching):
    """What it does otherwise shows in no call of torch that is seen, or in no gradient."""

    def forward(self, x):
        given = x
        if self.hidden[0] == "coupled":
            x = x - x.mean(0, keepdim=True)
        x = torch.tanh(self.first(x))
        if self.hidden[0] == "unseen":
            with torch._C.DisableTorchFunction():
                x = x + torch.tanh(F.linear(given, self.first.weight))
        return self.second(x)


@pytest.mark.parametrize("outputs", ["trace", "sum"])
@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_change_that_nobody_watches_shows_in_the_graph_or_the_outputs(outputs, count):
    model, x = Hidden(), torch.randn(count, 4)
    kernel = RepeatedGram(outputs)
    same(kernel, model, x, outputs)
    model.hidden[0] = "unseen"
    with pytest.warns(UserWarning, match="one backward pass"):
        same(kernel, model, x, outputs)
    model.hidden[0] = False
    for _ in range(2):
        same(kernel, model, x, outputs)
    model.hidden[0] = "coupled"
    with pytest.raises(ValueError, match="only batch norm in training mode may couple samples"):
        kernel(model, x)


class Reading(nn.Module):
    """Chooses its path by values."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return (self.first if float(self.first.weight.detach().sum()) > 0 else self.second)(x)


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_kept_of_a_model_that_reads_values(probes):
    model, x = Reading(), torch.randn(5, 3)
    kernel = RepeatedGram("trace")
    for sign in (1, -1, 1):
        with torch.no_grad():
            model.first.weight.copy_(sign * model.first.weight.abs())
        same(kernel, model, x)
    assert all(probes)
