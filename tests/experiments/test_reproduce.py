"""``sdfast reproduce``: every experiment at a tiny setting, its files, its resume, and seeds that fail."""

import json
import re
from dataclasses import replace

import pytest

from sdfast.cli import main
from sdfast.experiments import page, runner
from sdfast.experiments.experiment import NAMES, changed, load

TINY = {
    "dong2019_figure1": {
        "epochs": (1, 2), "early": 1, "student_epochs": 2, "teacher_hidden": (8,), "student_hidden": (8,)
    },
    "dong2019_figure2": {"epochs": 1, "hidden": (8,), "samples": 20, "repeats": 2},
    "dong2019_figure5": {"iterations": 4, "every": 2, "hidden": (8,), "samples": 20},
    "rounds_predicted": {"rounds": 2, "epochs": 1, "hidden": (8,), "rows": 60},
    "dong2019_figure4": {"epochs": 2, "hidden": (8,), "cnn_seeds": 1, "cnn_epochs": 1},
    "dong2019_table1": {
        "epochs": 2, "hidden": (8,), "noises": (0.0, 0.4), "ratios": (1.0, 1.0), "cnn_seeds": 1, "cnn_epochs": 1
    },
    "theorem1": {"width": 100, "steps": 30, "contrasts": 1},
    "mobahi2020_figure2": {"draws": 3},
    "mobahi2020_figure3": {"rounds": 2, "epochs": 2, "hidden": (8,)},
    "appendix_early_stopping": {"rounds": 2, "epochs": 2, "hidden": (8,), "kernel_rows": 60},
}  # fmt: skip


def tiny(name, **changes):
    return replace(load(name).presets["small"], **{"seeds": 2, "jobs": 1, **TINY[name], **changes})


def run(name, folder, resume=False, **changes):
    return runner.run(name, "small", tiny(name, **changes), folder / name, resume, lambda _: None)


