"""The path against dense solves, brentq, scikit-learn's KernelRidge chained by hand, and the paper's own example."""

import json
import subprocess
import sys
import textwrap
import tracemalloc

import numpy as np
import pytest
import scipy.sparse
import torch
from hilbert.kernels_at_random import random_problem
from scipy.optimize import brentq
from sklearn.datasets import load_digits
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel

from sdfast.hilbert import decompose, secular, self_distill


@pytest.fixture
def rng():
    return np.random.default_rng(torch.initial_seed())


def dense_fit(gram, y, epsilon):
    """One round by brentq on log c and dense solves: c and f, or None where the labels collapse."""
    points = len(gram)
    if (y**2).sum() <= points * epsilon:
        return None

    def fit(c):
        return gram / points @ np.linalg.solve(gram / points + c * np.eye(points), y)

    def excess(log_c):
        return ((fit(np.exp(log_c)) - y) ** 2).sum() / points / epsilon - 1

    scale = np.linalg.norm(gram / points, 2)
    log_c = brentq(excess, np.log(scale) - 25, np.log(scale) + 40, xtol=1e-13, rtol=1e-14)
    return np.exp(log_c), fit(np.exp(log_c))


@pytest.mark.parametrize("outputs", [None, 1, 3])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.02])  # collapse after a few fits to many
def test_against_brentq_and_dense_solves(rng, outputs, share):
    for _ in range(5):
        gram, y = random_problem(rng, outputs=outputs, decades=3)
        epsilon = share * (y**2).sum() / len(y)
        path = self_distill(gram, y, tolerance=epsilon)
        target, rounds = y, 0
        cross = rng.normal(size=(4, len(y)))
        while (fitted := dense_fit(gram, target, epsilon)) is not None:
            c, f = fitted
            np.testing.assert_allclose(path.c[rounds], c, rtol=1e-8)  # brentq's root, through c's condition
            np.testing.assert_allclose(path.targets[rounds], target, atol=1e-10 * np.abs(y).max())
            np.testing.assert_allclose(path.predictions[rounds], f, atol=1e-10 * np.abs(y).max())
            predicted = cross / len(y) @ np.linalg.solve(gram / len(y) + path.c[rounds] * np.eye(len(y)), target)
            got = path.predict(cross, rounds + 1)
            np.testing.assert_allclose(got, predicted, atol=1e-8 * np.abs(predicted).max())
            target, rounds = f, rounds + 1
        assert path.collapsed_at == rounds == len(path)


def test_against_kernel_ridge_chained_by_hand(rng):
    x, labels = load_digits(return_X_y=True)
    x, y = x[:300] / 16, np.eye(10)[labels[:300]] - 0.1
    gram, cross = rbf_kernel(x[:200], gamma=0.1), rbf_kernel(x[200:], x[:200], gamma=0.1)
    path = self_distill(gram, y[:200], relative_tolerance=0.05, rounds=4)
    target = y[:200]
    for t in range(4):
        ridge = KernelRidge(alpha=200 * path.c[t], kernel="precomputed").fit(gram, target)  # alpha = K c
        np.testing.assert_allclose(path.predict(cross, t + 1), ridge.predict(cross), atol=1e-10)
        target = ridge.predict(gram)
        np.testing.assert_allclose(path.predictions[t], target, atol=1e-10)
    assert path.collapsed_at is None


def test_every_round_meets_its_tolerance(rng):
    for _ in range(50):
        gram, y = random_problem(rng, outputs=2)
        for joint in (True, False):
            path = self_distill(gram, y, relative_tolerance=0.07, rounds=30, joint=joint)
            fits = np.isfinite(path.c)
            got = np.where(fits, path.training_error / path.tolerance[0 if joint else slice(None)], 1)
            np.testing.assert_allclose(got, 1, rtol=1e-12)


