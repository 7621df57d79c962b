"""Scale and shift gradients per sample against torch's autograd through its own layers, one sample at a time."""

import pytest
import torch
import torch.nn.functional as F

from sdfast.ops.sample_gradients import channel_sample_gradients, position_sample_gradients
from tests.helpers import assert_as_good_as_torch, backends

ALL = [*backends(without=("cuda",)), "reference"]
# (samples, channels, *space): whole and ragged vectors, more positions than are added up at once, one position
CHANNELS = {"even": (3, 32, 8, 8), "ragged": (2, 13, 9, 17), "one": (4, 6), "flat": (2, 5, 131), "wide": (1, 70, 3, 3)}
# (samples, positions, channels)
POSITIONS = {"even": (3, 7, 64), "ragged": (2, 70, 13), "one": (4, 1, 37), "long": (1, 3, 700)}


def per_sample(layer, channels, x, g, terms=("weight", "bias")):
    """The oracle: autograd on one sample at a time."""
    rows = []
    for a, b in zip(x, g, strict=True):
        parameters = [x.new_full((channels,), 0.7, requires_grad=True) for _ in terms]
        rows.append(torch.autograd.grad(layer(a, *parameters), parameters, b))
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def layouts(tensor):
    """The same numbers with channels last, and with no axis dense among poison."""
    wide = tensor.new_full([2 * size + 1 for size in tensor.shape], torch.nan)
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return tensor, tensor.movedim(1, -1).contiguous().movedim(-1, 1), view.copy_(tensor)


def batch_norm_inputs(shape, dtype):
    x, g = torch.randn(2, *shape, dtype=torch.float64)
    mean, variance = 3 * torch.randn(shape[1], dtype=torch.float64), torch.rand(shape[1], dtype=torch.float64) + 0.1
    return [t.to(dtype) for t in (x + 3, g, mean, variance)]


def run_batch_norm(x, g, mean, variance, **options):
    return channel_sample_gradients(x[:, None], g[:, None], mean, (variance + 1e-5).rsqrt(), **options)


def batch_norm_oracle(x, g, mean, variance):
    return per_sample(lambda a, w, b: F.batch_norm(a[None], mean, variance, w, b, eps=1e-5)[0], x.shape[1], x, g)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", CHANNELS)
