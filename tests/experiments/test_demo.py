"""The demo: what it writes, that its runs differ in α alone, and that it shows what it says."""

import base64
import json
import time

import pytest
import torch
import torch.nn.functional as F

import sdfast
from sdfast.cli import main
from sdfast.experiments import demo


def test_writes_a_page_a_picture_and_the_results(capfd, tmp_path):
    pytest.importorskip("matplotlib")
    assert (
        main(["demo", "--seeds", "2", "--epochs", "2", "--output", str(tmp_path), "--picture", f"{tmp_path}/my.png"])
        == 0
    )
    out, err = capfd.readouterr()
    assert err == ""
    results = json.loads((tmp_path / "results.json").read_text())
    headers, rows = demo.summary(results)
    for name, *figures in rows:
        line = next(line for line in out.splitlines() if line.startswith(name))
        assert all(figure in line for figure in figures)
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    for name in ("heatmap.png", "spectrum.png", "information.png"):
        assert base64.b64encode((tmp_path / name).read_bytes()).decode() in page
    assert "http" not in page  # it needs nothing but itself
    assert all(header in page for header in headers)
    assert (tmp_path / "my.png").read_bytes() == (tmp_path / "curves.png").read_bytes()
    assert (tmp_path / "my.png").read_bytes().startswith(b"\x89PNG")


def test_rounds_on_a_kernel_help_then_hurt_and_the_best_is_foreseen(capfd, tmp_path):
    """What the panel says is what ``sdfast hilbert`` finds, and stands in the results, the page and the terminal."""
    assert main(["demo", "--seeds", "1", "--epochs", "1", "--output", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    rounds = json.loads((tmp_path / "results.json").read_text())["kernel_rounds"]
    assert demo.kernel_command() in out
    assert main(demo.kernel_command().split()[1:] + ["--json", "--output", str(tmp_path / "alone")]) == 0
    assert json.loads(capfd.readouterr().out) == rounds
    assert (rounds["dataset"], rounds["noise"], rounds["kernel"]) == ("digits", 0.4, "rbf")
    accuracy = [row["test"] for row in rounds["rounds"]]
    best = rounds["best_round"]
    peak = 1 + accuracy.index(max(accuracy))
    assert 1 < peak < len(accuracy)
    assert accuracy[:peak] == sorted(accuracy[:peak])  # rising,
    assert accuracy[peak - 1 :] == sorted(accuracy[peak - 1 :], reverse=True)  # then falling
    assert accuracy[0] < 0.75 < 0.9 < accuracy[best - 1]
    assert accuracy[-1] < accuracy[best - 1] - 0.05
    assert max(accuracy) - accuracy[best - 1] < 0.02
    page = (tmp_path / "index.html").read_text()
    marked = f"{100 * accuracy[best - 1]:.1f} ← best by GCV"
    assert marked in page
    assert marked in out
    assert f"stops at round {best} of {len(accuracy)}" in page
    if (tmp_path / "curves.png").exists():
        picture = (tmp_path / "rounds.png").read_bytes()
        assert base64.b64encode(picture).decode() in page


def test_the_networks_kernel_is_the_one_that_was_trained(capfd, tmp_path):
    assert main(["demo", "--seeds", "1", "--epochs", "12", "--output", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    kernel = json.loads((tmp_path / "results.json").read_text())["kernel"]
    data, noise = demo._noisy_digits(0)
    models = []
    demo.train_once(demo.METHODS["self-distillation"][1], 0, 12, lambda distiller, _: models.append(distiller.model))
    matrix = sdfast.ntk.gram(models[-1], data.train_inputs[:128], outputs="mean").double()
    values, vectors = torch.linalg.eigh(matrix)
    assert kernel["eigenvalues"] == pytest.approx(values.flip(0).tolist(), abs=1e-5 * values[-1].item())
    clean, given = (F.one_hot(labels[:128], 10).double() for labels in (data.train_labels, noise.labels))
    ratios = [((vectors[:, -10:].T @ targets).norm() / targets.norm()).item() for targets in (clean, given)]
    assert kernel["information_ratio"] == pytest.approx(ratios[0], abs=1e-5)
    assert kernel["noise_sweep"]["mean"][0] == pytest.approx(ratios[0], abs=1e-5)
    assert kernel["noise_sweep"]["mean"] == sorted(kernel["noise_sweep"]["mean"], reverse=True)
    last = kernel["probe"][-1]
    assert (last["call"], len(kernel["probe"])) == (12, 12)
    assert (last["clean"], last["given"]) == pytest.approx(tuple(ratios), abs=1e-5)
    gains = [record["gain"] for record in kernel["probe"]]
    assert f"The gain is 0 or more in {sum(gain >= 0 for gain in gains)} of 12 epochs" in out
    assert f"{last['gain']:+.3f}" in out


def test_prints_one_json_document(capfd, tmp_path):
    assert main(["demo", "--seeds", "1", "--epochs", "2", "--output", str(tmp_path), "--json"]) == 0
    results = json.loads(capfd.readouterr().out)
    assert results == json.loads((tmp_path / "results.json").read_text())
    for runs in results["runs"].values():
        assert len(runs) == 1
        assert len(runs[0]["eval_accuracy"]) == 2
    assert results["runs"]["cross entropy"][0]["alpha"] == [1.0, 1.0]
    own = results["runs"]["self-distillation"][0]
    assert [1 - accuracy for accuracy in own["accuracy"]] == pytest.approx(own["alpha"], abs=1e-6)


def test_does_without_matplotlib_and_says_so(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("sdfast.plots.why_not", lambda: "matplotlib is not installed")
    assert main(["demo", "--seeds", "1", "--epochs", "1", "--output", str(tmp_path)]) == 0
    assert capfd.readouterr().err == "sdfast demo: no picture: matplotlib is not installed\n"
    assert "<img" not in (tmp_path / "index.html").read_text()
    assert main(["demo", "--picture", f"{tmp_path}/my.png"]) == 2


def test_self_distillation_keeps_its_accuracy_where_cross_entropy_loses_it():
    results = demo.run_demo(seeds=1, epochs=100, progress=False)
    plain, own = (runs[0] for runs in results["runs"].values())
    assert 0.34 < results["wrong_labels"] < 0.38
    assert plain["eval_accuracy"][-1] < 0.80 < max(plain["eval_accuracy"]) - 0.1
    assert own["eval_accuracy"][-1] > 0.95
    assert plain["accuracy"][-1] > 0.9  # it has memorised the wrong labels
    assert own["clean_accuracy"][-1] > 0.95  # and this one the true ones, which it never saw


def test_leaves_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = demo.run_demo(seeds=1, epochs=1, progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert results["environment"]["threads"] == 1


def test_what_happens_once_a_process_is_in_no_runs_seconds(monkeypatch):
    first = []

    def train_once(alpha, seed, epochs, callback):
        if alpha not in first:
            first.append(alpha)
            time.sleep(0.2)
        return original(alpha, seed, epochs, callback)

    original = demo.train_once
    monkeypatch.setattr(demo, "train_once", train_once)
    runs = demo.run_demo(seeds=1, epochs=1, progress=False)["runs"]
    assert len(first) == 2
    assert all(len(each) == 1 and each[0]["seconds"] < 0.2 for each in runs.values())


def test_the_noise_is_called_redrawn_and_never_the_rate_of_wrong_labels(capfd, tmp_path):
    assert main(["demo", "--seeds", "1", "--epochs", "1", "--output", str(tmp_path)]) == 0
    assert "40 % of the training labels redrawn at random, 37 % wrong" in capfd.readouterr().out
