"""Every form of the Gram matrix of whole networks against the contraction of a plain Jacobian, in float64."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from sdfast.ntk import gram, operator, sample_gradients
from sdfast.ntk.probe import probe

from . import zoo
from .oracle import assert_exact, gram_of, jacobian


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _no_fallback():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def rules_of(model, x):
    from sdfast.ntk import inputs, outputs, source
    from sdfast.ntk.unchanged import unchanged

    parameters = source.select_parameters(model, None)
    first = next(iter(parameters.values()))
    with unchanged(model, first.device):
        findings = probe(model, inputs.read(x, first, "x"), outputs.Outputs("trace"), parameters)
    assert not findings.looped
    return {rule for rules in findings.rules.values() for rule in rules}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_all_forms(name):
    make, draw, rules = zoo.ZOO[name]
    model, x = make(), draw(6)
    wanted = jacobian(model, x)
    assert rules_of(model, x) == rules
    for outputs in ("sum", "trace", "mean", "per_class", "full", 1):
        assert_exact(gram(model, x, outputs=outputs, batch_size=4), gram_of(wanted, outputs))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_rectangular_in_small_memory(name):
    """Many groups, pieces of parameters, ragged micro-batches of which the last holds one sample."""
    make, draw, _ = zoo.ZOO[name]
    model, x1, x2 = make(), draw(5), draw(3)
    wanted = jacobian(model, x1), jacobian(model, x2)
    for outputs in ("sum", "per_class", "full"):
        got = gram(model, x1, x2, outputs=outputs, batch_size=2, memory=20_000)
        assert_exact(got, gram_of(wanted[0], outputs, wanted[1]))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_operators(name):
    """Every layer rule: products, the matrix itself and its diagonal, with factors and without."""
    make, draw, _ = zoo.ZOO[name]
    model, x = make(), draw(5)
    for outputs, memory in (("trace", None), ("full", 40_000)):
        wanted = gram_of(jacobian(model, x), outputs)
        wanted = wanted.movedim(2, 1).flatten(0, 1).flatten(1) if outputs == "full" else wanted
        columns = torch.randn(len(wanted), 3)
        free = operator(model, x, outputs=outputs, batch_size=2, memory=memory)
        assert_exact(free @ columns, wanted @ columns)
        assert_exact(free.to_dense(), wanted)
        assert_exact(free.diagonal(), wanted.diagonal())


@pytest.mark.parametrize("name", ["mlp", "gpt, tied", "vit", "resnet"])
def test_sample_gradients(name):
    make, draw, _ = zoo.ZOO[name]
    model, x = make(), draw(5)
    wanted = jacobian(model, x)
    rows = sample_gradients(model, x, outputs="sum", batch_size=2)
    assert {n: tuple(r.shape[1:]) for n, r in rows.items()} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert_exact(torch.cat([r.flatten(1) for r in rows.values()], 1), wanted.sum(1))
    rows = sample_gradients(model, x, outputs="per_class", batch_size=2)
    assert_exact(torch.cat([r.flatten(2) for r in rows.values()], 2), wanted)


def test_the_oracle_is_jacrev():
    model, x = zoo.ViT(), zoo.images(4, 1)
    parameters = dict(model.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jacrev loops over an operation
        rows = jacrev(lambda p: functional_call(model, p, (x,)))({n: p.detach() for n, p in parameters.items()})
    assert_exact(torch.cat([r.flatten(2) for r in rows.values()], 2), jacobian(model, x))


@pytest.mark.parametrize("zero_gamma", [True, False])
def test_batch_norm_in_training_mode(zero_gamma):
    """All samples in one batch, as they were normalised; running statistics stay as they were."""
    model, x = zoo.ResNet(zero_gamma), zoo.images(6)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="batch norm is in training mode"):
        got = gram(model, x, outputs="trace")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert_exact(got, gram_of(jacobian(model, x), "trace"))


def test_batch_norm_without_running_statistics_couples_in_eval_mode_too():
    model, x = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)).eval(),
        None,
    )
    x = torch.randn(5, 3)
    with pytest.warns(UserWarning, match="batch norm"):
        assert_exact(gram(model, x), gram_of(jacobian(model, x), None))
    with pytest.raises(ValueError, match="batch_size: got 2, but batch norm is in training mode"):
        gram(model, x, batch_size=2)


@pytest.mark.parametrize("length", [2, 3, 5, 6])
def test_as_many_positions_as_samples(length):
    """n == T, and both of them the sizes of the probe: the axes are told apart by what changes."""
    for make in (lambda: zoo.Recurrent(nn.GRU), lambda: zoo.Pooled(zoo.SequenceFirst(nn.Linear(3, 3)))):
        model, x = make(), zoo.sequences(length, length)
        assert_exact(gram(model, x, outputs="trace"), gram_of(jacobian(model, x), "trace"))
    model, x = zoo.GPT(length=length), zoo.tokens(length, length=length)
    assert_exact(gram(model, x, outputs=0), gram_of(jacobian(model, x), 0))