def values(results):
    """The seeds' values but for their times."""
    return {seed: {k: v for k, v in found.items() if k != "seconds"} for seed, found in results["seeds"].items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_runs_and_writes(name, tmp_path):
    pytest.importorskip("matplotlib")
    results = run(name, tmp_path)
    assert results == json.loads((tmp_path / name / "results.json").read_text())
    assert list(results["seeds"]) == ["0", "1"]
    assert results["failures"] == {}
    assert results["claims"]
    assert all(set(claim) == {"text", "holds", "size", "p", "seeds"} for claim in results["claims"])
    assert (tmp_path / name / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert set(results["environment"]) >= {"sdfast", "torch", "python", "device"}
    shown = page.write(tmp_path).read_text()
    for text in (results["title"], results["source"]):
        assert re.sub("[’']", "&#x27;", text) in shown or text in shown
    for _, headers, rows in results["tables"]:
        assert all(len(row) == len(headers) for row in rows)
    again = run(name, tmp_path / "again")
    assert values(again) == values(results)  # a seed is a seed


def test_seeds_that_are_there_are_taken_and_others_added(tmp_path):
    first = run("mobahi2020_figure2", tmp_path)
    seen = []
    more = runner.run(
        "mobahi2020_figure2",
        "small",
        tiny("mobahi2020_figure2", seeds=3),
        tmp_path / "mobahi2020_figure2",
        True,
        seen.append,
    )
    assert [text.endswith("there already") for text in seen] == [True, True, False]
    assert {seed: more["seeds"][seed] for seed in "01"} == first["seeds"]  # their times too
    with pytest.raises(ValueError, match=r"--output: .* holds seeds; add --resume"):
        run("mobahi2020_figure2", tmp_path)
    with pytest.raises(ValueError, match=r"--resume: .* has other settings: draws was 3 and is 4"):
        run("mobahi2020_figure2", tmp_path, True, draws=4)


def test_processes_give_what_one_gives(tmp_path):
    one = run("theorem1", tmp_path / "one")
    two = run("theorem1", tmp_path / "two", jobs=2)
    assert values(one) == values(two)


def test_a_seed_that_fails_loses_no_other(tmp_path, monkeypatch, capsys):
    experiment = load("mobahi2020_figure2")

    def broken(settings, seed, folder):
        if seed == 1:
            raise FloatingPointError("nothing but NaN")
        return experiment.run_seed(settings, seed, folder)

    def command(*words):
        words = ("mobahi2020_figure2", "--seeds", "3", "--jobs", "1", "--set", "draws=2", "--no-progress", *words)
        code = main(["reproduce", "--output", str(tmp_path), *words])
        return (code, *capsys.readouterr())

    monkeypatch.setattr("sdfast.experiments.mobahi2020_figure2.EXPERIMENT", replace(experiment, run_seed=broken))
    code, out, err = command()
    assert code == 1
    assert "seed 1 failed: FloatingPointError: nothing but NaN" in err
    results = json.loads((tmp_path / "mobahi2020_figure2" / "results.json").read_text())
    assert list(results["seeds"]) == ["0", "2"]
    assert "Seed 1 failed" in (tmp_path / "index.html").read_text()
    monkeypatch.undo()
    code, out, err = command("--resume", "--json")
    assert (code, err) == (0, "")
    assert set(json.loads(out)) == {"mobahi2020_figure2"}
    assert list(json.loads((tmp_path / "mobahi2020_figure2" / "results.json").read_text())["seeds"]) == ["0", "1", "2"]


def test_the_command_lists_and_prints(tmp_path, capsys):
    assert main(["reproduce", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in NAMES)
    words = ["mobahi2020_figure2", "--seeds", "2", "--jobs", "1", "--set", "draws=2", "--no-progress"]
    assert main(["reproduce", *words, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Self-distillation on a line" in out
    assert "A second round lowers the error" in out
    assert f"report: {tmp_path / 'index.html'}" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "NAME: got none, wanted --all, --list or some of"),
        (("figure9",), "NAME: got 'figure9', wanted one of dong2019_figure1"),
        (("theorem1", "--seeds", "0"), "--seeds: got 0, wanted at least 1"),
        (("theorem1", "--set", "nothing=1"), "--set: got 'nothing=1', wanted NAME=VALUE with one of clusters"),
        (("theorem1", "--set", "width=wide"), "--set: got 'width=wide', wanted a value of kind int, as 2000 is"),
        (("theorem1", "--data", "here"), "--data: theorem1 at preset small reads no files"),
        (
            ("dong2019_figure4", "--preset", "paper", "--set", "dataset=digits", "--data", "here"),
            "--data: dong2019_figure4 at preset paper reads no files",
        ),
        (("theorem1", "mobahi2020_figure2", "--set", "seeds=1"), "--set: changes a setting of one experiment"),
        (("theorem1", "--all"), "--all: runs all of them, so theorem1 need no naming"),
    ],
)
def test_bad_words(words, said, tmp_path, capsys):
    assert main(["reproduce", *words, "--output", str(tmp_path / "run"), "--no-progress"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_data_suit_the_settings_as_they_were_changed(tmp_path, capsys, torchvision_datasets):
    words = ["dong2019_figure4", "--seeds", "1", "--set", "dataset=cifar10", "--data", str(tmp_path / "none")]
    assert main(["reproduce", *words, "--output", str(tmp_path / "run"), "--no-progress"]) == 1
    assert f"there is no cifar10 in {tmp_path / 'none'}" in capsys.readouterr().err


def test_settings_are_read_as_what_they_are():
    settings = load("dong2019_figure1").presets["small"]
    new = changed(settings, ["epochs=1,5", "bound=0.5", "checkpoints=true", "dataset=digit_pictures", "data=here"])
    assert (new.epochs, new.bound, new.checkpoints, new.dataset, new.data) == (
        (1, 5),
        0.5,
        True,
        "digit_pictures",
        "here",
    )
    for change in ("epochs=1,x", "checkpoints=2", "bound", "early=1.5"):
        with pytest.raises(ValueError, match="--set: got"):
            changed(settings, [change])
