"""The products alone: error bounds of every precision on the same gradients, and their growth with the width."""

import pytest
import torch

from sdfast.ntk.blocks import Block
from sdfast.ntk.products import TERMS, product, products_in, rounded, tile_of_factors, tile_of_rows

BOUNDS = {"float64": 1e-15, "float32": 2e-6, "bf16x3": 2e-5, "tf32": 1e-4, "bf16": 1e-3}


def heavy_tailed(n, p, generator):
    """Columns of different sizes, as parameters have: the largest of 10⁶ is ten times the median.

    Rounded operands have an error of about a unit over √(columns that matter): of a few, no bound but the unit holds.
    """
    scale = torch.exp(0.5 * torch.randn(p, generator=generator))
    shared = torch.randn(1, p, generator=generator)  # so that off-diagonal entries are not all near zero
    return (torch.randn(n, p, generator=generator) + shared) * scale


def error_of(rows, precision):
    exact = rows.double() @ rows.double().T
    got = product(rows, rows, precision)
    scale = exact.diagonal().sqrt()
    return float(((got - exact).abs() / torch.outer(scale, scale)).max())


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("p", [10_000, 100_000, 1_000_000])
def test_error_over_the_diagonal_is_flat_in_the_width(precision, p):
    generator = torch.Generator().manual_seed(torch.randint(2**31, ()).item())
    assert error_of(heavy_tailed(8, p, generator), precision) <= BOUNDS[precision]


@pytest.mark.parametrize("precision", BOUNDS)
def test_positive_products_lose_nothing_in_long_sums(precision):
    """Entries of one sign: what an accumulator that is never promoted would round away."""
    rows = torch.rand(4, 40 * TERMS) + 0.5
    assert error_of(rows, precision) <= BOUNDS[precision]


def test_rounding_is_that_of_bfloat16():
    numbers = torch.cat(
        [torch.randn(1000) * 10.0 ** torch.arange(-20, 20, 0.04), torch.tensor([0.0, -0.0, 1e38, -3e-39])]
    )
    assert torch.equal(rounded(numbers, 7), numbers.bfloat16().float())
    assert torch.equal(rounded(rounded(numbers, 10), 10), rounded(numbers, 10))
    assert ((rounded(numbers, 10) - numbers).abs() <= numbers.abs() * 2.0**-11 + 1e-38).all()
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(rounded(special, 7).isnan(), special.isnan())
    assert torch.equal(rounded(special, 7)[:2], special[:2])


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("form", ["one", "trace", "per_class", "full"])
def test_contraction_equals_materialisation(precision, form):
    """Within the bound of the precision, relative to √(H_ii H_jj)."""
    classes, n, m, t, d, p = 3, 5, 4, 6, 7, 8
    a, b = torch.randn(n + m, t, d), torch.randn(classes, n + m, t, p)
    rows = torch.einsum("ntd,cntp->cnpd", a.double(), b.double()).flatten(2)
    exact = tile_of_rows(rows, rows, form, "float64")
    got = tile_of_factors((a[:n], b[:, :n]), (a[n:], b[:, n:]), form, precision)
    diagonal = tile_of_rows(rows, rows, "trace", "float64").diagonal().sqrt()
    scale = torch.outer(diagonal[:n], diagonal[n:])
    # The bound holds for the factors' own norms too, which for T positions may exceed the gradient's.
    assert float(((got - exact[..., :n, n:]).abs() / scale).max()) <= 30 * BOUNDS[precision]


def test_tokens_contract_by_equality():
    tokens, b = torch.randint(-1, 4, (6, 5)), torch.randn(2, 6, 5, 3)
    one_hot = torch.nn.functional.one_hot(tokens + 1, 5)[..., 1:].float()
    for form in ("trace", "full"):
        left = tile_of_factors((tokens, b), (tokens, b), form, "float64")
        right = tile_of_factors((one_hot, b), (one_hot, b), form, "float64")
        assert torch.allclose(left, right, rtol=1e-12, atol=1e-12)


def test_a_block_of_factors_alone():
    a, b = torch.randn(4, 2, 3), torch.randn(1, 4, 2, 5)
    block = Block(torch.zeros(1, 4, 0), {"w": (a, b)})
    rows = torch.einsum("ntd,ntp->npd", a.double(), b[0].double()).flatten(1)
    tile = block.tile(block, slice(0, 4), slice(0, 4), "one", "float64")
    assert torch.allclose(tile, rows @ rows.T, rtol=1e-12)


def test_the_unit_that_is_asked_for():
    for precision, wanted in {
        "float32": "ieee",
        "float64": "ieee",
        "tf32": "tf32",
        "bf16": "tf32",
        "bf16x3": "tf32",
    }.items():
        with products_in(precision):
            assert torch.backends.cuda.matmul.fp32_precision == wanted
        assert torch.backends.cuda.matmul.fp32_precision == "none"
