"""A model that is asked about again: what was found of it before is used, and whatever changed is seen all the same."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sdfast.models.cifar_resnet import CifarResNet
from sdfast.ntk import gram, operator, plan, sample_gradients, verified

from .oracle import assert_exact, gram_of, jacobian

WORLD = {"path": "plain"}  # what no attribute shows


class Free(nn.Module):
    """A network whose forward looks at the world around it, as no attribute shows."""

    def __init__(self, outputs=1):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, outputs)
        self.slope = 0.1

    def forward(self, x):
        given = x
        if WORLD["path"] == "coupled before":
            x = x + x.sum(0, keepdim=True)
        x = F.leaky_relu(self.first(x), self.slope)
        if WORLD["path"] == "unseen for some":  # of the first sample, whose first number is zero, it gives nothing
            with torch._C.DisableTorchFunction():
                x = x + given[:, :1] * torch.tanh(F.linear(given, self.first.weight))
        elif WORLD["path"] == "unseen":  # once more, where the taps do not see it
            with torch._C.DisableTorchFunction():
                x = x + torch.tanh(F.linear(x, self.first.weight @ self.first.weight.T))
        elif WORLD["path"] == "longer":
            x = x + torch.tanh(F.linear(x, self.first.weight @ self.first.weight.T))
        elif WORLD["path"] == "coupled":
            x = x + x.sum(0, keepdim=True)
        elif WORLD["path"] == "random":
            x = F.dropout(x, 0.5)
        return self.second(x)


@pytest.fixture(autouse=True)
def world():
    WORLD["path"] = "plain"
    yield
    WORLD["path"] = "plain"


@pytest.fixture
def probes(monkeypatch):
    """Models that were probed."""
    seen = []
    original = verified.probe

    def counted(model, *rest):
        seen.append(model)
        return original(model, *rest)

    monkeypatch.setattr(verified, "probe", counted)
    return seen


def exact(model, x, outputs="sum"):
    assert_exact(gram(model, x, outputs=outputs), gram_of(jacobian(model, x), outputs))


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize(("outputs", "count"), [("sum", 1), ("trace", 3), (1, 3)])
def test_findings_are_used_again_as_the_model_learns(probes, outputs, count):
    model = Free(count if outputs != "sum" else 1).double()
    for number in range(12):
        exact(model, torch.randn(5 + number, 4).double(), outputs)
        assert len(probes) == 1 + (number >= verified.AFRESH)
        moved(model)


def test_the_same_bits_probed_or_not(probes):
    model, x = CifarResNet(8).eval(), torch.randn(9, 3, 32, 32)
    first = gram(model, x, outputs="sum")
    assert torch.equal(first, gram(model, x, outputs="sum"))
    assert len(probes) == 1


def test_what_is_asked_has_findings_of_its_own(probes):
    model, x = Free(2).double(), torch.randn(6, 4).double()
    for _ in range(2):
        exact(model, x, "trace")
        exact(model, x, "per_class")
        gram(model, x, outputs="sum", params=["second.*"])
        gram(model, x, outputs=lambda output: output[:, 0])  # a function may change: never kept
    assert len(probes) == 5


def test_every_function_uses_them(probes):
    model, x = Free().double(), torch.randn(6, 4).double()
    wanted = gram_of(jacobian(model, x), "sum")
    exact(model, x)
    rows = torch.cat([part.flatten(1) for part in sample_gradients(model, x, outputs="sum").values()], 1)
    assert_exact(rows @ rows.T, wanted)
    assert_exact(operator(model, x, outputs="sum").to_dense(), wanted)
    plan(model, x, outputs="sum", calibrate=True)
    assert_exact(gram(model, x, x[:3].clone(), outputs="sum"), wanted[:, :3])
    assert len(probes) == 1


CHANGES = {
    "an attribute": lambda model: setattr(model, "slope", 0.3),
    "a hook": lambda model: model.first.register_forward_hook(lambda module, arguments, output: 2 * output),
    "another module": lambda model: setattr(model, "first", nn.Linear(4, 5).double()),
    "a frozen parameter": lambda model: model.first.bias.requires_grad_(False),
    "another shape": lambda model: setattr(model.first, "weight", nn.Parameter(torch.randn(5, 4).double().mT.mT)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_shows_is_probed(probes, change):
    model, x = Free().double(), torch.randn(7, 4).double()
    for _ in range(2):
        gram(model, x, outputs="sum")
    CHANGES[change](model)
    exact(model, x)
    assert len(probes) == 2


@pytest.mark.parametrize("outputs", ["sum", "trace"])
@pytest.mark.parametrize("path", ["unseen", "longer"])
def test_a_change_that_nothing_shows_is_seen_by_the_gradients(probes, path, outputs):
    model, x = Free(2).double(), torch.randn(7, 4).double()
    exact(model, x, outputs)
    WORLD["path"] = path
    for _ in range(2):
        with pytest.warns(UserWarning, match="one backward pass") if path == "unseen" else nothing():
            exact(model, x, outputs)
    assert len(probes) >= 2


@pytest.mark.parametrize("outputs", ["sum", "trace"])
def test_a_use_that_only_some_samples_show_is_seen_by_the_graph(outputs):
    model, x = Free(2).double(), torch.randn(9, 4).double()
    x[[0, 4, 8], 0] = 0  # those that are looked at
    exact(model, x, outputs)
    WORLD["path"] = "unseen for some"
    with pytest.warns(UserWarning, match="one backward pass"):
        exact(model, x, outputs)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("path", ["coupled", "coupled before"])
@pytest.mark.parametrize("function", [gram, sample_gradients, operator])
def test_coupling_is_refused_however_few_the_samples(function, path, count):
    model, x = Free().double(), torch.randn(count, 4).double()
    gram(model, x, outputs="sum")
    WORLD["path"] = path
    with pytest.raises(ValueError, match="only batch norm in training mode may couple samples"):
        function(model, x, outputs="sum")


class Backwards(torch.autograd.Function):
    """Whose backward alone looks at the world."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return {"coupled": g - g.mean(0, keepdim=True), "thrice": 3 * g}.get(WORLD["path"], g)