def test_outputs_with_their_own_tolerance_are_paths_of_their_own(rng):
    gram, y = random_problem(rng, points=9, outputs=3, decades=2)
    tolerance = (y**2).mean(0) * [0.3, 0.1, 0.02]
    path = self_distill(gram, y, tolerance=tolerance, joint=False)
    alone = [self_distill(gram, y[:, q], tolerance=tolerance[q]) for q in range(3)]
    assert path.collapsed_at == tuple(each.collapsed_at for each in alone)
    assert len(path) == max(map(len, alone))
    for q, each in enumerate(alone):
        fits = len(each)
        np.testing.assert_allclose(path.c[:fits, q], each.c, rtol=1e-12)
        assert np.all(np.isinf(path.c[fits:, q]))
        for name in ("B", "A", "predictions", "targets"):
            got, wanted = getattr(path, name)[..., q], getattr(each, name)
            np.testing.assert_allclose(got[:fits], wanted, atol=1e-10 * np.abs(y).max())
            assert name == "targets" or not got[fits:].any()
        np.testing.assert_allclose(path.degrees_of_freedom[:fits, q], each.degrees_of_freedom, rtol=1e-10)
        np.testing.assert_allclose(path.norms[:fits, q], each.norms, rtol=1e-10)
        np.testing.assert_allclose(path.label_error[:fits, q], each.label_error, rtol=1e-10)


def test_fields_agree_with_each_other(rng):
    gram, y = random_problem(rng, points=8, outputs=2, decades=2)
    path = self_distill(gram, y, relative_tolerance=0.05)
    np.testing.assert_allclose(np.cumprod(path.A, axis=0), path.B, rtol=1e-13)
    np.testing.assert_allclose(path.targets[1:], path.predictions[:-1], atol=1e-13 * np.abs(y).max())
    np.testing.assert_allclose(path.norms, np.linalg.norm(path.targets, axis=(1, 2)), rtol=1e-12)
    wrong = ((path.predictions - y) ** 2).sum((1, 2)) / len(y)
    np.testing.assert_allclose(path.label_error, wrong, rtol=1e-9)
    np.testing.assert_allclose(path.predict(gram, 2), path.predictions[1], atol=1e-12 * np.abs(y).max())
    vectors = path.spectrum.vectors
    smoother = vectors @ np.diag(path.B[2]) @ vectors.T
    np.testing.assert_allclose(smoother @ y, path.predictions[2], atol=1e-12 * np.abs(y).max())
    assert path.degrees_of_freedom[2] == pytest.approx(np.trace(smoother), rel=1e-12)
    table = path.to_dataframe()
    assert list(table["round"]) == list(range(1, len(path) + 1))
    np.testing.assert_array_equal(table["c"], path.c)
    separate = self_distill(gram, y, relative_tolerance=0.05, joint=False).to_dataframe()
    assert list(separate["output"][:2]) == [0, 1]


def test_equivalent_kernel_both_ways(rng):
    for _ in range(20):
        gram, y = random_problem(rng, points=10, decades=3)
        path = self_distill(gram, y, relative_tolerance=0.1)
        cross = rng.normal(size=(6, 10)) @ gram  # in the kernel's span
        for t in range(1, len(path) + 1):
            equivalent = path.equivalent_gram(t)
            ridge = np.linalg.solve(equivalent / 10 + path.c[0] * np.eye(10), y)
            np.testing.assert_allclose(equivalent / 10 @ ridge, path.predictions[t - 1], atol=1e-12 * np.abs(y).max())
            elsewhere = path.equivalent_cross_gram(cross, t) / 10 @ ridge
            wanted = path.predict(cross, t)
            np.testing.assert_allclose(elsewhere, wanted, atol=1e-9 * np.abs(wanted).max())
            d, c = path.spectrum.values, path.c
            product = np.prod([(d + c[i]) / d for i in range(t)], axis=0)
            np.testing.assert_allclose(path.equivalent_spectrum(t), c[0] / (product - 1), rtol=1e-9)
            filtered = path.equivalent_spectrum(t) / (path.equivalent_spectrum(t) + c[0])
            np.testing.assert_allclose(filtered, path.B[t - 1], rtol=2e-15)  # eq. 25 read backwards
        np.testing.assert_allclose(path.equivalent_spectrum(1), path.spectrum.values, rtol=1e-12)
        np.testing.assert_allclose(path.equivalent_gram(1), gram, atol=1e-12 * np.abs(gram).max())


