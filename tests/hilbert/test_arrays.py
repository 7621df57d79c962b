"""One source for every array library: torch's arrays stand in for CuPy's where there is no GPU."""

import numpy as np
import pytest
import torch
from hilbert.kernels_at_random import random_problem

from sdfast.hilbert import Spectrum, decompose, kernels, mixing, self_distill
from sdfast.hilbert.path import distill_spectrum


@pytest.fixture
def rng():
    return np.random.default_rng(torch.initial_seed())


@pytest.fixture(params=["torch", pytest.param("cupy", marks=pytest.mark.cuda)])
def library(request):
    """Another array library: from a NumPy array, back to one, and the type between."""
    if request.param == "torch":
        return lambda array: torch.from_numpy(np.array(array)), np.asarray, torch.Tensor
    cupy = pytest.importorskip("cupy")
    return cupy.asarray, cupy.asnumpy, cupy.ndarray


def in_library(path, to_library):
    """The same path with its spectrum, labels and tolerance in the other library."""
    spectrum = Spectrum(to_library(path.spectrum.values), to_library(path.spectrum.vectors), path.spectrum.rank)
    y, tolerance = to_library(path.y), to_library(path.tolerance)
    return distill_spectrum(spectrum, y, tolerance, joint=path.joint, single=path.single, backend="array")


@pytest.mark.parametrize("joint", [True, False])
def test_paths_of_another_array_library(rng, library, joint):
    to_library, to_numpy, kind = library
    gram, y = random_problem(rng, points=9, outputs=2, decades=2)
    y = np.eye(2)[(y[:, 0] > 0).astype(int)] - 0.5
    y[0], y[1] = [0.5, -0.5], [-0.5, 0.5]
    wanted = self_distill(gram, y, relative_tolerance=0.1, joint=joint, backend="array")
    path = in_library(wanted, to_library)
    assert isinstance(path.c, kind)
    assert path.collapsed_at == wanted.collapsed_at
    names = ("c", "A", "B", "targets", "predictions", "norms", "training_error", "label_error", "degrees_of_freedom")
    for name in names:
        got = to_numpy(getattr(path, name))
        np.testing.assert_allclose(got, getattr(wanted, name), rtol=1e-9, atol=1e-9, err_msg=name)
    for criterion in ("gcv", "loo"):
        np.testing.assert_allclose(to_numpy(path.scores(criterion)), wanted.scores(criterion), rtol=1e-7)
    choice = path.best_round()
    assert choice == wanted.best_round()
    np.testing.assert_allclose(to_numpy(choice.standard_errors), wanted.best_round().standard_errors, rtol=1e-6)
    for factor, found in wanted.best_round().other_tolerances.items():
        assert choice.other_tolerances[factor] == (found and (found[0], pytest.approx(found[1])))
    assert path.noise_rate() == wanted.noise_rate()
    output = None if joint else 1
    equivalent = to_numpy(path.equivalent_gram(2, output=output))
    np.testing.assert_allclose(equivalent, wanted.equivalent_gram(2, output=output), rtol=1e-8)
    spectra = to_numpy(path.equivalent_spectrum(2)), wanted.equivalent_spectrum(2)
    np.testing.assert_allclose(*spectra, rtol=1e-9)
    assert path.to_dataframe().shape == wanted.to_dataframe().shape
    if joint:
        match = to_numpy(path.early_stopping_match().contrast)
        np.testing.assert_allclose(match, wanted.early_stopping_match().contrast, rtol=1e-8)


def test_infeasible_outputs_of_another_array_library(library):
    to_library, to_numpy, _ = library
    y = np.array([[1.0, 0.01], [1, 1], [1, 1], [1, -1]])
    wanted = self_distill(np.diag([0.0, 4.0, 8.0, 12.0]), y, relative_tolerance=0.1, joint=False)
    path = in_library(wanted, to_library)
    assert path.infeasible.outputs == wanted.infeasible.outputs == (0,)
    assert path.collapsed_at == wanted.collapsed_at
    np.testing.assert_allclose(to_numpy(path.c), wanted.c, rtol=1e-9)


def test_network_kernels_and_splines_of_another_array_library(rng):
    x = rng.uniform(size=(5, 1))
    for name in ("spline", "arc_cosine", "relu_ntk"):
        function = kernels.KERNELS[name]
        wanted = function(x)
        monkey = torch.from_numpy(x)
        shared = kernels.gram(name, monkey)  # handed over through DLPack
        np.testing.assert_allclose(shared, wanted, atol=1e-12)


@pytest.mark.cuda
def test_cupy_from_end_to_end(rng):
    cupy = pytest.importorskip("cupy")
    gram, y = random_problem(rng, points=40, outputs=3, decades=3)
    cross = rng.normal(size=(5, 40))
    wanted = self_distill(gram, y, relative_tolerance=0.1)
    path = self_distill(cupy.asarray(gram), cupy.asarray(y), relative_tolerance=0.1)
    assert isinstance(path.c, cupy.ndarray)
    np.testing.assert_allclose(path.c.get(), wanted.c, rtol=1e-7)
    np.testing.assert_allclose(path.predict(cupy.asarray(cross), 2).get(), wanted.predict(cross, 2), rtol=1e-7)
    assert path.best_round() == wanted.best_round()
    assert path.to_dataframe().shape == wanted.to_dataframe().shape
    shared = self_distill(torch.from_numpy(gram).cuda(), cupy.asarray(y), relative_tolerance=0.1)
    np.testing.assert_allclose(shared.c.get(), wanted.c, rtol=1e-7)
    spectrum = decompose(cupy.asarray(gram))
    found = mixing.optimal_rounds(spectrum, cupy.asarray(y), ridge=0.1, rounds=3)
    same = mixing.optimal_rounds(gram, y, ridge=0.1, rounds=3)
    np.testing.assert_allclose(found.scores.get(), same.scores, rtol=1e-6)
    rounds = mixing.mixed_rounds(spectrum, cupy.asarray(y), [0.3, 1.5], ridge=0.1, rounds=3)
    same = mixing.mixed_rounds(gram, y, [0.3, 1.5], ridge=0.1, rounds=3)
    np.testing.assert_allclose(rounds.fitted(3).get(), same.fitted(3), atol=1e-9 * np.abs(y).max())
    for name in ("arc_cosine", "relu_ntk"):
        points = rng.normal(size=(5, 3))
        np.testing.assert_allclose(
            kernels.gram(name, cupy.asarray(points)).get(), kernels.gram(name, points), rtol=1e-9
        )
    x = rng.uniform(size=(6, 1))
    np.testing.assert_allclose(kernels.spline(cupy.asarray(x)).get(), kernels.spline(x), atol=1e-12)
    with pytest.raises(NotImplementedError, match="scikit-learn"):
        kernels.gram("rbf", cupy.asarray(x))
    with pytest.raises(TypeError, match="y: is a numpy array"):
        self_distill(cupy.asarray(gram), y, relative_tolerance=0.1)
