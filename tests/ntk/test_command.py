"""``sdfast ntk``: its numbers, its files, its errors."""

import json

import numpy as np
import pytest
import torch

from sdfast.cli import main
from sdfast.data import load_dataset
from sdfast.models import mlp
from sdfast.ntk import gram

SMALL = ["ntk", "--samples", "40", "--hidden", "8", "--no-progress"]


def test_the_matrix_and_its_spectrum(tmp_path, capsys):
    folder = tmp_path / "out"
    assert main([*SMALL, "--output", str(folder), "--json", "--seed", "3", "--precision", "float64"]) == 0
    results = json.loads(capsys.readouterr().out)
    files = np.load(folder / "gram.npz")
    data = load_dataset("digits", seed=3)
    torch.manual_seed(3)
    wanted = gram(mlp((64, 8, 10)), data.train_inputs[:40], outputs="mean", precision="float64")
    assert np.array_equal(files["gram"], wanted.numpy())
    assert np.array_equal(files["labels"], data.train_labels[:40].numpy())
    values = np.linalg.eigvalsh(wanted.numpy())[::-1]
    assert np.allclose(files["eigenvalues"], values, rtol=1e-10, atol=1e-12)
    assert np.allclose(results["eigenvalues"], values[:10])
    assert results["trace"] == pytest.approx(float(wanted.trace()))
    assert results["effective_rank"] == pytest.approx(values.sum() ** 2 / (values**2).sum())
    assert json.loads((folder / "results.json").read_text()) == results
    for name in ("spectrum.png", "heatmap.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_pictures_are_rows_of_pixels(tmp_path, capsys):
    matrices = []
    for name in ("digits", "digit_pictures"):
        assert main([*SMALL, "--dataset", name, "--output", str(tmp_path / name)]) == 0
        matrices.append(np.load(tmp_path / name / "gram.npz")["gram"])
    assert np.array_equal(*matrices)


def test_weights_and_checkpoint_and_table(tmp_path, capsys):
    model = mlp((64, 8, 10))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    words = [*SMALL, "--weights", str(tmp_path / "w.pt"), "--outputs", "4", "--checkpoint", str(tmp_path / "c.pt"),
             "--output", str(tmp_path / "out"), "--memory", "0.00001"]  # fmt: skip
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "digits, 40 samples, 610 parameters, outputs 4, float32: trace" in told
    data = load_dataset("digits")
    wanted = gram(model, data.train_inputs[:40], outputs=4)
    assert np.allclose(np.load(tmp_path / "out" / "gram.npz")["gram"], wanted.numpy(), rtol=1e-5, atol=1e-6)
    assert main(words) == 0
    assert main([*words[:-1], "0.00002"]) == 2
    assert "checkpoint: " in capsys.readouterr().err


@pytest.mark.parametrize("positive", [[], ["--positive", "2", "7", "--center"]])
def test_what_the_labels_hold_of_the_top_eigenspace(positive, tmp_path, capsys):
    words = [*SMALL, "--samples", "128", "--topk", "7", "--output", str(tmp_path), *positive]
    words += ["--noise-sweep", "--repeats", "9", "--rates", "0", "0.25", "0.5"]
    assert main([*words, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    matrix, labels = (np.load(tmp_path / "gram.npz")[name] for name in ("gram", "labels"))
    values, vectors = (side[..., ::-1] for side in np.linalg.eigh(matrix.astype(np.float64)))
    targets = np.where(np.isin(labels, [2, 7]), 1.0, -1.0)[:, None] if positive else np.eye(10)[labels]
    targets = targets - targets.mean(0) if positive else targets
    share = np.linalg.norm(vectors[:, :7].T @ targets) / np.linalg.norm(targets)
    assert results["information_ratio"] == pytest.approx(share, abs=1e-6)
    assert results["eigenspace"]["values"] == pytest.approx(values[:7])
    assert all(results["eigenspace"]["converged"])
    assert results["eigenspace"]["gap"] == pytest.approx((values[6] - values[7]) / values[6])
    sweep = results["noise_sweep"]
    assert sweep["rates"] == [0, 0.25, 0.5]
    assert np.shape(sweep["ratios"]) == (3, 9)
    assert sweep["mean"] == pytest.approx(np.mean(sweep["ratios"], 1))
    assert sweep["deviation"] == pytest.approx(np.std(sweep["ratios"], 1, ddof=1), abs=1e-12)
    assert sweep["mean"][0] == pytest.approx(share, abs=1e-6)
    assert sweep["mean"][0] > sweep["mean"][1] > sweep["mean"][2]
    saved = np.load(tmp_path / "eigenspace.npz")
    assert np.allclose(abs(np.sum(saved["vectors"] * vectors[:, :7], 0)), 1)
    assert (tmp_path / "noise_sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert main(words) == 0
    told = capsys.readouterr().out
    assert f"information ratio of the labels {share:.3f}" in told
    assert f"{sweep['mean'][1]:.3f}" in told
    assert "noise_sweep.png" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "0"], "--samples: got 0, wanted at least 1"),
        (["--samples", "5000"], "--samples: got 5000, wanted at most the 1347 training samples of digits"),
        (["--outputs", "full"], "--outputs: got 'full', wanted sum, trace, mean or the index of an output"),
        (["--outputs", "10"], "--outputs: got 10, wanted an index below 10"),
        (["--memory", "-1"], "--memory: got -1.0, wanted a number of GiB > 0"),
        (["--batch-size", "0"], "--batch-size: got 0, wanted at least 1"),
        (["--hidden", "0"], "--hidden: got [0], wanted widths of at least 1"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--topk", "41"], "--topk: got 41, wanted 1 to 40, the samples"),
        (["--noise-sweep", "--positive", "10"], "--positive: got [10], wanted classes below 10"),
        (["--noise-sweep", "--rates", "1.5"], "--rates: got [1.5], wanted shares within [0, 1]"),
        (["--noise-sweep", "--repeats", "0"], "--repeats: got 0, wanted at least 1"),
        (["--topk", "3", "--repeats", "2"], "--repeats: belongs to --noise-sweep"),
        (["--center"], "--center: belongs to --noise-sweep"),
        (["--weights", "w.pt"], "w.pt"),
        (["--model", "resnet"], "argument --model: invalid choice"),
    ],
)
def test_errors_are_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"other": torch.zeros(1)}, "other.pt")
    try:
        code = main([*SMALL, *words])
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert message in error
    assert error.count("\n") == 1


def test_weights_of_no_such_network(tmp_path, capsys):
    torch.save({"other": torch.zeros(1)}, tmp_path / "w.pt")
    assert main([*SMALL, "--weights", str(tmp_path / "w.pt"), "--output", str(tmp_path / "out")]) == 2
    assert "--weights: " in (told := capsys.readouterr().err)
    assert "does not fit the network: it holds other, and the network 0.weight" in told