def test_equivalent_kernel_of_one_output(rng):
    gram, y = random_problem(rng, points=6, outputs=2, decades=2)
    path = self_distill(gram, y, relative_tolerance=0.1, joint=False, rounds=2)
    alone = self_distill(gram, y[:, 1], relative_tolerance=0.1, rounds=2)
    np.testing.assert_allclose(path.equivalent_gram(2, output=1), alone.equivalent_gram(2), rtol=1e-9)
    with pytest.raises(ValueError, match="output: got None, wanted 0 to 1"):
        path.equivalent_gram(2)
    with pytest.raises(ValueError, match="output: got 0, wanted None"):
        alone.equivalent_gram(2, output=0)


def test_early_stopping_has_the_same_error_and_less_contrast(rng):
    for _ in range(50):
        gram, y = random_problem(rng, decades=4)
        path = self_distill(gram, y, relative_tolerance=0.05)
        match = path.early_stopping_match()
        for t in range(len(path)):
            single = gram / len(y) @ np.linalg.solve(gram / len(y) + match.c[t] * np.eye(len(y)), y)
            assert ((single - y) ** 2).mean() == pytest.approx(path.label_error[t], rel=1e-9)
        np.testing.assert_allclose(match.c[0], path.c[0], rtol=1e-9)
        kept = path.B
        np.testing.assert_allclose(match.contrast, np.log10(kept.max(1) / kept.min(1)), atol=1e-9)
        assert np.all(match.early_stopping_contrast <= match.limit + 1e-12)
        assert np.all(match.contrast >= match.early_stopping_contrast - 1e-9)


def spline_grams(points):
    grid = np.arange(11) / 10 if points == 11 else np.arange(1, 12) / 12
    x, t = grid[:, None], grid[None, :]
    return grid, np.maximum((x - t) ** 3, 0) / 6 - x * (1 - t) * (x**2 - 2 * t + t**2) / 6


def test_figure_2_over_400_seeds():
    """Methods, B13: on the paper's grid two eigenvalues vanish and 42 % of the seeds are infeasible; inside, none."""
    fits, infeasible, best, gain = [], {"ends": 0, "inside": 0}, [], []
    for name, points in (("ends", 11), ("inside", 12)):
        grid, gram = spline_grams(points)
        clean = np.sin(2 * np.pi * grid)
        for seed in range(400):
            y = clean + 0.5 * np.random.default_rng(seed).normal(size=11)
            if (y**2).mean() <= 0.04:
                continue
            path = self_distill(gram, y, tolerance=0.04)
            infeasible[name] += path.infeasible is not None
            if path.infeasible:
                assert path.spectrum.rank == 9
                assert len(path) == 0
                assert (y[0] ** 2 + y[10] ** 2) / 11 == pytest.approx(path.infeasible.unreachable_energy[0])
                assert "2 eigenvalues" in str(path.infeasible)
                assert path.collapsed_at is None
                continue
            if name == "inside":
                errors = ((path.predictions - clean) ** 2).mean(1)
                fits.append(len(path))
                best.append(errors.argmin())
                gain.append(1 - errors.min() / errors[0])
    assert 0.37 < infeasible["ends"] / 400 < 0.48
    assert infeasible["inside"] == 0
    assert np.median(fits) == 5
    assert (min(fits), max(fits)) in {(low, high) for low in (3, 4) for high in (7, 8, 9)}
    assert np.median(best) in (1, 2)
    assert 0.5 < np.median(gain) < 0.68


