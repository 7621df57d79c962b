"""The k top eigenpairs of a float32 Gram matrix at the same true residual, n = 2,000 and 8,000, k = 5 and 100.

Spectra: that of the NTK of an MLP on digits (log-log interpolated to n), 1/i, 1/i², and k separate eigenvalues over a
flat tail. Every solver gets the loosest of its own settings with which its largest ‖Hv − λv‖ / λ₁, in float64 sums, is
at most 1e-5; a row that never gets there says so, and its residual is recorded. Checking the matrix, and the final
residuals, are part of our time and of nobody else's.
"""

import functools
import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from sklearn.utils.extmath import randomized_svd
from torch.func import functional_call, grad, vmap

import sdfast
from benchmarks.harness import Case, interleaved, measure
from benchmarks.shapes import ON_GPU, TINY
from sdfast.ntk.eigenspace import eigenspace

RESIDUAL = 1e-5
SPECTRA = ("NTK", "1/i", "1/i²", "flat tail")
GROUPS = [f"{spectrum} n={n} k={k}" for n in (2000, 8000) for spectrum in SPECTRA for k in (5, 100)]
GPU_GROUPS = ("1/i n=60 k=5",) if TINY else ("1/i n=8000 k=100", "NTK n=50000 k=100", "1/i n=50000 k=100")
PEERS = {"eigsh": "eigsh", "lobpcg": "torch.lobpcg", "randomized_svd": "randomized_svd", "eigh": "torch.linalg.eigh"}
TARGETS = {
    group: {"sdfast": (0.56 if "k=5" in group else 0.83 if "1/i " in group or "flat" in group else 0.25,) + (None,) * 3}
    for group in GROUPS
    if "n=8000" in group
}
if ON_GPU:
    PEERS = {"lobpcg": "torch.lobpcg", "svd_lowrank": "torch.svd_lowrank"}
    TARGETS = {group: {"sdfast": (None, None)} for group in GPU_GROUPS}


@functools.lru_cache(maxsize=1)
def digits_spectrum():
    """Eigenvalues of the NTK of an MLP at its start, on all digits."""
    torch.manual_seed(0)
    data = sdfast.data.load_dataset("digits")
    inputs = torch.cat([data.train_inputs, data.test_inputs]).flatten(1)
    model = sdfast.models.mlp((inputs.shape[1], 128, 1))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = vmap(grad(lambda p, x: functional_call(model, p, (x[None],))[0, 0]), (None, 0))(parameters, inputs)
    rows = torch.cat([j.flatten(1) for j in jacobian.values()], 1).double()
    return torch.linalg.eigvalsh(rows @ rows.T).flip(0).clamp_min(1e-12).numpy()


def spectrum_of(name, n, k):
    """Descending eigenvalues."""
    i = np.arange(1, n + 1)
    if name == "NTK":
        known = digits_spectrum()
        known = known[known > 1e-9 * known[0]]
        position = np.arange(1, len(known) + 1)
        inside = np.exp(np.interp(np.log(i), np.log(position), np.log(known)))
        return np.where(i <= len(known), inside, known[-1] * (len(known) / i) ** 2)
    if name == "flat tail":
        return np.concatenate([np.linspace(1, 0.5, k), np.linspace(0.31, 0.3, n - k)])
    return 1.0 / i if name == "1/i" else 1.0 / i**2


@functools.lru_cache(maxsize=1)
def matrix_of(name, n, k):
    """A dense symmetric float32 matrix of that spectrum: a diagonal one, reflected eight times."""
    generator = np.random.default_rng(0)
    matrix = np.diag(generator.permutation(spectrum_of(name, n, k)))
    for _ in range(8):
        v = generator.normal(size=n)
        v /= np.linalg.norm(v)
        image = matrix @ v
        image -= (v @ image) * v
        matrix -= 2 * np.outer(v, image)
        matrix -= 2 * np.outer(image, v)
    matrix = matrix.astype(np.float32)
    upper = np.triu_indices(n, 1)
    matrix[upper] = matrix.T[upper]
    return matrix


def residual_of(matrix, values, vectors):
    """The largest ‖Hv − λv‖ / λ₁, summed in float64."""
    vectors = np.array(vectors, dtype=np.float64)
    vectors /= np.linalg.norm(vectors, axis=0)
    image = np.concatenate([matrix[i : i + 500].astype(np.float64) @ vectors for i in range(0, len(matrix), 500)])
    return np.linalg.norm(image - vectors * np.asarray(values, dtype=np.float64), axis=0).max() / np.max(values)


def ours(matrix, k, tolerance):
    """The package."""
    space = eigenspace(matrix, k, tolerance=tolerance)
    return space.values, space.vectors


def lanczos(matrix, k, tolerance):
    """ARPACK, as SciPy offers it."""
    return eigsh(matrix, k, tol=tolerance, v0=np.ones(len(matrix), dtype=matrix.dtype))


