"""The comparison of the methods: what it records, that it continues, and that its page is the record's."""

import json
from pathlib import Path

import pytest

from sdfast.baselines import METHODS
from sdfast.cli import main
from sdfast.experiments import methods
from sdfast.experiments.methods_page import page

ROOT = Path(__file__).parent.parent.parent
RECORD = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores" / "experiments" / "methods.json"


def command(folder, *words):
    return main(["methods", "--results", f"{folder}/m.json", "--epochs", "2", "--seeds", "1", "--no-progress", *words])


def test_records_every_run_and_continues(capfd, tmp_path, monkeypatch):
    few = ["--methods", "cross-entropy", "elr", "co-teaching", "--noise", "0.4"]
    assert command(tmp_path, *few, "--page", f"{tmp_path}/page.md") == 0
    out, _ = capfd.readouterr()
    results = json.loads((tmp_path / "m.json").read_text())
    assert [run["method"] for run in results["runs"]] == few[1:4]
    headers, rows = methods.summary(results)
    for row in rows:
        assert any(line.split() == " ".join(row).split() for line in out.splitlines())
    text = (tmp_path / "page.md").read_text()
    assert text == page(results, headers, rows)
    for run in results["runs"]:
        assert f"| {run['method']} | {100 * run['last']:.1f} ({100 * run['best']:.1f}) |" in text
    taught = results["runs"][2]
    assert taught["options"]["forget_rate"] == pytest.approx(taught["wrong_labels"], abs=1e-4)

    trained = []
    monkeypatch.setattr(methods, "train_once", lambda *run: trained.append(run) or taught | {"noise": run[1]})
    assert command(tmp_path, *few, "0.2") == 0
    assert trained == [("cross-entropy", 0.2, 0, 2), ("elr", 0.2, 0, 2), ("co-teaching", 0.2, 0, 2)]


def test_bad_arguments(capfd, tmp_path):
    (tmp_path / "m.json").write_text("{}")
    assert command(tmp_path) == 2
    assert "is no record of sdfast methods" in capfd.readouterr().err
    (tmp_path / "m.json").write_text(json.dumps({"setting": {}, "runs": [], "environment": {}}))
    assert command(tmp_path) == 2
    assert "is of another setting" in capfd.readouterr().err
    for words, message in (
        (["--noise", "2"], "--noise: got 2.0, wanted within [0, 1]"),
        (["--seeds", "0"], "--seeds: got 0, wanted at least 1"),
        (["--page", "nowhere/page.md"], "--page: there is no folder nowhere"),
    ):
        assert main(["methods", *words]) == 2
        assert message in capfd.readouterr().err


def test_the_page_in_the_documents_is_that_of_the_record():
    results = json.loads(RECORD.read_text())
    assert {run["method"] for run in results["runs"]} == set(METHODS)
    assert {run["noise"] for run in results["runs"]} == {0.2, 0.4, 0.6}
    assert len({run["seed"] for run in results["runs"]}) == 3
    assert (ROOT / "docs" / "methods.md").read_text() == page(results, *methods.summary(results))
