"""Gram products against the definition in float64."""

import pytest
import torch

from sdfast.ops.gram import PRECISIONS, TERMS, add_gram, add_hadamard_gram
from sdfast.ops.gram.precision import rounded
from sdfast.ops.gram.reference import hadamard_reference, product_reference
from tests.helpers import backends

# (I, J or None: the triangle, K): one tile, ragged tiles, several panels, a single entry, no columns
SHAPES = {
    "one tile": (5, None, 40),
    "panels": (200, None, 33),
    "ragged": (67, 131, 70),
    "single": (1, 1, 1),
    "no columns": (4, None, 0),
    "no rows": (0, 3, 7),
    "nothing on a side": (0, None, 7),
}
SPLITS = [(7, 3), (1, 40), (33, 1)]  # narrower, wider and as wide as a step
EPS = {"float32": 2.0**-24, "float64": 2.0**-53, "bf16x3": 2.0**-24, "tf32": 2.0**-24, "bf16": 2.0**-24}


def draw(shape, dtype=torch.float32):
    rows, columns, width = shape
    left = torch.randn(rows, width, dtype=torch.float64).to(dtype)
    return left, None if columns is None else torch.randn(columns, width, dtype=torch.float64).to(dtype)


def assert_close(got, exact, scale, precision, terms):
    """Against a sum of `terms` products of the rounded operands: what float32 sums may lose, and no more."""
    assert not got.isnan().any()
    assert (
        (got.double() - exact).abs() <= 2 * EPS[precision] * max(1, min(terms, TERMS)) ** 0.5 * scale + 1e-300
    ).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", [*backends(without=("cuda",)), "reference"])
def test_rows(backend, name, precision):
    left, right = draw(SHAPES[name], torch.float64 if precision == "float64" else torch.float32)
    other = left if right is None else right
    exact = product_reference(left, other, precision)
    scale = left.double().norm(dim=1)[:, None] * other.double().norm(dim=1)
    for dtype in (torch.float64,) if precision == "float64" else (torch.float64, torch.float32):
        before = torch.randn(len(left), len(other), dtype=dtype)
        total = before.clone()
        assert add_gram(total, left, right, precision=precision, backend=backend) is total
        added = exact.tril() if right is None else exact
        room = 0 if dtype == torch.float64 else before.abs().double() + exact.abs()
        assert_close(total, before.double() + added, scale + room, precision, left.shape[1])
        if right is None:
            assert torch.equal(total.triu(1), before.triu(1))