def test_units_of_labels_and_kernel_do_not_matter(rng):
    gram, y = random_problem(rng, points=9, decades=2)
    y = y / np.abs(y).max()
    plain = self_distill(gram, y, relative_tolerance=0.05)
    for label, kernel in ((1e-150, 1.0), (1e150, 1.0), (1.0, 1e-150), (1.0, 1e150)):
        path = self_distill(gram * kernel, y * label, relative_tolerance=0.05)
        np.testing.assert_allclose(path.c / kernel, plain.c, rtol=1e-10)
        np.testing.assert_allclose(path.predictions / label, plain.predictions, atol=1e-12)
        np.testing.assert_allclose(path.equivalent_gram(2) / kernel, plain.equivalent_gram(2), atol=1e-10)
        for criterion in ("gcv", "loo"):
            choice, wanted = path.best_round(criterion), plain.best_round(criterion)
            assert choice == wanted
            np.testing.assert_allclose(choice.standard_errors / label**2, wanted.standard_errors, rtol=1e-8)


def test_as_many_rounds_as_one_likes(rng):
    """Memory is for the fits there are, not for those asked for."""
    gram, y = random_problem(rng, points=6, decades=1)
    path = self_distill(gram, y, relative_tolerance=1e-4, rounds=2**70)
    assert path.collapsed_at == len(path) < 1e4
    for backend in ("array", "native") if secular.why_not_native() is None else ("array",):
        again = self_distill(gram, y, relative_tolerance=1e-4, rounds=10**15, backend=backend)
        np.testing.assert_allclose(again.c, path.c, rtol=1e-9)


def test_an_infeasible_output_leaves_the_others(rng):
    gram = np.diag([0.0, 1.0, 2.0, 3.0]) * 4
    y = np.array([[1.0, 0.01], [1, 1], [1, 1], [1, -1]])
    path = self_distill(gram, y, relative_tolerance=0.1, joint=False)
    assert path.infeasible.outputs == (0,)
    assert np.isnan(path.c[:, 0]).all()
    assert np.isnan(path.predictions[..., 0]).all()
    alone = self_distill(gram, y[:, 1], relative_tolerance=0.1)
    np.testing.assert_allclose(path.c[: len(alone), 1], alone.c)
    assert path.collapsed_at == (None, len(alone))
    with pytest.raises(ValueError, match=r"path: has no fits for outputs \(0,\): 1 eigenvalues"):
        path.best_round()
    assert "gcv" not in path.to_dataframe()


def test_duplicated_points_and_a_single_one():
    x = np.array([[0.0], [0.0], [1.0], [2.0]])
    gram = rbf_kernel(x, gamma=1)
    contradiction = np.array([1.0, -1.0, 0.5, 0.5])
    path = self_distill(gram, contradiction, tolerance=0.1)
    assert path.infeasible.unreachable_energy[0] == pytest.approx(0.5)  # ((1 - -1)² / 2) / 4
    assert self_distill(gram, contradiction, tolerance=0.51).infeasible is None
    one = self_distill([[2.0]], [3.0], tolerance=1.0)
    np.testing.assert_allclose(one.predictions[:, 0], [2.0, 1.0])  # each fit comes to within 1
    assert one.collapsed_at == 2


def test_rounds_caps_the_fits(rng):
    gram, y = random_problem(rng, points=6, decades=1)
    path = self_distill(gram, y, relative_tolerance=1e-4, rounds=3)
    assert len(path) == 3
    assert path.collapsed_at is None
    assert self_distill(gram, y, relative_tolerance=0.9, rounds=50).collapsed_at is not None


def test_jitter_is_part_of_the_kernel(rng):
    gram, y = random_problem(rng, points=6)
    path = self_distill(gram, y, relative_tolerance=0.1, jitter=0.5)
    plain = self_distill(gram + 0.5 * np.eye(6), y, relative_tolerance=0.1)
    np.testing.assert_allclose(path.c, plain.c, rtol=1e-9)
    np.testing.assert_allclose(path.predictions, plain.predictions, atol=1e-9 * np.abs(y).max())