def lobpcg(matrix, k, iterations):
    """torch.lobpcg from a random start."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), k, generator=generator)
    values, vectors = torch.lobpcg(torch.from_numpy(matrix), X=start, niter=iterations, tol=1e-30)
    return values.numpy(), vectors.numpy()


def randomized(matrix, k, iterations):
    """scikit-learn's randomised SVD, of which a Gram matrix takes the left half."""
    vectors, values, _ = randomized_svd(matrix, k, n_iter=iterations, random_state=0)
    return values, vectors


def dense(matrix, k, _):
    """All pairs."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    return values[-k:].numpy(), vectors[:, -k:].numpy()


# Each with its settings, from loose to tight.
ROWS = {
    "sdfast": (ours, [RESIDUAL]),
    "eigsh": (lanczos, [1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 0]),
    "torch.lobpcg": (lobpcg, [5, 10, 20, 40, 80]),
    "randomized_svd": (randomized, [2, 4, 8, 16, 32]),
    "torch.linalg.eigh": (dense, [None]),
}


def prepare(group, name):
    """The step with the loosest setting that is good enough, and what it came to."""
    spectrum, points, count = group.rsplit(" ", 2)
    n, k = int(points[2:]), int(count[2:])
    matrix = matrix_of(spectrum, n, k)
    function, settings = ROWS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for setting in settings:
            residual = residual_of(matrix, *function(matrix, k, setting))
            if residual <= RESIDUAL:
                break
    if name == "sdfast" and residual > RESIDUAL:
        raise RuntimeError(f"{group}: our residual is {residual:.3g}")
    about = {"setting": setting, "residual": residual, "reached": bool(residual <= RESIDUAL), "dtype": "float32"}
    return Case(lambda: function(matrix, k, setting), floor_bytes=2 * n * n, rounds=1, about=about)


def reflected(spectrum, n, k):
    """The same matrix on a GPU, in float32 from the start."""
    values = torch.tensor(spectrum_of(spectrum, n, k).copy(), dtype=torch.float32)
    matrix = torch.diag(values[torch.randperm(n)])
    for _ in range(8):
        v = torch.nn.functional.normalize(torch.randn(n), dim=0)
        image = matrix @ v
        image -= (v @ image) * v
        matrix.addr_(v, image, alpha=-2).addr_(image, v, alpha=-2)
    for i in range(0, n, 1000):  # the same bits on both sides
        matrix[i : i + 1000, i + 1000 :] = matrix[i + 1000 :, i : i + 1000].T
        block = matrix[i : i + 1000, i : i + 1000]
        block.copy_(block.tril() + block.tril(-1).T)
    return matrix


@functools.lru_cache(maxsize=1)
def matrix_on_gpu(group):
    """(matrix, k)"""
    spectrum, points, count = group.rsplit(" ", 2)
    n, k = int(points[2:]), int(count[2:])
    return reflected(spectrum, n, k), k


def lobpcg_on_gpu(matrix, k):
    """torch.lobpcg for forty iterations from a random start."""
    return torch.lobpcg(matrix, k, niter=40)


def svd_on_gpu(matrix, k):
    """torch.svd_lowrank with four power iterations."""
    left, values, _ = torch.svd_lowrank(matrix, k, niter=4)
    return values, left


ON_DEVICE = {
    "sdfast": lambda matrix, k: (lambda space: (space.values, space.vectors))(eigenspace(matrix, k)),
    "torch.lobpcg": lobpcg_on_gpu,
    "torch.svd_lowrank": svd_on_gpu,
}


def prepare_on_gpu(group, name):
    """A row's step, and the residual that it comes to."""
    matrix, k = matrix_on_gpu(group)
    n, step = len(matrix), functools.partial(ON_DEVICE[name], matrix, k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        values, vectors = step()
    vectors = torch.nn.functional.normalize(vectors.double(), dim=0)
    image = torch.cat([part.double() @ vectors for part in matrix.split(2000)])
    residual = ((image - vectors * values.double()).norm(dim=0).max() / values.max()).item()
    if name == "sdfast" and residual > RESIDUAL:
        raise RuntimeError(f"{group}: our residual is {residual:.3g}")
    about = {"residual": residual, "reached": bool(residual <= RESIDUAL), "dtype": "float32"}
    return Case(step, floor_bytes=2 * n * n, rounds=1, about=about)


needs_no_gpu = pytest.mark.skipif(ON_GPU, reason="these arrays are NumPy's: no figure of a GPU's")


@pytest.mark.skipif(not ON_GPU, reason="a GPU's matrices")
@interleaved(GPU_GROUPS, ON_DEVICE)
def test_on_gpu(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare_on_gpu)


@needs_no_gpu
@interleaved([group for group in GROUPS if "n=2000" in group], ROWS, turns=5)
def test_small(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)


@needs_no_gpu
@interleaved([group for group in GROUPS if "n=8000" in group], [name for name in ROWS if "eigh" not in name], turns=5)
def test_large(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)
