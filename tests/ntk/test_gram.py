"""The matrix as a whole: forms × precisions × layers, bits, memory, closed forms, and networks drawn at random."""

import importlib
import math
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sdfast.ntk import gram
from sdfast.ntk.costs import contracts

from . import zoo
from .oracle import assert_exact, distance, gram_of, jacobian

SMOOTH = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), lambda n: torch.randn(n, 4)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3)), zoo.images
    ),
    "norms": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.LayerNorm(16)
                              , nn.Tanh(), nn.Linear(16, 2)).eval(), zoo.images
    ),
    "attention": (lambda: zoo.Pooled(zoo.Attention(6)), lambda n: zoo.sequences(n, width=6)),
    "embedding": (lambda: zoo.GPT(3, length=3), lambda n: zoo.tokens(n, 3, 3)),
    "recurrent": (lambda: zoo.Recurrent(nn.GRU, batch_first=True), zoo.sequences),
}  # fmt: skip
PRECISIONS = {"float32": 1e-5, "float64": 1e-5, "bf16x3": 1e-4, "tf32": 2e-3, "bf16": 2e-2}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("outputs", ["sum", "trace", "mean", "per_class", "full", 1])
@pytest.mark.parametrize("name", SMOOTH)
def test_layer_by_output_by_precision(name, outputs, precision):
    """A float32 network against float64; both kinds of tile, symmetric in every bit."""
    make, draw = SMOOTH[name]
    model, x = make(), draw(4)
    model(x)
    got = gram(model, x, outputs=outputs, precision=precision, batch_size=3)
    assert got.dtype == (torch.float64 if precision == "float64" else torch.float32)
    mirrored = got.permute(1, 0, 3, 2) if outputs == "full" else got.mT
    assert torch.equal(got, mirrored)
    rows = jacobian(model.double(), x.double() if x.is_floating_point() else x)
    assert distance(got, gram_of(rows, outputs)) <= PRECISIONS[precision]


@pytest.mark.parametrize("outputs", ["sum", "per_class", "full"])
def test_many_tiles_are_symmetric_repeatable_and_positive(outputs, monkeypatch):
    monkeypatch.setattr("sdfast.ntk.result.LEAST_ROWS", 64)
    monkeypatch.setattr("sdfast.ntk.result.LEAST_OF_BLOCKS", 64)
    model, x = zoo.mlp(), torch.randn(301, 4)  # tiles of 76 rows, the last of them ragged
    first = gram(model, x, outputs=outputs, batch_size=50, memory=400_000)
    assert torch.equal(first, gram(model, x, outputs=outputs, batch_size=50, memory=400_000))
    assert torch.equal(first, first.permute(1, 0, 3, 2) if outputs == "full" else first.mT)
    rows = jacobian(model.double(), x.double())
    assert distance(first, gram_of(rows, outputs)) < 1e-5
    square = first.permute(2, 0, 3, 1).reshape(903, 903) if outputs == "full" else first
    values = torch.linalg.eigvalsh(square.double())
    assert (values.amin(-1) >= -len(x) * 2.0**-24 * values.amax(-1)).all()


@pytest.mark.parametrize("name", ["mlp", "attention", "convolution"])
def test_micro_batches_do_not_matter(name):
    make, draw = SMOOTH[name]
    model, x = make(), draw(9)
    model(x)
    for double in (False, True):
        model, x = (model.double(), x.double()) if double else (model, x)
        grams = [gram(model, x, outputs="trace", batch_size=size) for size in (1, 2, 4, 9, 100)]
        scale = grams[0].diagonal().sqrt()
        for other in grams[1:]:
            assert ((other - grams[0]).abs() / torch.outer(scale, scale)).max() <= (1e-12 if double else 1e-5)


def test_memory_does_not_matter():
    model, x = zoo.ResNet().double().eval(), zoo.images(6).double()
    whole = gram(model, x, outputs="trace")
    for memory in (6 * 3 * 8, 1000, 10_000):
        assert_exact(gram(model, x, outputs="trace", memory=memory), whole)


@pytest.mark.parametrize("kind", ["tensor", "memory map", "view"])
def test_out(kind, tmp_path):
    model, x = zoo.mlp(), torch.randn(70, 4)
    wanted = gram(model, x, outputs="per_class")
    if kind == "memory map":
        out = np.lib.format.open_memmap(tmp_path / "h.npy", mode="w+", dtype=np.float32, shape=(3, 70, 70))
        out[:] = np.nan
    elif kind == "view":
        out = torch.full((3, 140, 70), torch.nan)[:, ::2]
    else:
        out = torch.full((3, 70, 70), torch.nan)
    got = gram(model, x, outputs="per_class", out=out)
    assert torch.equal(got, wanted)
    if kind == "memory map":
        assert np.array_equal(np.load(tmp_path / "h.npy"), wanted.numpy())
    else:
        assert got is out