def test_inputs_are_left_alone_unless_asked(rng):
    gram, y = random_problem(rng, points=7)
    before = gram.copy(), y.copy()
    path = self_distill(gram, y, relative_tolerance=0.1)
    path.equivalent_gram(1), path.best_round(), path.best_round("loo")
    np.testing.assert_array_equal(gram, before[0])
    np.testing.assert_array_equal(y, before[1])
    for order in "CF":
        work = np.array(gram, order=order)
        again = self_distill(work, y, relative_tolerance=0.1, overwrite_gram=True)
        np.testing.assert_allclose(again.c, path.c, rtol=1e-8)
        assert not np.array_equal(work, gram)


def test_one_decomposition_serves_everything(rng, monkeypatch):
    calls = []
    plain = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda *arguments: calls.append(0) or plain(*arguments))
    gram, y = random_problem(rng, points=20, outputs=3, decades=2)
    path = self_distill(gram, y, relative_tolerance=0.05)
    path.best_round(), path.best_round("loo"), path.equivalent_gram(2), path.early_stopping_match(), path.to_dataframe()
    path.predict(gram, 2), path.at_tolerance(0.5).best_round(), path.degrees_of_freedom, path.norms
    assert len(calls) == 1


@pytest.mark.parametrize("outputs", [1, 6])
def test_in_place_no_second_matrix_is_made(rng, outputs):
    """Memory beyond the Gram matrix is O(K · outputs), and a few megabytes to look at it in."""
    points = 1200
    x = rng.normal(size=(points, 4))
    gram, y = rbf_kernel(x, gamma=4), rng.normal(size=(points, outputs))
    tracemalloc.start()
    try:
        path = self_distill(gram, y, relative_tolerance=0.1, rounds=5, overwrite_gram=True)
        path.best_round(), path.best_round("loo"), path.noise_rate, path.degrees_of_freedom
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.shares_memory(path.spectrum.vectors, gram)
    assert len(path) > 1
    assert peak < 6 * 2**20 < 0.6 * gram.nbytes


