"""The eigensolver on the cases where others break, against numpy.linalg.eigh in float64."""

import warnings

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from sdfast.ntk import Eigenspace, eigenspace, krylov, operands

DENSE_IS_CHEAPER = operands.Matrix.dense_is_cheaper, operands.Operator.dense_is_cheaper


@pytest.fixture(params=["krylov", "dense", "as it chooses"])
def way(request, monkeypatch):
    """Small matrices are decomposed densely; both ways must be right on all of them."""
    if request.param != "as it chooses":
        dense = request.param == "dense"
        for kind in (operands.Matrix, operands.Operator):
            monkeypatch.setattr(kind, "dense_is_cheaper", lambda self, k: dense)
    return request.param


def rotated(spectrum):
    """A symmetric float64 matrix of that spectrum, its eigenvectors drawn at random."""
    vectors = np.linalg.qr(np.random.default_rng(torch.randint(2**31, ()).item()).normal(size=(len(spectrum),) * 2))[0]
    matrix = (vectors * np.asarray(spectrum)) @ vectors.T
    return (matrix + matrix.T) / 2


def rank(n, r):
    factor = torch.randn(n, r, dtype=torch.float64).numpy()
    return factor @ factor.T


def duplicated(n):
    """Every sample stands there three times."""
    gram = rank(n, 12)
    rows = np.repeat(np.arange(n), 3)
    return gram[np.ix_(rows, rows)]


i = np.arange(1, 301)
CASES = {
    "identity": (lambda: np.eye(200), 5),
    "exact rank 3": (lambda: rank(150, 3), 5),
    "repeated across the k-th": (lambda: rotated([9.0, 8, 7, 6, 6, 6, 6, *(1 / i[:200])]), 5),
    "repeated more often than a block is wide": (lambda: rotated([*[2.0] * 22, *[1.0] * 22, *(0.5 / i[:200])]), 30),
    "diagonal, repeated": (lambda: np.diag([*[2.0] * 22, *[1.0] * 22, *(0.5 / i[:200])]), 30),
    "duplicated samples": (lambda: duplicated(60), 5),
    "geometric decay": (lambda: rotated(0.8**i), 20),
    "1/i² decay": (lambda: rotated(1.0 / i**2), 40),
    "n < 3k": (lambda: rotated(1.0 / i[:20]), 8),
    "k = n": (lambda: rotated(1.0 / i[:30]), 30),
    "k = n - 1": (lambda: rotated(1.0 / i[:30]), 29),
    "n = 1": (lambda: np.array([[3.0]]), 1),
    "n = 2": (lambda: rotated([2.0, 1.0]), 1),
    "zero": (lambda: np.zeros((40, 40)), 3),
    "tiny": (lambda: 1e-12 * rotated(1.0 / i**2), 5),
    "huge": (lambda: 1e12 * rotated(1.0 / i**2), 5),
    "flat tail": (lambda: rotated([5, 4, 3, 2.5, 2, *np.linspace(1, 0.9, 250)]), 5),
    "indefinite": (lambda: rotated([3.0, 2, 1, *np.linspace(0.1, -4, 200)]), 3),
    "negative": (lambda: rotated(np.linspace(-1, -5, 100)), 3),
}  # fmt: skip


def assert_right(space, matrix, k, tolerance):
    """Values within the tolerance, residuals as claimed, orthonormal vectors, and the space where it is determined."""
    exact, vectors = np.linalg.eigh(np.asarray(matrix, dtype=np.float64))
    exact, vectors = exact[::-1], vectors[:, ::-1]
    scale = np.abs(exact).max()
    got, v = np.asarray(space.values), np.asarray(space.vectors)
    assert got.dtype == v.dtype == np.float64
    assert v.shape == (len(matrix), k)
    np.testing.assert_allclose(got, exact[:k], rtol=0, atol=tolerance * scale)
    assert np.all(np.diff(got) <= 0)
    np.testing.assert_allclose(v.T @ v, np.eye(k), atol=1e-11)
    true = np.linalg.norm(matrix @ v - v * got, axis=0) / (scale or 1)
    # Over |λ|_max as far as it was seen: less than it is where that is another eigenvalue than those wanted.
    seen = 1e-6 if abs(exact[0]) == scale else 1e-4
    np.testing.assert_allclose(np.asarray(space.residuals), true, rtol=seen, atol=1e-14)
    assert np.all(np.asarray(space.residuals) >= (1 - 1e-6) * true - 1e-14)
    assert np.array_equal(np.asarray(space.converged), np.asarray(space.residuals) <= tolerance)
    gap = np.inf if k == len(matrix) else (exact[k - 1] - exact[k]) / (abs(exact[k - 1]) or 1)
    if gap == np.inf:
        assert space.gap == np.inf
    elif abs(exact[k - 1]) > 1e-6 * scale:
        assert space.gap == pytest.approx(gap, abs=100 * tolerance * scale / abs(exact[k - 1]))
    if gap * abs(exact[k - 1]) > 1e-3 * scale:  # the projector, at most residual / gap away (Davis and Kahan)
        allowed = 2 * np.sqrt(k) * true.max() * scale / (gap * abs(exact[k - 1])) + 1e-11
        assert np.linalg.norm(v @ v.T - vectors[:, :k] @ vectors[:, :k].T, 2) <= allowed


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", CASES)
def test_hard_cases(case, dtype, way):
    make, k = CASES[case]
    matrix = make().astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        space = eigenspace(matrix, k)
    assert_right(space, matrix.astype(np.float64), k, 1e-10 if dtype == np.float64 else 1e-5)
    assert bool(np.all(space.converged))