def test_one_linear_layer():
    """f = a·(Wx + b): H = ‖a‖²(XXᵀ + 1) for every layer on top that is constant."""
    x, direction = torch.randn(6, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    model = nn.Linear(5, 4, dtype=torch.float64)
    got = gram(model, x, outputs=lambda out: out @ direction)
    assert_exact(got, direction.square().sum() * (x @ x.T + 1), 1e-14)


def two_layer(width, inputs):
    """f(x) = 1/√m Σ_r a_r relu(w_r·x), a_r = ±1 fixed: Dong et al., appendix A.1."""
    model = nn.Sequential(nn.Linear(inputs, width, bias=False), nn.ReLU(), nn.Linear(width, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.normal_()
        model[2].weight.copy_(torch.randint(0, 2, (1, width)).double().mul(2).sub(1) / math.sqrt(width))
    model[2].requires_grad_(False)
    return model


def test_two_layer_network_of_dong_et_al():
    """H_ij = x_i·x_j / m Σ_r 1[w_r·x_i ≥ 0, w_r·x_j ≥ 0]."""
    model, x = two_layer(50, 4), torch.randn(7, 4, dtype=torch.float64)
    active = (x @ model[0].weight.T > 0).double()
    assert_exact(gram(model, x), (x @ x.T) * (active @ active.T) / 50, 1e-14)


def test_infinite_width():
    """Its expectation x·x' (π − angle) / 2π; the error of a mean over m units, six standard deviations."""
    width = 20_000
    x = nn.functional.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1)
    cosines = (x @ x.T).clamp(-1, 1)
    chance = (math.pi - torch.arccos(cosines)) / (2 * math.pi)
    deviation = cosines.abs() * (chance * (1 - chance) / width).sqrt()
    assert ((gram(two_layer(width, 4), x) - cosines * chance).abs() <= 6 * deviation + 1e-12).all()


def test_crossover():
    """Against operations counted one by one; the figures of the published layers."""

    def operations(t, d, p, n, outputs, form):
        pairs = outputs**2 if form == "full" else outputs
        return (2 * n * t * d * p * outputs + n * n * d * p * pairs, n * n * t * t * (d + pairs * (p + 1)))

    for form in ("one", "trace", "full"):
        for t in (1, 2, 7, 20, 45, 100):
            for d, p, n, outputs in ((64, 64, 10, 1), (4096, 1024, 1000, 3), (16, 300, 2, 10)):
                outputs = 1 if form == "one" else outputs
                materialise, contract = operations(t, d, p, n, outputs, form)
                assert contracts((t, d, p), d * p, (n, n), form, outputs) == (contract < materialise)
    assert contracts((1, 1024, 1024), 2**20, (50_000, 50_000), "one", 1)
    assert contracts((45, 4096, 4096), 2**24, (50_000, 50_000), "one", 1)
    assert not contracts((46, 4096, 4096), 2**24, (50_000, 50_000), "one", 1)
    assert not contracts((65, 384, 384), 384**2, (50_000, 50_000), "one", 1)


LAYERS = (
    "linear",
    "tanh",
    "relu",
    "layer norm",
    "rms norm",
    "scale",
    "residual",
    "attention",
    "merge",
    "transpose",
    "weight norm",
)


class Random(nn.Module):
    """A stack over (n, t, 4), read out at the end."""

    def __init__(self, names, tied):
        super().__init__()
        self.names = names
        made = {
            "linear": lambda: nn.Linear(4, 4), "tanh": nn.Tanh, "relu": nn.ReLU,
            "relu in place": lambda: nn.ReLU(inplace=True),
            "layer norm": lambda: nn.LayerNorm(4), "rms norm": lambda: nn.RMSNorm(4), "scale": lambda: nn.Linear(4, 1),
            "residual": lambda: nn.Linear(4, 4), "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
            "merge": lambda: nn.Linear(4, 4), "transpose": lambda: nn.Linear(4, 4, bias=False),
            "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        }  # fmt: skip
        # In place only where torch itself allows it: not over what the layer before keeps for its own backward.
        before = ("", *names)
        self.parts = nn.ModuleList(
            made["relu in place" if name == "relu" and last == "linear" else name]()
            for last, name in zip(before, names, strict=False)
        )
        self.head = nn.Linear(4, 2)
        if tied:
            linear = [
                part for name, part in zip(names, self.parts, strict=True) if name in ("linear", "residual", "merge")
            ]
            for part in linear[1:]:
                part.weight = linear[0].weight

    def forward(self, x):
        x = x * 1.5
        for name, part in zip(self.names, self.parts, strict=True):
            if name == "residual":
                x = x + torch.tanh(part(x))
            elif name == "scale":
                x = x * part.weight[0] + part.bias
            elif name == "attention":
                x = part(x, x, x, need_weights=False)[0]
            elif name == "merge":
                x = part(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, len(x))).transpose(0, 1)
            elif name == "transpose":
                x = x @ part.weight.T
            else:
                x = part(x)
        return self.head(x.mean(1))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=5),
    tied=st.booleans(),
    n=st.integers(1, 6),
    t=st.integers(1, 6),
    batch_size=st.integers(1, 6),
    memory=st.sampled_from([None, 500, 5000]),
    outputs=st.sampled_from(["sum", "trace", "full", 0]),
    frozen=st.booleans(),
    zero=st.booleans(),
)
def test_networks_drawn_at_random(names, tied, n, t, batch_size, memory, outputs, frozen, zero):
    model, x = Random(names, tied).double(), torch.randn(n, t, 4, dtype=torch.float64)
    if frozen:
        next(model.parts.parameters(), model.head.weight).requires_grad_(False)
    if zero:
        nn.init.zeros_(next(model.parameters()))
    with warnings.catch_warnings():
        # Zeros may hide which rows are whose; then the guard has the parameter looped, and says so.
        warnings.simplefilter("ignore" if zero else "error")
        got = gram(model, x, outputs=outputs, batch_size=batch_size, memory=memory)
    assert_exact(got, gram_of(jacobian(model, x), outputs))


def test_the_gradients_of_one_group_are_held_at_a_time(monkeypatch):
    module = importlib.import_module("sdfast.ntk.gram")  # the package's name for it is the function
    original, held = module._blocks, []

    def blocks(*arguments):
        assert all(block() is None for block in held)
        made = original(*arguments)
        held.extend(weakref.ref(block) for block in made)
        return made

    monkeypatch.setattr(module, "_blocks", blocks)
    model, x = zoo.mlp(), torch.randn(20, 4)
    gram(model, x, outputs="sum", memory=2_000)
    assert len(held) > 1