def test_float32_and_torch_grams(rng):
    gram, y = random_problem(rng, points=8, decades=2)
    wanted = self_distill(gram, y, relative_tolerance=0.1)
    single = self_distill(gram.astype(np.float32), y.astype(np.float32), relative_tolerance=0.1)
    np.testing.assert_allclose(single.c, wanted.c, rtol=1e-2)
    assert single.c.dtype == np.float64
    shared = self_distill(torch.from_numpy(gram), torch.from_numpy(y), relative_tolerance=0.1)
    np.testing.assert_array_equal(shared.c, wanted.c)
    with pytest.raises(TypeError, match="gram: a Tensor that cannot be handed over"):
        self_distill(torch.ones(2, 2, requires_grad=True), y[:2], tolerance=0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gram": np.ones((3, 4))}, ValueError, r"gram: got shape \(3, 4\), wanted a square"),
        ({"gram": np.ones(3)}, ValueError, "wanted a square"),
        ({"gram": np.zeros((0, 0))}, ValueError, "at least one point"),
        ({"gram": [[1, 2], [3]]}, TypeError, "gram: got list"),
        ({"gram": np.array([["a", "b"], ["c", "d"]])}, TypeError, "wanted real numbers"),
        ({"gram": np.eye(3) * 1j}, TypeError, "wanted real numbers"),
        ({"gram": np.triu(np.ones((3, 3)))}, ValueError, "differs from its transpose by up to 1"),
        ({"gram": np.diag([1.0, 1, -0.25])}, ValueError, r"indefinite, its smallest.* is -0\.25 .*jitter=0\.25"),
        ({"gram": np.array([[1, np.nan, 0], [np.nan, 1, 0], [0, 0, 1]])}, ValueError, r"gram: entry \(0, 1\) is nan"),
        ({"y": np.array([1.0, 2])}, ValueError, r"y: got shape \(2,\), wanted \(3,\)"),
        ({"y": np.ones((3, 1, 1))}, ValueError, "y: got shape"),
        ({"y": np.ones((3, 0))}, ValueError, "y: got shape"),
        ({"y": np.array([0, 1, 2])}, TypeError, "y: got int64, wanted floats; class labels"),
        ({"y": np.array([1.0, np.inf, 2])}, ValueError, r"y: entry \(1,\) is inf"),
        ({"y": np.full(3, 2.0)}, ValueError, "every point has the same label"),
        ({"tolerance": 0.0}, ValueError, "tolerance: got 0.0, wanted > 0"),
        ({"tolerance": -1.0}, ValueError, "wanted > 0"),
        ({"tolerance": np.nan}, ValueError, "wanted > 0"),
        ({"tolerance": 5.0}, ValueError, r"wanted below 4\.66667, the label energy.*collapses"),
        ({"tolerance": [0.1, 0.2]}, ValueError, r"tolerance: got shape \(2,\) with joint=True"),
        ({"tolerance": None}, ValueError, "got neither, wanted exactly one"),
        ({"relative_tolerance": 0.1}, ValueError, "got both"),
        ({"tolerance": None, "relative_tolerance": 1.0}, ValueError, r"wanted within \(0, 1\).*collapses"),
        ({"tolerance": None, "relative_tolerance": np.nan}, ValueError, "wanted within"),
        ({"rounds": 0}, ValueError, "rounds: got 0, wanted at least 1"),
        ({"rounds": 2.0}, TypeError, "rounds: got float"),
        ({"rounds": True}, TypeError, "rounds: got bool"),
        ({"jitter": -1.0}, ValueError, "jitter: got -1.0"),
        ({"rank_tolerance": 1.0}, ValueError, "rank_tolerance: got 1.0"),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
        ({"gram": [[2.0, 0, 0], [0, 1, 0], [0, 0, 1]], "overwrite_gram": True}, TypeError, "gram is a list"),
        ({"gram": np.eye(3, dtype=np.float32), "overwrite_gram": True}, TypeError, "gram is of float32, wanted a cont"),
        ({"gram": np.eye(6)[::2, ::2], "overwrite_gram": True}, TypeError, "wanted a contiguous writeable float64"),
        ({"overwrite_gram": 1}, TypeError, "overwrite_gram: got 1, wanted True or False"),
        ({"joint": "no"}, TypeError, "joint: got 'no', wanted True or False"),
        ({"gram": None}, TypeError, "gram: got NoneType, wanted a dense array"),
        ({"gram": scipy.sparse.eye_array(3)}, TypeError, "gram: got dia_array, wanted a dense array"),
        ({"gram": np.ma.masked_equal(np.eye(3), 0)}, TypeError, "gram: got a masked array"),
        ({"gram": torch.eye(3, dtype=torch.bfloat16)}, TypeError, "gram: a Tensor that cannot be handed over"),
        ({"gram": torch.eye(3, device="meta")}, TypeError, "gram: a Tensor that cannot be handed over.*meta"),
        ({"y": np.array([1.0, 2, 3]) * 1e200}, ValueError, r"y: its energy ‖y‖²/K is inf in float64"),
        ({"y": np.array([[1.0, 0], [2, 0], [3, 0]]), "joint": False}, ValueError, "energy ‖y‖²/K of output 1 is 0.0"),
        ({"y": np.array([1.0, 2, 3]) * 1e-160}, ValueError, "wanted below"),
        (
            {"y": np.array([1.0, 2, 3]) * 1e-160, "tolerance": None, "relative_tolerance": 0.1},
            ValueError,
            r"tolerance: comes to 4\.67e-321, wanted at least 1e-303: squares .* another unit",
        ),
        ({"gram": [[2.0]], "y": [0.0]}, ValueError, "y: its energy ‖y‖²/K is 0.0"),
        ({"tolerance": True}, TypeError, "tolerance: got True, wanted a number"),
        ({"tolerance": "small"}, TypeError, "tolerance: got dtype"),
        ({"tolerance": None, "relative_tolerance": "small"}, TypeError, "relative_tolerance: got str, wanted a number"),
        ({"tolerance": None, "relative_tolerance": [0.1]}, TypeError, "relative_tolerance: got list"),
        ({"jitter": None}, TypeError, "jitter: got NoneType, wanted a number"),
        ({"rank_tolerance": "a"}, TypeError, "rank_tolerance: got str"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    arguments = {"gram": np.diag([1.0, 2, 3]), "y": np.array([1.0, 2, 3]), "tolerance": 0.1} | change
    with pytest.raises(error, match=message) as raised:
        self_distill(**arguments)
    assert "\n" not in str(raised.value)


def test_bad_arguments_of_methods(rng):
    gram, y = random_problem(rng, points=5)
    path = self_distill(gram, y, relative_tolerance=0.5)
    with pytest.raises(ValueError, match="round: got 0, wanted 1"):
        path.predict(gram, 0)
    with pytest.raises(ValueError, match="round: got 99"):
        path.equivalent_gram(99)
    for wrong, name in ((1.0, "float"), (True, "bool"), ("1", "str"), (np.array([1]), "ndarray")):
        with pytest.raises(TypeError, match=f"round: got {name}, wanted an integer"):
            path.predict(gram, wrong)
    with pytest.raises(ValueError, match=r"factor: got -1\.0, wanted a finite number > 0"):
        path.at_tolerance(-1)
    with pytest.raises(ValueError, match="rounds: got 0"):
        path.at_tolerance(0.5, rounds=0)
    with pytest.raises(ValueError, match=r"cross_gram: got shape \(5, 4\), wanted \(points, 5\)"):
        path.predict(gram[:, :4], 1)
    with pytest.raises(ValueError, match="criterion: got 'aic'"):
        path.best_round("aic")
    outputs = self_distill(gram, rng.normal(size=(5, 2)), relative_tolerance=0.5, joint=False)
    with pytest.raises(ValueError, match="tolerance: got 100, wanted below"):
        self_distill(gram, rng.normal(size=(5, 2)), tolerance=100, joint=False)
    with pytest.raises(ValueError, match="output: got 2, wanted 0 to 1"):
        outputs.equivalent_gram(1, output=2)
    with pytest.raises(TypeError, match="output: got str"):
        outputs.equivalent_gram(1, output="a")
    with pytest.raises(NotImplementedError, match="joint=True"):
        outputs.early_stopping_match()


def test_rank_cut(rng):
    x = rng.normal(size=(12, 3))
    spectrum = decompose(x @ x.T)  # a linear kernel of three features
    assert spectrum.rank == 3
    assert np.count_nonzero(spectrum.values) == 3
    assert decompose(np.diag([1.0, 1e-3]), rank_tolerance=1e-2).rank == 1


def test_plot_shows_bars_and_curves(rng):
    gram, y = random_problem(rng, points=10, decades=2)
    for joint in (True, False):
        figure = self_distill(gram, np.c_[y, y[::-1]], relative_tolerance=0.1, joint=joint).plot()
        assert len(figure.axes) == 5
        assert len(figure.axes[0].patches) >= 10


def test_the_wing_imports_no_torch(tmp_path):
    script = tmp_path / "no_torch.py"
    script.write_text(
        textwrap.dedent("""
        import sys

        class NoTorch:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "torch":
                    raise ImportError("there is no torch here")

        sys.meta_path.insert(0, NoTorch())
        import json
        import numpy as np
        import sdfast.hilbert as hilbert

        x = np.random.default_rng(0).normal(size=(20, 2))
        path = hilbert.self_distill(hilbert.kernels.gram("rbf", x), x[:, 0], relative_tolerance=0.1)
        path.best_round(), path.noise_rate, path.plot(), path.to_dataframe()
        hilbert.bounds.fits_interval(3.0), hilbert.mixing
        hilbert.KernelSelfDistillation().fit(x, x[:, 0]).predict(x)
        print(json.dumps([len(path), "torch" in sys.modules]))
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fits, torch_is_there = json.loads(done.stdout)
    assert fits > 1
    assert not torch_is_there