@pytest.mark.parametrize("case", CASES)
def test_hard_cases_of_operators(case, way):
    make, k = CASES[case]
    matrix = make()
    space = eigenspace(aslinearoperator(matrix), k)
    assert isinstance(space.values, np.ndarray)
    assert_right(space, matrix, k, 1e-10)


def test_kinds_of_arrays():
    matrix = rotated(1.0 / i**2)
    exact = np.linalg.eigvalsh(matrix)[::-1][:4]
    tensor = torch.from_numpy(matrix)
    strided = torch.zeros(300, 600, dtype=torch.float64)[:, ::2]
    strided[:] = tensor
    readonly = matrix.copy()
    readonly.flags.writeable = False
    given = [tensor, tensor.float(), strided, tensor.T, tensor[None].expand(1, 300, 300)[0]]
    given += [matrix, np.asfortranarray(matrix), matrix[::-1, ::-1][::-1, ::-1], readonly, matrix.astype(">f8")]
    given += [csr_matrix(matrix), LinearOperator((300, 300), matvec=lambda v: matrix @ v, dtype=float)]
    before = matrix.copy()
    for gram in given:
        space = eigenspace(gram, 4)
        kind = torch.Tensor if isinstance(gram, torch.Tensor) else np.ndarray
        assert isinstance(space, Eigenspace)
        assert all(isinstance(a, kind) for a in (space.values, space.vectors, space.residuals, space.converged))
        np.testing.assert_allclose(np.asarray(space.values), exact, atol=1e-6)
        assert len(space) == 4
    np.testing.assert_array_equal(matrix, before)
    for half in (torch.float16, torch.bfloat16):
        exact = np.linalg.eigvalsh(tensor.to(half).double().numpy())[::-1][:2]
        np.testing.assert_allclose(eigenspace(tensor.to(half), 2).values, exact, atol=1e-6)


class TorchOperator:
    """What `sdfast.ntk.operator` will look like to the solver."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype, self.device = matrix, matrix.shape, matrix.dtype, matrix.device
        self.columns = 0

    def matmat(self, columns):
        assert columns.dtype == self.dtype
        self.columns += columns.shape[1]
        return self.matrix @ columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_operator_of_tensors(dtype):
    matrix = torch.from_numpy(rotated(1.0 / i**2)).to(dtype)
    operator = TorchOperator(matrix)
    space = eigenspace(operator, 5)
    assert isinstance(space.values, torch.Tensor)
    if dtype == torch.float64:
        assert_right(space, matrix.numpy(), 5, 1e-10)
    else:  # whose residuals are as exact as the operator multiplies
        torch.testing.assert_close(space.values, torch.linalg.eigvalsh(matrix.double()).flip(0)[:5], rtol=1e-5, atol=0)
        assert space.residuals.max() < 2e-6
    assert operator.columns < 150  # where a dense decomposition asks for all 300


def test_matrix_and_operator_agree(monkeypatch):
    for kind in (operands.Matrix, operands.Operator):
        monkeypatch.setattr(kind, "dense_is_cheaper", lambda self, k: False)
    matrix = rotated(0.7**i)
    explicit, free = eigenspace(matrix, 6), eigenspace(aslinearoperator(matrix), 6)
    np.testing.assert_allclose(explicit.values, free.values, rtol=1e-10)
    np.testing.assert_allclose(explicit.vectors @ explicit.vectors.T, free.vectors @ free.vectors.T, atol=1e-8)


def test_top_five_of_float32_grams(monkeypatch):
    """Given the same float32 matrix, the five largest eigenvalues of a kernel's Gram are right to 1e-6."""
    monkeypatch.setattr(operands.Matrix, "dense_is_cheaper", lambda self, k: False)
    x = torch.randn(600, 6)
    gram = torch.exp(-(torch.cdist(x, x) ** 2) / 20)
    gram = ((gram + gram.T) / 2).float()
    exact = np.linalg.eigvalsh(gram.double().numpy())[::-1][:5]
    np.testing.assert_allclose(eigenspace(gram, 5).values, exact, rtol=1e-6)


