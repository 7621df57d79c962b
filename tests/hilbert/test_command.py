"""The command from its arguments to its folder, through its own parser."""

import argparse
import json
import pathlib

import numpy as np
import pytest

from sdfast.hilbert import command


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


def test_digits_help_then_hurt(capsys, tmp_path):
    assert run("--noise", "0.4", "--gamma", "0.1", "--test-fraction", "0.6", "--output", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    test = [row["test"] for row in results["rounds"]]
    best = results["best_round"]
    assert "← best by GCV" in printed
    assert "one ridge fit tuned by GCV" in printed
    assert 1 < best <= len(test)
    assert test[best - 1] > test[0] + 0.1  # it helps,
    assert max(test) > test[-1]  # then hurts,
    assert max(test) - test[best - 1] < 0.02  # and the round was foreseen
    assert results["collapsed_at"] == len(test)
    low, high = results["fits_interval"]
    assert low <= len(test) <= high
    assert 0.3 < results["realised_noise"] < 0.42
    assert 0.35 < results["rounds"][best - 1]["noise_rate"] < 0.55
    for name in ("rounds.png", "path.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "best by GCV" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ("--dataset", "wine", "--kernel", "laplacian", "--noise", "0.2", "--noise-convention", "others"),
        ("--dataset", "iris", "--kernel", "polynomial", "--degree", "5", "--tolerance", "0.3"),
        ("--dataset", "diabetes", "--kernel", "matern", "--length-scale", "5", "--tolerance", "0.5"),
        ("--dataset", "friedman", "--kernel", "relu_ntk", "--depth", "2", "--tolerance", "0.1", "--rounds", "3"),
        ("--dataset", "breast_cancer", "--seed", "3"),
    ],
)
def test_json_of_every_data_set(capsys, words):
    assert run(*words, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert results["dataset"] == words[1]
    assert [row["round"] for row in results["rounds"]] == list(range(1, len(results["rounds"]) + 1))
    assert all(np.isfinite(row["test"]) for row in results["rounds"])
    assert command.describe(results)
    assert json.loads(pathlib.Path("sdfast-hilbert", "results.json").read_text()) == results
    assert pathlib.Path("sdfast-hilbert", "rounds.png").exists()


def test_flip_conventions():
    labels = np.arange(10).repeat(2000)
    assert np.mean(command.flip(labels, 0.4, 10, "all", 0) != labels) == pytest.approx(0.36, abs=0.02)
    assert np.mean(command.flip(labels, 0.4, 10, "others", 0) != labels) == pytest.approx(0.4, abs=0.02)
    assert np.array_equal(command.flip(labels, 0.0, 10, "all", 0), labels)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--noise", "1.5"), "--noise: got 1.5"),
        (("--tolerance", "0"), "--tolerance: got 0.0, wanted between 0 and 1"),
        (("--test-fraction", "1"), "--test-fraction: got 1.0"),
        (("--rounds", "0"), "--rounds: got 0"),
        (("--seed", "-1"), "--seed: got -1"),
        (("--dataset", "diabetes", "--noise", "0.1"), "diabetes has no class labels"),
        (("--kernel", "matern", "--gamma", "1"), "--gamma: got 1.0, but --kernel matern has no such option"),
        (("--gamma", "-1"), "--gamma: got -1.0, wanted a finite number > 0"),
        (
            ("--dataset", "iris", "--kernel", "polynomial", "--tolerance", "0.001"),
            "--tolerance: got 0.001, wanted above 0",
        ),
        (("--test-fraction", "0.999"), "--test-fraction: got 0.999, which leaves 1 training points"),
    ],
)
def test_bad_arguments(words, message):
    with pytest.raises(ValueError, match=message):
        run(*words)


def test_the_tolerance_it_asks_for_is_feasible(capsys):
    words = ("--dataset", "iris", "--kernel", "polynomial", "--rounds", "1", "--json")
    with pytest.raises(ValueError, match=r"--tolerance: got 0\.001, wanted above") as raised:
        run(*words, "--tolerance", "0.001")
    least = float(str(raised.value).split("above ")[1].split()[0])
    assert run(*words, "--tolerance", str(1.01 * least)) == 0
    with pytest.raises(ValueError, match="--tolerance"):
        run(*words, "--tolerance", str(0.99 * least))


def test_an_impossible_folder_is_refused_before_the_work(capsys, monkeypatch):
    pathlib.Path("file").write_text("")
    monkeypatch.setattr(command, "load", None)
    with pytest.raises(OSError, match="file"):
        run("--output", "file/inside")
    assert capsys.readouterr().out == ""