def test_batch_norm_float64(name, backend):
    x, g, mean, variance = batch_norm_inputs(CHANNELS[name], torch.float64)
    exact = batch_norm_oracle(x, g, mean, variance)
    for a in layouts(x):
        for b in layouts(g):
            for got, wanted in zip(run_batch_norm(a, b, mean, variance, backend=backend), exact, strict=True):
                assert (got - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("backend", backends(without=("cuda",)))
@pytest.mark.parametrize("name", CHANNELS)
def test_batch_norm_float32_is_as_good_as_torch(name, backend, layout):
    inputs = batch_norm_inputs(CHANNELS[name], torch.float32)
    exact = batch_norm_oracle(*(t.double() for t in inputs))
    own = batch_norm_oracle(*inputs)
    x, g = (layouts(t)[layout] for t in inputs[:2])
    for got, torchs, wanted in zip(run_batch_norm(x, g, *inputs[2:], backend=backend), own, exact, strict=True):
        assert_as_good_as_torch(name, got, torchs, wanted)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_group_norm_with_rows(backend, groups):
    """Statistics of each row; three rows of the batch belong to a sample."""
    x, g = torch.randn(2, 2, 3, 12, 5, 4, dtype=torch.float64)
    exact = [
        rows.unflatten(0, (2, 3)).sum(1)
        for rows in per_sample(
            lambda a, w, b: F.group_norm(a[None], groups, w, b, eps=1e-4)[0], 12, x.flatten(0, 1), g.flatten(0, 1)
        )
    ]
    variance, mean = torch.var_mean(x.unflatten(2, (groups, -1)).flatten(3), -1, correction=0)
    statistics = [t.repeat_interleave(12 // groups, -1) for t in (mean, (variance + 1e-4).rsqrt())]
    for got, wanted in zip(channel_sample_gradients(x, g, *statistics, backend=backend), exact, strict=True):
        assert (got - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", CHANNELS)
def test_without_an_input_it_is_a_bias(name, backend):
    g = torch.randn(CHANNELS[name], dtype=torch.float64)
    exact = g.flatten(2).sum(-1) if g.dim() > 2 else g
    for given in layouts(g):
        weight, bias = channel_sample_gradients(None, given[:, None], backend=backend)
        assert weight is None
        assert (bias - exact).norm() <= 1e-12 * exact.norm()


def layer_norm_oracle(x, g, centered, eps=1e-5):
    width = x.shape[-1]
    if centered:
        return per_sample(lambda a, w, b: F.layer_norm(a, (width,), w, b, eps=eps), width, x, g)
    (weight,) = per_sample(lambda a, w: F.rms_norm(a, (width,), w, eps=eps), width, x, g, ("weight",))
    return [weight, g.sum(1)]


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", POSITIONS)
def test_layer_and_rms_norm_float64(name, backend, centered):
    x, g = torch.randn(2, *POSITIONS[name], dtype=torch.float64)
    exact = layer_norm_oracle(x + 2, g, centered)
    for a in layouts(x + 2):
        for b in layouts(g):
            results = position_sample_gradients(a, b, eps=1e-5, centered=centered, backend=backend)
            for got, wanted in zip(results, exact, strict=True):
                assert (got - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("backend", backends(without=("cuda",)))
@pytest.mark.parametrize("name", POSITIONS)
def test_layer_and_rms_norm_float32_is_as_good_as_torch(name, backend, centered):
    x, g = torch.randn(2, *POSITIONS[name])
    exact = layer_norm_oracle(x.double() + 2, g.double(), centered)
    own = layer_norm_oracle(x + 2, g, centered)
    results = position_sample_gradients(x + 2, g, eps=1e-5, centered=centered, backend=backend)
    for got, torchs, wanted in zip(results, own, exact, strict=True):
        assert_as_good_as_torch(name, got, torchs, wanted)


@pytest.mark.parametrize("backend", ALL)
def test_writes_column_ranges_and_accumulates(backend):
    x, g, mean, variance = batch_norm_inputs((3, 13, 5, 5), torch.float64)
    exact = batch_norm_oracle(x, g, mean, variance)
    panel = torch.full((3, 32), torch.nan, dtype=torch.float64)
    outs = {"weight_out": panel[:, 1:14], "bias_out": panel[:, 16:29]}
    run_batch_norm(x, g, mean, variance, backend=backend, **outs)
    run_batch_norm(x, 2 * g, mean, variance, backend=backend, accumulate=True, **outs)
    y, h = torch.randn(2, 3, 6, 13, dtype=torch.float64)
    results = position_sample_gradients(y, h, eps=1e-5, backend=backend, accumulate=True, **outs)
    for out, got, wanted, more in zip(outs.values(), results, exact, layer_norm_oracle(y, h, True), strict=True):
        assert got is out
        assert (out - 3 * wanted - more).norm() <= 1e-12 * wanted.norm()
    assert panel[:, [0, 14, 15, 29, 30, 31]].isnan().all()


@pytest.mark.parametrize("backend", ALL)
def test_a_large_mean_costs_no_digit(backend):
    """The mean is taken off before the sum, not after it: Σ g x − mean Σ g would lose every digit here."""
    x = torch.randn(2, 1, 3, 400) + 1e4
    g = torch.rand(2, 1, 3, 400)
    mean = x.mean((0, 3)).flatten()
    weight, _ = channel_sample_gradients(x, g, mean, torch.ones(3), backend=backend)
    exact = (g.double() * (x.double() - mean.double()[:, None])).sum((1, 3))
    assert (weight - exact).abs().max() <= 1e-4


@pytest.mark.parametrize("backend", ALL)
def test_nothing_to_sum(backend):
    empty, _ = channel_sample_gradients(
        torch.ones(2, 1, 3, 0), torch.ones(2, 1, 3, 0), torch.ones(3), torch.ones(3), backend=backend
    )
    assert torch.equal(empty, torch.zeros(2, 3))
    rows = position_sample_gradients(torch.ones(2, 0, 3), torch.ones(2, 0, 3), eps=0.0, backend=backend)
    assert torch.equal(torch.stack(rows), torch.zeros(2, 2, 3))
    assert position_sample_gradients(torch.ones(0, 2, 3), torch.ones(0, 2, 3), eps=0.0, backend=backend)[0].shape == (
        0,
        3,
    )


def test_opcheck():
    x, g, statistics = torch.randn(2, 1, 5, 9), torch.randn(2, 1, 5, 9), torch.rand(2, 1, 5)
    outs = torch.zeros(2, 5), torch.zeros(2, 5)
    operations = torch.ops.sdfast
    torch.library.opcheck(operations._sample_channels.default, (x, g, statistics, statistics, *outs, False))
    torch.library.opcheck(operations._sample_channels.default, (None, g, None, None, None, outs[1], True))
    arguments = (x[:, 0], g[:, 0], True, 1e-5, torch.zeros(2, 9), torch.zeros(2, 9), True)
    torch.library.opcheck(operations._sample_positions.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"gradient": torch.ones(2, 3)}, ValueError, "gradient: got shape"),
        ({"gradient": torch.ones(2, 1, 3, 5).half()}, TypeError, "gradient: got float16"),
        ({"input": torch.ones(2, 1, 3, 5).double()}, TypeError, "input: got float64"),
        ({"input": torch.ones(2, 1, 3, 4)}, ValueError, r"input: got shape \(2, 1, 3, 4\)"),
        ({"mean": None}, ValueError, "mean, rstd: got None"),
        ({"input": None}, ValueError, "input: got None"),
        ({"mean": torch.ones(4)}, ValueError, r"mean: got shape \(4,\)"),
        ({"rstd": torch.ones(3).double()}, TypeError, "rstd: got float64"),
        ({"weight_out": torch.ones(2, 4)}, ValueError, "weight_out: got shape"),
        ({"accumulate": True}, ValueError, "weight_out: got None"),
    ],
)
def test_errors_name_the_argument(change, error, text):
    given = {"input": torch.ones(2, 1, 3, 5), "gradient": torch.ones(2, 1, 3, 5), "mean": torch.ones(3),
             "rstd": torch.ones(3)} | change  # fmt: skip
    with pytest.raises(error, match=text):
        channel_sample_gradients(**given)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"gradient": torch.ones(2)}, ValueError, "gradient: got shape"),
        ({"input": torch.ones(2, 4, 4)}, ValueError, "input: got shape"),
        ({"eps": -1.0}, ValueError, "eps: got -1.0"),
        ({"bias_out": torch.ones(2, 3, dtype=torch.float64)}, TypeError, "bias_out: got float64"),
    ],
)
def test_errors_of_positions_name_the_argument(change, error, text):
    given = {"input": torch.ones(2, 4, 3), "gradient": torch.ones(2, 4, 3), "eps": 1e-5} | change
    with pytest.raises(error, match=text):
        position_sample_gradients(**given)
