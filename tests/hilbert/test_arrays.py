"""One source for every array library: torch's arrays stand in for CuPy's where there is no GPU."""

import numpy as np
import pytest
import torch
from hilbert.kernels_at_random import random_problem

from sdfast.hilbert import Spectrum, decompose, kernels, mixing, self_distill
from sdfast.hilbert.path import distill_spectrum


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.mark.parametrize("joint", [True, False])
def test_paths_of_another_array_library(rng, joint):
    gram, y = random_problem(rng, points=9, outputs=2, decades=2)
    y = np.eye(2)[(y[:, 0] > 0).astype(int)] - 0.5
    y[0], y[1] = [0.5, -0.5], [-0.5, 0.5]
    wanted = self_distill(gram, y, relative_tolerance=0.1, joint=joint, backend="array")
    spectrum = Spectrum(
        *(torch.from_numpy(np.array(each)) for each in (wanted.spectrum.values, wanted.spectrum.vectors)), 9
    )
    tolerance = torch.from_numpy(np.array(wanted.tolerance))
    path = distill_spectrum(spectrum, torch.from_numpy(y), tolerance, joint=joint, backend="array")
    assert isinstance(path.c, torch.Tensor)
    assert path.collapsed_at == wanted.collapsed_at
    names = ("c", "A", "B", "targets", "predictions", "norms", "training_error", "label_error", "degrees_of_freedom")
    for name in names:
        np.testing.assert_allclose(getattr(path, name), getattr(wanted, name), rtol=1e-9, atol=1e-9, err_msg=name)
    for criterion in ("gcv", "loo"):
        np.testing.assert_allclose(path.scores(criterion), wanted.scores(criterion), rtol=1e-7)
    choice = path.best_round()
    assert choice == wanted.best_round()
    np.testing.assert_allclose(choice.standard_errors, wanted.best_round().standard_errors, rtol=1e-6)
    assert path.noise_rate() == wanted.noise_rate()
    output = None if joint else 1
    np.testing.assert_allclose(
        path.equivalent_gram(2, output=output), wanted.equivalent_gram(2, output=output), rtol=1e-8
    )
    if joint:
        match = wanted.early_stopping_match()
        np.testing.assert_allclose(path.early_stopping_match().contrast, match.contrast, rtol=1e-8)


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
    x = rng.uniform(size=(6, 1))
    np.testing.assert_allclose(kernels.spline(cupy.asarray(x)).get(), kernels.spline(x), atol=1e-12)
    with pytest.raises(NotImplementedError, match="scikit-learn"):
        kernels.gram("rbf", cupy.asarray(x))
    with pytest.raises(TypeError, match="y: is a numpy array"):
        self_distill(cupy.asarray(gram), y, relative_tolerance=0.1)
