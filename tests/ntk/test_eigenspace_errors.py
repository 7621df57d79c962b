"""What the eigensolver refuses, in one line that names the argument."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator

from sdfast import _native
from sdfast.ntk import eigenspace, operands, symmetric_product


def symmetric(n=80, dtype=torch.float64):
    matrix = torch.randn(n, n, dtype=dtype)
    return (matrix + matrix.T) / 2


def with_entry(value, where=(3, 50), n=80, dtype=torch.float64, both=True):
    matrix = symmetric(n, dtype)
    matrix[where] = value
    if both:
        matrix[where[::-1]] = value
    return matrix


def nan_operator():
    return LinearOperator((300, 300), matvec=lambda v: v * np.nan, dtype=float)


def skew_operator():
    matrix = np.triu(np.random.rand(300, 300))
    return LinearOperator((300, 300), matvec=lambda v: matrix @ v, dtype=float)


ERRORS = {
    "k 0": (lambda: (symmetric(), 0), ValueError, "k: got 0, wanted 1 to 80"),
    "k > n": (lambda: (symmetric(), 81), ValueError, "k: got 81, wanted 1 to 80"),
    "k float": (lambda: (symmetric(), 2.0), TypeError, "k: got float"),
    "k bool": (lambda: (symmetric(), True), TypeError, "k: got bool"),
    "rectangular": (lambda: (torch.randn(4, 5), 1), ValueError, r"gram: got shape \(4, 5\), wanted a square"),
    "vector": (lambda: (torch.randn(4), 1), ValueError, r"gram: got shape \(4,\)"),
    "empty": (lambda: (torch.zeros(0, 0), 1), ValueError, r"gram: got shape \(0, 0\)"),
    "asymmetric": (lambda: (torch.rand(80, 80), 1), ValueError, "gram: differs from its transpose by up to"),
    "one asymmetric entry": (lambda: (with_entry(9.0, both=False), 1), ValueError, "differs from its transpose"),
    "complex": (lambda: (symmetric().to(torch.complex128), 1), TypeError, "gram: got complex128"),
    "complex array": (lambda: (np.eye(3, dtype=complex), 1), TypeError, "gram: got complex128"),
    "integers": (lambda: (torch.ones(3, 3, dtype=torch.int64), 1), TypeError, "gram: got int64"),
    "integer array": (lambda: (np.eye(3, dtype=int), 1), TypeError, "gram: got int64"),
    "long double": (lambda: (np.eye(3, dtype=np.longdouble), 1), TypeError, "gram: got float128"),
    "list": (lambda: ([[1.0]], 1), TypeError, "gram: got list"),
    "grad": (lambda: (symmetric().requires_grad_(), 1), ValueError, "gram: requires grad"),
    "NaN": (lambda: (with_entry(torch.nan), 1), ValueError, r"gram: entry \(3, 50\) is nan"),
    "infinity": (lambda: (with_entry(-torch.inf, (70, 2)), 1), ValueError, r"gram: entry \(2, 70\) is -inf"),
    "NaN above the diagonal": (lambda: (with_entry(torch.nan, both=False), 1), ValueError, r"entry \(3, 50\) is nan"),
    "NaN on the diagonal": (lambda: (with_entry(torch.nan, (9, 9)), 1), ValueError, r"entry \(9, 9\) is nan"),
    "NaN operator": (lambda: (nan_operator(), 1), ValueError, "gram: a product with it holds NaN"),
    "asymmetric operator": (lambda: (skew_operator(), 1), ValueError, "gram: is not symmetric"),
    "complex operator": (lambda: (LinearOperator((3, 3), matvec=abs, dtype=complex), 1), TypeError, "complex128"),
    "rectangular operator": (lambda: (LinearOperator((3, 4), matvec=abs, dtype=float), 1), ValueError, r"\(3, 4\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_matrices(name):
    make, error, message = ERRORS[name]
    gram, k = make()
    with pytest.raises(error, match=message) as caught:
        eigenspace(gram, k)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tolerance": 0.0}, ValueError, "tolerance: got 0.0"),
        ({"tolerance": float("nan")}, ValueError, "tolerance: got nan"),
        ({"tolerance": "1e-5"}, ValueError, "tolerance: got '1e-5'"),
        ({"max_iterations": 0}, ValueError, "max_iterations: got 0"),
        ({"max_iterations": 1.5}, TypeError, "max_iterations: got float"),
        ({"precision": "bfloat16"}, ValueError, "precision: got 'bfloat16', wanted one of"),
        ({"start": np.zeros((79, 2))}, ValueError, r"start: got shape \(79, 2\), wanted \(80, columns\)"),
        ({"start": np.zeros(80)}, ValueError, r"start: got shape \(80,\)"),
        ({"start": np.full((80, 1), np.nan)}, ValueError, "start: holds NaN"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        eigenspace(symmetric(), 2, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_asymmetry_that_rounding_explains_is_averaged(dtype):
    matrix = symmetric(100, dtype)
    nudged = matrix.clone()
    nudged[20, 60] += 8 * torch.finfo(dtype).eps * matrix.abs().max()
    assert not torch.equal(nudged, nudged.T)
    mean = ((nudged + nudged.T) / 2).double()
    space = eigenspace(nudged, 3)
    image = mean @ space.vectors
    residuals = (image - space.vectors * space.values).norm(dim=0) / torch.linalg.eigvalsh(mean).abs().max()
    torch.testing.assert_close(residuals, space.residuals, rtol=1e-6, atol=1e-15)
    nudged[20, 60] += 1e3 * torch.finfo(dtype).eps * matrix.abs().max()
    with pytest.raises(ValueError, match="differs from its transpose"):
        eigenspace(nudged, 3)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("n", [1, 2, 7, 63, 64, 65, 130, 257])
def test_symmetry_against_its_definition(n, native, monkeypatch):
    if not native:
        monkeypatch.setattr(symmetric_product, "is_native", lambda matrix: False)
    elif not _native.CPU.loaded:
        pytest.skip(_native.CPU.reason)
    for dtype in (torch.float32, torch.float64):
        matrix = torch.randn(n, n, dtype=dtype)
        expected = (matrix.abs().max().item(), (matrix.double() - matrix.double().T).abs().max().item())
        assert symmetric_product.symmetry(matrix) == pytest.approx(expected, rel=1e-6)
        matrix = matrix + matrix.T
        matrix[torch.randint(n, ()), torch.randint(n, ())] *= -1e-30
        matrix = torch.where(matrix == 0, -0.0, matrix)
        assert symmetric_product.symmetry((matrix + matrix.T) / 2)[1] == 0
        matrix[n // 2, n // 3] = torch.nan
        assert symmetric_product.symmetry(matrix)[0] == torch.inf


@pytest.mark.parametrize("native", [True, False])
def test_one_entry_that_differs_is_found(native, monkeypatch):
    """By one unit in its last place, by its sign alone, or with others of the same size."""
    if not native:
        monkeypatch.setattr(symmetric_product, "is_native", lambda matrix: False)
    elif not _native.CPU.loaded:
        pytest.skip(_native.CPU.reason)
    for draw in range(100):
        n, dtype = int(torch.randint(2, 200, ())), (torch.float32, torch.float64)[draw % 2]
        matrix = symmetric(n, dtype) + 1
        assert symmetric_product.symmetry(matrix)[1] == 0
        i, j = torch.randperm(n)[:2].tolist()
        other = matrix.clone()
        other[i, j] = torch.nextafter(matrix[i, j], matrix.new_tensor(torch.inf))
        assert symmetric_product.symmetry(other)[1] == pytest.approx((other - matrix)[i, j].item(), rel=1e-6)
        other[i, j] = -matrix[i, j]
        assert symmetric_product.symmetry(other)[1] == pytest.approx(2 * matrix[i, j].abs().item(), rel=1e-6)
        signs = torch.where(torch.ones(n, n).tril() > 0, 1, -1).to(dtype)
        assert symmetric_product.symmetry(torch.ones(n, n, dtype=dtype) * signs)[1] == 2


# 1: only the diagonal; 63 to 65: the edge of a tile of rows; 257: of a tile of columns; 700: all eight tasks are busy.
@pytest.mark.parametrize("n", [1, 2, 7, 63, 64, 65, 257, 700])
@pytest.mark.parametrize("columns", [0, 1, 4, 5, 8, 9, 16, 31, 33, 70])  # lanes of both dtypes, and panels of 32
def test_products_against_their_definition(n, columns):
    if not _native.CPU.loaded:
        pytest.skip(_native.CPU.reason)
    matrix = symmetric(n)
    for given, dtype in (
        (torch.float32, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float64),
    ):
        left, right = matrix.to(given), torch.randn(columns, n, dtype=dtype).T
        lower = left.tril() + torch.full_like(left, torch.nan).triu(1)  # the upper triangle is not read
        got = symmetric_product.multiply(lower, right)
        exact = left.double() @ right.double()
        assert got.dtype == dtype
        allowed = 4 * torch.finfo(dtype).eps * left.double().norm() * right.double().norm() + 1e-300
        assert (got - exact).norm() <= allowed
        wide = torch.full((n, 2 * n), torch.nan, dtype=given)
        wide[:, :n] = left
        assert torch.equal(symmetric_product.multiply(wide[:, :n], right), got)


def test_a_product_does_not_depend_on_the_number_of_threads():
    matrix, columns = symmetric(900, torch.float32), torch.randn(900, 11)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(symmetric_product.multiply(matrix, columns))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_without_the_native_library(monkeypatch):
    """The same answers where torch multiplies, as it does on a GPU."""
    monkeypatch.setattr(symmetric_product, "is_native", lambda matrix: False)
    monkeypatch.setattr(symmetric_product, "_ROWS", 100)
    monkeypatch.setattr(operands.Matrix, "dense_is_cheaper", lambda self, k: False)
    matrix = symmetric(330, torch.float32) + torch.diag(torch.arange(330.0))
    exact = torch.linalg.eigvalsh(matrix.double()).flip(0)[:5]
    torch.testing.assert_close(eigenspace(matrix, 5, tolerance=1e-9).values, exact, rtol=1e-10, atol=0)
    matrix[300, 7] += 1
    with pytest.raises(ValueError, match="differs from its transpose"):
        eigenspace(matrix, 5)