def test_a_residual_below_float32_is_reached_with_products_in_float64(monkeypatch):
    monkeypatch.setattr(operands.Matrix, "dense_is_cheaper", lambda self, k: False)
    matrix = rotated(1.0 / i).astype(np.float32)
    for tolerance in (1e-7, 1e-11):
        space = eigenspace((matrix + matrix.T) / 2, 5, tolerance=tolerance)
        assert "in float64" in space.method
        assert "float32" not in space.method
        assert_right(space, ((matrix + matrix.T) / 2).astype(np.float64), 5, tolerance)
    with pytest.warns(UserWarning, match="5 pairs have not converged.*max_iterations came first"):
        space = eigenspace((matrix + matrix.T) / 2, 5, max_iterations=4)  # too few of the first, so the second goes on
    assert "4 products of 32 columns in float32, then 4 products of" in space.method
    coarse = eigenspace(rotated(1.0 / i), 5, tolerance=1e-5, precision="float32")
    assert "float32" in coarse.method
    assert "float64" not in coarse.method
    assert coarse.converged.all()
    assert "float64" in eigenspace(matrix, 5, precision="float64").method


def test_a_warm_start_saves_products_and_misses_nothing(monkeypatch):
    monkeypatch.setattr(operands.Matrix, "dense_is_cheaper", lambda self, k: False)
    matrix = rotated(1.0 / i)
    columns = {}
    for name, start in {"cold": None, "warm": eigenspace(matrix, 5)}.items():
        outcome = []
        monkeypatch.setattr(krylov, "top_pairs", _remember(krylov.top_pairs, outcome))
        space = eigenspace(matrix + 1e-9 * np.eye(300), 5, start=start)
        columns[name] = sum(o.columns for o in outcome)
        assert_right(space, matrix + 1e-9 * np.eye(300), 5, 1e-10)
    assert columns["warm"] <= 0.6 * columns["cold"]
    # The start is an invariant subspace, but of the smallest eigenvalues: each is a converged pair of its own.
    low = np.linalg.eigh(matrix)[1][:, :5]
    assert_right(eigenspace(matrix, 5, start=low), matrix, 5, 1e-10)
    assert_right(eigenspace(matrix, 5, start=torch.from_numpy(low[:, :2])), matrix, 5, 1e-10)


def _remember(function, outcomes):
    def wrapped(*arguments):
        outcomes.append(function(*arguments))
        return outcomes[-1]

    return wrapped


def test_repeatable_and_seeded(monkeypatch):
    monkeypatch.setattr(operands.Matrix, "dense_is_cheaper", lambda self, k: False)
    matrix = torch.from_numpy(rotated(1.0 / i)).float()
    first, second, other = (eigenspace(matrix, 5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.vectors, second.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    state = torch.get_rng_state()
    eigenspace(matrix, 5)
    assert torch.equal(state, torch.get_rng_state())


def test_unconverged_pairs_are_marked(monkeypatch):
    monkeypatch.setattr(operands.Matrix, "dense_is_cheaper", lambda self, k: False)
    matrix = rotated([5.0, *(1 + 1e-3 * np.random.rand(299))])
    with pytest.warns(UserWarning, match=r"of 4 pairs have not converged: the largest residual is .* wanted 1e-12"):
        space = eigenspace(matrix, 4, max_iterations=3, tolerance=1e-12)
    true = np.linalg.norm(matrix @ space.vectors - space.vectors * space.values, axis=0) / np.linalg.norm(matrix, 2)
    np.testing.assert_allclose(space.residuals, true, rtol=1e-6)
    assert np.array_equal(space.converged, true <= 1e-12)
    assert not space.converged.all()
    with pytest.raises(RuntimeError, match="have not converged"):
        eigenspace(matrix, 4, max_iterations=3, tolerance=1e-12, strict=True)


def test_the_choice_of_method_is_said():
    assert eigenspace(np.eye(50), 3).method == "dense eigh in float64"
    assert "block Krylov" in eigenspace(rotated(1.0 / np.arange(1, 801)), 3).method
    assert eigenspace(rotated(1.0 / np.arange(1, 801)), 700).method == "dense eigh in float64"