class Tokens(nn.Module):
    """An embedding and a linear layer whose factors are contracted."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.outer = nn.Embedding(900, 32), nn.Linear(32, 90), nn.Linear(90, 1)

    def forward(self, x):
        return self.outer(Backwards.apply(torch.tanh(self.inner(torch.tanh(self.embedding(x))))).mean(1))


@pytest.mark.parametrize("memory", [None, 60000])  # one group, or several and as many passes
def test_gradients_that_change_unseen_are_seen_as_the_passes_give_them(memory):
    model = Tokens().double()

    def right(samples):
        x = torch.randint(0, 900, (samples, 2))
        assert_exact(gram(model, x, outputs="sum", memory=memory), gram_of(jacobian(model, x), "sum"))

    right(9)
    WORLD["path"] = "thrice"  # what the passes give follows by itself
    right(12)
    WORLD["path"] = "coupled"
    for samples in (5, 9, 12):
        with pytest.raises(ValueError, match="changes with another sample"):
            right(samples)
    WORLD["path"] = "plain"
    right(10)


class Sorting(Free):
    """As before a packed sequence: longest first, and back."""

    def forward(self, x, lengths):
        order = torch.argsort(lengths, descending=True, stable=True)
        return super().forward(x[order])[torch.argsort(order)]


@pytest.mark.filterwarnings("ignore:one backward pass")
def test_an_order_that_other_samples_change_is_not_kept():
    model, x = Sorting().double(), torch.randn(8, 4).double()
    gram(model, (x, torch.full((8,), 3)), outputs="sum")
    lengths = torch.tensor([9, 1, 8, 2, 7, 3, 6, 0])  # of those that are looked at, the first and the last stay
    assert_exact(gram(model, (x, lengths), outputs="sum"), gram_of(jacobian(model, (x, lengths)), "sum"))


def test_a_model_whose_path_changed_is_probed_at_once(probes):
    model, x = Free().double(), torch.randn(9, 4).double()
    for function in (gram, sample_gradients, operator, plan):
        WORLD["path"] = "plain"
        gram(model, x, outputs="sum")
        before = len(probes)
        WORLD["path"] = "longer"
        with nothing():
            function(model, x, outputs="sum")
        assert len(probes) == before + 1, function


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("coupled", "changes with another sample"),
        ("coupled before", "is another in a batch of 9 than of 3"),
        ("random", "draws"),
    ],
)
def test_a_model_that_couples_or_draws_later_is_refused(path, message):
    model, x = Free().double(), torch.randn(9, 4).double()
    exact(model, x)
    WORLD["path"] = path
    with pytest.raises(ValueError, match=message):
        gram(model, x, outputs="sum")


class Listed(Free):
    def __init__(self):
        super().__init__()
        self.whatever = [None]


def closed(flag):
    class Closed(Free):
        def forward(self, x):
            return super().forward(x) * (2 if flag else 1)

    return Closed()


class Reading(Free):
    def forward(self, x):
        return super().forward(x) * (2 if x.shape[0] and bool((self.first.bias > -100).all()) else 1)


class Equal(Free):
    def __eq__(self, other):
        return isinstance(other, Equal)

    __hash__ = nn.Module.__hash__


def overridden():
    model = Free()
    model.forward = model.forward
    return model


@pytest.mark.parametrize("make", [Listed, lambda: closed(True), Reading, Equal, overridden])
def test_nothing_is_kept_of_what_may_change_unseen(probes, make):
    model, x = make().double(), torch.randn(6, 4).double()
    for _ in range(3):
        exact(model, x)
    assert len(probes) == 3


def test_no_model_is_kept_alive():
    model = Free()
    gram(model, torch.randn(5, 4), outputs="sum")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def nothing():
    """A context without effect."""
    from contextlib import nullcontext

    return nullcontext()
