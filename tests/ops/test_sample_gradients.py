"""Gradients per sample against torch's autograd, one sample at a time, and the definition."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from sdfast.ops.sample_gradients import convolution_sample_gradients
from tests.helpers import assert_as_good_as_torch, backends, interpreted

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Shape(NamedTuple):
    samples: int
    inputs: int
    outputs: int
    space: tuple
    kernel: tuple
    stride: int | tuple = 1
    padding: int | tuple = 0
    dilation: int | tuple = 1
    groups: int = 1

    @property
    def options(self):
        return {k: getattr(self, k) for k in ("stride", "padding", "dilation", "groups")}


SHAPES = {
    "resnet": Shape(3, 16, 16, (8, 8), (3, 3), padding=1),  # whole vectors of channels everywhere
    "resnet stride": Shape(2, 16, 32, (9, 8), (3, 3), stride=2, padding=1),  # a last row that no window reaches
    "first layer": Shape(3, 3, 16, (7, 9), (3, 3), padding=1),  # a run of 9: outputs are the vectors
    "few outputs": Shape(2, 40, 3, (6, 5), (3, 3), padding=1),  # 3 scalars, ragged vectors
    "ragged": Shape(2, 13, 29, (5, 6), (3, 3), padding=1),  # no size is a multiple of anything
    "one by one": Shape(3, 24, 33, (6, 6), (1, 1)),  # no taps to interleave
    "one by one stride": Shape(3, 17, 8, (7, 7), (1, 1), stride=2),
    "anisotropic": Shape(2, 5, 18, (9, 11), (3, 2), stride=(2, 3), padding=(2, 0), dilation=(1, 2)),
    "dilated": Shape(2, 20, 18, (11, 12), (3, 3), padding=2, dilation=2),  # runs do not merge
    "large kernel": Shape(2, 3, 8, (14, 13), (7, 7), stride=2, padding=3),
    "padding beyond": Shape(1, 4, 5, (2, 1), (3, 3), padding=4),  # windows that lie wholly in the border
    "grouped": Shape(2, 32, 48, (6, 6), (3, 3), padding=1, groups=2),
    "small groups": Shape(2, 36, 72, (6, 5), (3, 3), padding=1, groups=36),  # a lane a group, two outputs each
    "many small groups": Shape(2, 160, 80, (4, 4), (3, 3), padding=1, groups=80),  # more lanes than one task takes
    "depthwise": Shape(3, 19, 19, (8, 7), (3, 3), padding=1, groups=19),
    "depthwise stride": Shape(2, 64, 64, (9, 9), (5, 5), stride=2, padding=2, dilation=2, groups=64),
    "many positions": Shape(1, 6, 10, (40, 37), (3, 3), padding=1),  # several blocks of lines
    "long line": Shape(2, 3, 9, (1, 700), (1, 3), padding=(0, 1)),  # a line longer than a block
    "many outputs": Shape(2, 48, 640, (4, 4), (3, 3), padding=1),  # several tiles of results
    "1d": Shape(3, 7, 12, (31,), (5,), stride=2, padding=3, dilation=2),
    "3d": Shape(2, 6, 9, (5, 6, 7), (3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 2), dilation=(2, 1, 1)),
    "3d depthwise": Shape(2, 12, 12, (4, 5, 6), (3, 3, 3), padding=1, groups=12),
    "one sample": Shape(1, 64, 96, (6, 6), (3, 3), padding=1),  # its outputs are shared among threads
}
QUICK = ("ragged", "anisotropic", "small groups", "depthwise", "3d", "1d", "padding beyond")


def one_by_one(shape, x, g):
    """torch's own gradient of every sample: the oracle."""
    weight = x.new_zeros(shape.outputs, shape.inputs // shape.groups, *shape.kernel, requires_grad=True)
    function = CONVOLUTIONS[len(shape.space)]
    return torch.stack(
        [
            torch.autograd.grad(function(a[None], weight, **shape.options), weight, b[None])[0].flatten()
            for a, b in zip(x, g, strict=True)
        ]
    )


def draw(shape, dtype, layout="contiguous"):
    x = torch.randn(shape.samples, shape.inputs, *shape.space, dtype=torch.float64)
    weight = x.new_zeros(shape.outputs, shape.inputs // shape.groups, *shape.kernel)
    g = torch.randn_like(CONVOLUTIONS[len(shape.space)](x, weight, **shape.options))
    return [laid(t.to(dtype), layout) for t in (x, g)]


def laid(tensor, layout):
    if layout == "channels last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":  # no axis is dense, and what lies between is poison
        wide = tensor.new_full([2 * size + 1 for size in tensor.shape], torch.nan)
        view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if layout == "sliced channels":  # channels last inside wider pixels
        wide = tensor.new_full((len(tensor), *tensor.shape[2:], tensor.shape[1] + 3), torch.nan)
        return wide[..., 2:-1].movedim(-1, 1).copy_(tensor)
    return tensor


def run(shape, x, g, **options):
    return convolution_sample_gradients(x, g, shape.kernel, **shape.options, **options)


def names(backend):
    return QUICK if interpreted(backend) else SHAPES


CASES = [(backend, name) for backend in (*backends(without=("cuda",)), "reference") for name in names(backend)]


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_float64_equals_autograd(backend, name):
    shape = SHAPES[name]
    x, g = draw(shape, torch.float64)
    exact = one_by_one(shape, x, g)
    got = run(shape, x, g, backend=backend)
    assert got.shape == exact.shape
    assert (got - exact).norm() <= 1e-12 * exact.norm()


@pytest.mark.parametrize(("backend", "name"), [case for case in CASES if case[0] != "reference"])
def test_float32_is_as_good_as_torch(backend, name):
    shape = SHAPES[name]
    x, g = draw(shape, torch.float32)
    exact = one_by_one(shape, x.double(), g.double())
    assert_as_good_as_torch(name, run(shape, x, g, backend=backend), one_by_one(shape, x, g), exact)


@pytest.mark.parametrize("layout", ["channels last", "strided", "sliced channels"])
@pytest.mark.parametrize("name", QUICK + ("resnet", "one by one", "grouped", "first layer"))
@pytest.mark.parametrize("backend", backends(without=("cuda",)))
def test_any_layout(backend, name, layout):
    if interpreted(backend) and name not in QUICK:
        pytest.skip("the interpreter is slow; the quick shapes suffice")
    shape = SHAPES[name]
    x, g = draw(shape, torch.float64)
    exact = one_by_one(shape, x, g)
    for inputs in ((laid(x, layout), g), (x, laid(g, layout)), (laid(x, layout), laid(g, layout))):
        got = run(shape, *inputs, backend=backend)
        assert (got - exact).norm() <= 1e-12 * exact.norm()


@pytest.mark.parametrize("backend", [*backends(without=("cuda",)), "reference"])
@pytest.mark.parametrize("name", ["ragged", "small groups", "first layer"])
def test_expanded_gradient(backend, name):
    """As a sum over positions gives it: one number with strides of zero."""
    shape = SHAPES[name]
    x, g = draw(shape, torch.float64)
    g = torch.randn(shape.samples, shape.outputs, *[1] * len(shape.space), dtype=torch.float64).expand_as(g)
    exact = one_by_one(shape, x, g)
    assert (run(shape, x, g, backend=backend) - exact).norm() <= 1e-12 * exact.norm()


@pytest.mark.parametrize("backend", [*backends(without=("cuda",)), "reference"])
@pytest.mark.parametrize("name", ["ragged", "depthwise", "anisotropic", "one by one", "first layer"])
def test_writes_a_column_range_and_accumulates(backend, name):
    shape = SHAPES[name]
    x, g = draw(shape, torch.float64)
    exact = one_by_one(shape, x, g)
    panel = torch.full((shape.samples, exact.shape[1] + 7), torch.nan, dtype=torch.float64)
    columns = panel[:, 3:-4]
    assert run(shape, x, g, backend=backend, out=columns) is columns
    assert (columns - exact).norm() <= 1e-12 * exact.norm()
    run(shape, x, -3 * g, backend=backend, out=columns, accumulate=True)
    assert (columns + 2 * exact).norm() <= 1e-12 * exact.norm()
    assert panel[:, :3].isnan().all()
    assert panel[:, -4:].isnan().all()


@pytest.mark.parametrize("backend", [*backends(without=("cuda",)), "reference"])
@pytest.mark.parametrize("name", ["ragged", "depthwise", "small groups", "1d"])
def test_rows_of_a_sample_are_summed(backend, name):
    shape = SHAPES[name]
    x, g = draw(shape._replace(samples=6), torch.float64)
    exact = one_by_one(shape, x, g).unflatten(0, (2, 3)).sum(1)
    got = run(shape, x.unflatten(0, (2, 3)), g.unflatten(0, (2, 3)), backend=backend)
    assert (got - exact).norm() <= 1e-12 * exact.norm()
    turned = [t.unflatten(0, (3, 2)).transpose(0, 1) for t in (x, g)]
    exact = one_by_one(shape, x, g).unflatten(0, (3, 2)).sum(0)
    assert (run(shape, *turned, backend=backend) - exact).norm() <= 1e-12 * exact.norm()


@pytest.mark.parametrize("backend", [*backends(without=("cuda",)), "reference"])
@pytest.mark.parametrize("groups", [1, 2, 12])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_transposed_convolution_exchanges_the_two(backend, groups, dimensions):
    options = {"stride": 3, "padding": 1, "dilation": 2, "groups": groups}
    kernel = (3, 2, 3)[:dimensions]
    x = torch.randn(2, 12, *(3, 4, 2)[:dimensions], dtype=torch.float64)
    weight = torch.zeros(12, 24 // groups, *kernel, dtype=torch.float64, requires_grad=True)
    function = TRANSPOSED[dimensions]
    g = torch.randn_like(function(x, weight, output_padding=1, **options))
    exact = torch.stack(
        [
            torch.autograd.grad(function(a[None], weight, output_padding=1, **options), weight, b[None])[0].flatten()
            for a, b in zip(x, g, strict=True)
        ]
    )
    got = convolution_sample_gradients(g, x, kernel, backend=backend, **options)
    assert (got - exact).norm() <= 1e-12 * exact.norm()


@pytest.mark.parametrize("backend", [*backends(without=("cuda",)), "reference"])
def test_nothing_to_sum(backend):
    """No samples: no rows. No positions: zeros, or what was there."""
    empty = convolution_sample_gradients(torch.ones(0, 3, 5, 5), torch.ones(0, 4, 3, 3), (3, 3), backend=backend)
    assert empty.shape == (0, 108)
    x, g = torch.ones(2, 3, 2, 5), torch.ones(2, 4, 0, 3)
    assert torch.equal(convolution_sample_gradients(x, g, (3, 3), backend=backend), torch.zeros(2, 108))
    out = torch.ones(2, 108)
    convolution_sample_gradients(x, g, (3, 3), out=out, accumulate=True, backend=backend)
    assert torch.equal(out, torch.ones(2, 108))


@pytest.mark.parametrize("name", ["resnet", "ragged", "small groups", "one sample", "many positions"])
def test_threads_and_company_change_no_bit(name):
    shape = SHAPES[name]
    x, g = draw(shape._replace(samples=5), torch.float32)
    alone = torch.cat([run(shape, x[i : i + 1], g[i : i + 1], backend="cpu") for i in range(5)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(shape, x, g, backend="cpu"), alone)
    finally:
        torch.set_num_threads(before)


def test_no_gradient_flows_and_inputs_stay():
    shape = SHAPES["ragged"]
    x, g = draw(shape, torch.float32)
    copies = x.clone(), g.clone()
    got = run(shape, x.requires_grad_(), g)
    assert not got.requires_grad
    assert torch.equal(x, copies[0])
    assert torch.equal(g, copies[1])


def test_the_reference_serves_transforms():
    shape = SHAPES["ragged"]
    x, g = draw(shape, torch.float64)
    each = torch.func.vmap(lambda a, b: run(shape, a[None], b[None])[0])(x, g)
    assert (each - one_by_one(shape, x, g)).norm() <= 1e-12 * each.norm()


def test_opcheck():
    x, g = torch.randn(2, 1, 4, 1, 5, 5), torch.randn(2, 1, 6, 1, 3, 3)
    ones = [1, 1, 1]
    arguments = (x, g, torch.zeros(2, 6 * 4 * 9), [1, 3, 3], ones, [0, 0, 0], ones, 1, True)
    torch.library.opcheck(torch.ops.sdfast._sample_convolution.default, arguments)


def test_compiles():
    shape = SHAPES["ragged"]
    x, g = draw(shape, torch.float64)
    compiled = torch.compile(lambda a, b: 2 * run(shape, a, b), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, g), 2 * run(shape, x, g))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"kernel_size": (3, 3, 3, 3)}, ValueError, "kernel_size: got 4 numbers"),
        ({"kernel_size": (0, 3)}, ValueError, "kernel_size: got 0, wanted at least 1"),
        ({"stride": 1.5}, TypeError, "stride"),
        ({"stride": (1, 2, 3)}, ValueError, "stride: got 3 numbers, wanted one or 2"),
        ({"padding": -1}, ValueError, "padding: got -1"),
        ({"groups": 0}, ValueError, "groups: got 0"),
        ({"groups": 2}, ValueError, "input: got 3 channels, wanted a multiple of groups=2"),
        ({"input": torch.ones(2, 3, 5)}, ValueError, r"input: got shape \(2, 3, 5\)"),
        ({"input": torch.ones(2, 3, 5, 5).half()}, TypeError, "input: got float16, wanted float32 or float64"),
        ({"gradient": torch.ones(2, 4, 3, 3).double()}, TypeError, "gradient: got float64, wanted float32"),
        ({"gradient": torch.ones(3, 4, 3, 3)}, ValueError, "gradient: got 3 samples"),
        ({"gradient": torch.ones(2, 4, 4, 3)}, ValueError, "gradient: got 4 positions along an axis"),
        ({"accumulate": True}, ValueError, "out: got None"),
        ({"out": torch.ones(2, 107)}, ValueError, r"out: got shape \(2, 107\), wanted \(2, 108\)"),
        ({"out": torch.ones(2, 108).double()}, TypeError, "out: got float64"),
        ({"out": torch.ones(108, 2).t()}, ValueError, "out: got strides"),
        ({"out": torch.ones(1, 108).expand(2, 108)}, ValueError, "out: got strides"),
        ({"backend": "cuda"}, NotImplementedError, "backend='cuda'"),
    ],
)
def test_errors_name_the_argument(change, error, text):
    given = {"input": torch.ones(2, 3, 5, 5), "gradient": torch.ones(2, 4, 3, 3), "kernel_size": (3, 3)} | change
    x, g, kernel = given.pop("input"), given.pop("gradient"), given.pop("kernel_size")
    with pytest.raises(error, match=text):
        convolution_sample_gradients(x, g, kernel, **given)