@pytest.mark.parametrize("backend", backends(without=("cuda",)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_triangles(backend, dtype):
    """Rows and columns around every size at which a kernel turns to its next piece, in rows far apart."""
    name = str(dtype).removeprefix("torch.")
    for rows in (1, 7, 31, 33, 64, 97):
        for width in (1, 127, 129, 1023, 1025, 2600):
            held = torch.randn(rows, width + 5, dtype=torch.float64).to(dtype)
            left = held[:, 2 : 2 + width]
            exact = product_reference(left, left, name).tril()
            total = torch.full((rows, rows + 3), 2.0, dtype=torch.float64)
            add_gram(total[:, :rows], left, precision=name, backend=backend)
            scale = 2 + left.double().norm(dim=1)[:, None] * left.double().norm(dim=1)
            assert_close(total[:, :rows].tril(), exact + 2 * torch.ones_like(exact).tril(), scale, name, width)
            assert (total[:, :rows].triu(1) == torch.full_like(exact, 2.0).triu(1)).all()
            assert (total[:, rows:] == 2).all()


def in_threads(compute):
    """The result of 1, 2 and 3 threads, which has to have the same bits."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(compute())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


@pytest.mark.skipif("cpu" not in backends(), reason="the native library is not there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [257, 305, 600])
def test_tiles_that_threads_share(rows, dtype):
    """Beyond the rows of one band, triangles and rectangles, columns around every piece, in rows far apart."""
    name = str(dtype).removeprefix("torch.")
    for width in (1, 127, 129, TERMS + 130):
        held = torch.randn(rows, width + 5, dtype=torch.float64).to(dtype)
        left, right = held[:, 2 : 2 + width], torch.randn(64 + width % 100, width, dtype=torch.float64).to(dtype)
        for other in (left, right):
            triangle = other is left
            exact = product_reference(left, other, name)

            def compute(left=left, other=other, triangle=triangle):
                total = torch.full((len(left), len(other) + 3), 2.0, dtype=torch.float64)
                add_gram(total[:, :-3], left, None if triangle else other, precision=name, backend="cpu")
                return total

            total = in_threads(compute)
            assert (total[:, -3:] == 2).all()
            if triangle:
                exact = exact.tril()
                assert (total[:, :-3].triu(1) == torch.full_like(exact, 2.0).triu(1)).all()
                total = total[:, :-3].tril() - 2 * torch.ones_like(exact).tril()
            else:
                total = total[:, :-3] - 2
            scale = 2 + left.double().norm(dim=1)[:, None] * other.double().norm(dim=1)
            assert_close(total, exact, scale, name, width)


@pytest.mark.skipif("cpu" not in backends(), reason="the native library is not there")
@pytest.mark.parametrize(
    ("rows", "triangle"), [(0, True), (1, True), (70, True), (70, False), (400, True), (400, False)]
)
def test_tiles_of_factors_that_threads_share(rows, triangle):
    splits = [(TERMS, 3), (5, 130)]
    a, b = (torch.randn(rows, sum(pair[place] for pair in splits)) for place in (0, 1))
    right = None if triangle else tuple(torch.randn(77, side.shape[1]) for side in (a, b))
    other = (a, b) if triangle else right
    exact = hadamard_reference((a, b), other, splits, "float32")
    exact += product_reference(b[:, 3:], other[1][:, 3:], "float32")  # the bias of the second

    def compute():
        total = torch.zeros(rows, len(other[0]), dtype=torch.float64)
        return add_hadamard_gram(total, (a, b), right, splits=splits, biases=[False, True], backend="cpu")

    total, exact = in_threads(compute), exact.tril() if triangle else exact
    assert (total - exact).norm() <= 4e-6 * exact.norm()
    assert not triangle or not total.triu(1).any()


@pytest.mark.parametrize("backend", backends(without=("cuda",)))
@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_rows(backend, special):
    left = torch.randn(40, 300)
    left[17, 123] = special
    total = torch.zeros(40, 40, dtype=torch.float64)
    add_gram(total, left, backend=backend)
    touched = torch.zeros(40, 40, dtype=torch.bool)
    touched[17], touched[:, 17] = True, True
    assert torch.equal(~total.isfinite(), touched.tril())


@pytest.mark.parametrize("triangle", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", [*backends(without=("cuda",)), "reference"])
def test_factors(backend, precision, triangle):
    dtype = torch.float64 if precision == "float64" else torch.float32
    sides = [
        tuple(torch.randn(rows, sum(pair[place] for pair in SPLITS), dtype=dtype) for place in (0, 1))
        for rows in ((70, 70) if triangle else (70, 35))
    ]
    right = None if triangle else sides[1]
    other = sides[0] if triangle else right
    exact = hadamard_reference(sides[0], other, SPLITS, precision)
    scale, offsets = 0, [0, 0]
    for pair in SPLITS:
        factor = 1
        for place in (0, 1):
            columns = slice(offsets[place], offsets[place] + pair[place])
            factor = factor * sides[0][place][:, columns].double().norm(dim=1)[:, None]
            factor = factor * other[place][:, columns].double().norm(dim=1)
            offsets[place] += pair[place]
        scale = scale + factor
    total = torch.full_like(exact, 3.0)
    add_hadamard_gram(total, sides[0], right, splits=SPLITS, precision=precision, backend=backend)
    assert_close(total, 3 + (exact.tril() if triangle else exact), 4 * scale, precision, 40)
    if triangle:
        assert (total.triu(1) == torch.full_like(total, 3.0).triu(1)).all()


@pytest.mark.parametrize("biases", [None, (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("backend", [*backends(without=("cuda",)), "reference"])
def test_factors_equal_the_gradients_they_stand_for(backend, biases):
    splits = [(7, 3), (2, 5)]
    a, b = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    layers = list(zip(a.split([7, 2], 1), b.split([3, 5], 1), strict=True))
    rows = [(right[:, :, None] * left[:, None, :]).flatten(1) for left, right in layers]
    rows = torch.cat([*rows, *(b for (_, b), bias in zip(layers, biases or (), strict=False) if bias)], 1)
    total = torch.zeros(6, 6, dtype=torch.float64)
    add_hadamard_gram(total, (a, b), splits=splits, biases=biases, precision="float64", backend=backend)
    assert (total - (rows @ rows.T).tril()).norm() <= 1e-14 * total.norm()
    total = torch.zeros(4, 2, dtype=torch.float64)
    sides = (a[:4], b[:4]), (a[4:], b[4:])
    add_hadamard_gram(total, *sides, splits=splits, biases=biases, precision="float64", backend=backend)
    assert (total - rows[:4] @ rows[4:].T).norm() <= 1e-14 * rows[:4].norm() * rows[4:].norm()
    with pytest.raises(ValueError, match="biases: got 1 of them, wanted one for each of the 2 layers"):
        add_hadamard_gram(total, *sides, splits=splits, biases=[True], backend=backend)


@pytest.mark.parametrize("backend", backends(without=("cuda",)))
@pytest.mark.parametrize("precision", ["float32", "bf16x3"])
def test_the_error_does_not_grow_with_the_columns(backend, precision):
    """Numbers of one sign, whose float32 sum would lose digits with every term; many sums, as one may be lucky."""
    few, many = (torch.rand(24, width) + 0.5 for width in (TERMS, 4 * TERMS + 5))
    errors = []
    for rows in (few, many):
        total = torch.zeros(24, 24, dtype=torch.float64)
        add_gram(total, rows, precision=precision, backend=backend)
        exact = product_reference(rows, rows, precision).tril()
        errors.append(((total - exact).norm() / exact.norm()).item())
    assert errors[1] <= 2 * max(errors[0], 2.0**-24)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", backends(without=("cuda",)))
def test_long_factors_are_promoted(backend, bias):
    a, b = torch.rand(3, 2 * TERMS + 9) + 0.5, torch.rand(3, 2)
    splits = [(a.shape[1], 2)]
    exact = hadamard_reference((a, b), (a, b), splits, "float32").tril()
    exact += bias * product_reference(b, b, "float32").tril()
    for dtype in (torch.float64, torch.float32):
        total = torch.zeros(3, 3, dtype=dtype)
        add_hadamard_gram(total, (a, b), splits=splits, biases=[bias], backend=backend)
        assert (total - exact).norm() <= 4e-6 * exact.norm()


@pytest.mark.parametrize("backend", [*backends(without=("cuda",)), "reference"])
def test_strided_operands_and_a_tile_of_a_larger_total(backend):
    whole = torch.randn(2 * 9, 2 * 21)
    left, right = whole[::2, ::2], whole[1::2, 1::2].T.contiguous().T
    panel = torch.full((9, 17), torch.nan, dtype=torch.float64)
    tile = panel[:, 3:12].zero_()
    add_gram(tile, left, right, backend=backend)
    assert (tile - left.double() @ right.double().T).abs().max() <= 1e-4
    assert panel[:, :3].isnan().all()
    assert panel[:, 12:].isnan().all()


@pytest.mark.parametrize("backend", backends(without=("cuda",)))
def test_bits_do_not_depend_on_chance(backend):
    left = torch.randn(70, 300)
    totals = [add_gram(torch.zeros(70, 70), left, backend=backend) for _ in range(2)]
    assert torch.equal(*totals)


def test_opcheck():
    total, product = torch.zeros(4, 3, dtype=torch.float64), torch.randn(4, 3)
    for factor, diagonal in ((None, None), (product, 1)):
        torch.library.opcheck(torch.ops.sdfast._gram_add.default, (total, product, factor, diagonal))


def test_rounding_is_to_nearest_even():
    x = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,)), torch.tensor([0.0, torch.inf])])
    assert torch.equal(rounded(x, 7), x.bfloat16().float())
    assert torch.equal(rounded(torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11]), 10), torch.tensor([1, 1 + 2.0**-9]))
    assert rounded(torch.tensor([torch.nan]), 7).isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"precision": "fp16"}, ValueError, "precision: got 'fp16'"),
        ({"precision": "float64"}, TypeError, "total: got float32, wanted float64"),
        ({"total": torch.zeros(2, 3)}, ValueError, r"wanted a square one|right: got shape"),
        ({"total": torch.zeros(2, 2).half()}, TypeError, "total: got float16"),
        ({"total": torch.zeros(1, 2).expand(2, 2)}, ValueError, "total: got strides"),
        ({"left": torch.zeros(3, 5)}, ValueError, r"left: got shape \(3, 5\)"),
        ({"right": torch.zeros(2, 4)}, ValueError, "right: got 4 columns, wanted 5"),
        ({"left": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "left: got int64"),
        ({"backend": "cuda"}, NotImplementedError, "backend='cuda'"),
    ],
)
def test_errors_name_the_argument(change, error, text):
    given = {"total": torch.zeros(2, 2), "left": torch.zeros(2, 5)} | change
    with pytest.raises(error, match=text):
        add_gram(given.pop("total"), given.pop("left"), given.pop("right", None), **given)


@pytest.mark.parametrize(
    ("splits", "text"), [([(5, 2)], r"left\[1\]: got 3 columns, wanted 2"), ([(5, 0)], "splits: got"),]
)  # fmt: skip
def test_errors_of_factors_name_the_argument(splits, text):
    with pytest.raises(ValueError, match=text):
        add_hadamard_gram(torch.zeros(2, 2), (torch.zeros(2, 5), torch.zeros(2, 3)), splits=splits)
