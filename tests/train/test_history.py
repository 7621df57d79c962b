"""History: what is written is what is read."""

import csv
import json
import math

import pytest

from sdfast.train import EpochRecord, History


def example():
    return History(
        [
            EpochRecord(1, 2.5, 0.25, None, 0.5, 1.0, 0.75, 0.1, 0.01),
            EpochRecord(2, 1.0, 0.5, None, 0.75, 0.5, 0.5, 0.05, 0.02),
            EpochRecord(3, 0.5, 0.625, None, 0.75, 0.25, 0.5, 0.0, 0.02),
        ]
    )


def test_columns_last_and_best():
    history = example()
    assert history["loss"] == [2.5, 1.0, 0.5]
    assert history["clean_accuracy"] == [None] * 3
    assert history.last.epoch == history[-1].epoch == 3
    assert history[:2] == History(list(history)[:2])
    with pytest.raises(IndexError):
        history[3]
    assert history.best.epoch == 2  # the first of the best
    assert [record.epoch for record in history] == [1, 2, 3]
    assert repr(history) == "History(3 epochs, last: loss=0.5, accuracy=0.625, eval_accuracy=0.75)"
    assert repr(History()) == "History(0 epochs)"
    with pytest.raises(KeyError, match="got 'los', wanted one of epoch, loss"):
        history["los"]


def test_best_wants_evaluations():
    history = History([EpochRecord(1, 2.5, 0.25, None, None, 1.0, 0.75, 0.1, 0.01)])
    with pytest.raises(ValueError, match="no epoch was evaluated"):
        _ = history.best


def test_best_is_a_number():
    records = [record._replace(eval_accuracy=math.nan) for record in example()]
    with pytest.raises(ValueError, match="no epoch was evaluated"):
        _ = History(records).best
    assert History([records[0], *example()]).best.eval_accuracy == 0.75


def test_json_comes_back_as_it_was(tmp_path):
    history = example()
    history.to_json(tmp_path / "history.json")
    assert History.from_json(tmp_path / "history.json") == history
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]  # no temporary file is left


def test_json_is_strict_and_holds_nan(tmp_path):
    history = example()
    history.append(EpochRecord(4, math.nan, 0.0, None, 0.1, math.inf, 0.5, 0.1, 0.01))

    def refuse(constant):
        raise AssertionError(constant)

    history.to_json(tmp_path / "history.json")
    json.loads((tmp_path / "history.json").read_text(), parse_constant=refuse)
    last = History.from_json(tmp_path / "history.json").last
    assert math.isnan(last.loss)
    assert last.alpha == math.inf


def test_csv_has_a_line_an_epoch(tmp_path):
    example().to_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(EpochRecord._fields)
    assert [float(row["loss"]) for row in rows] == [2.5, 1.0, 0.5]
    assert rows[0]["clean_accuracy"] == ""


def test_a_failing_write_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "history.json"
    example().to_json(path)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        History().to_json(path)
    assert path.read_bytes() == before


def test_plot_writes_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    example().plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        History().plot(tmp_path / "none.png")
