"""What a training run did, epoch by epoch."""

import csv
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, SupportsIndex, overload

from sdfast import _files

__all__ = ["EpochRecord", "History"]


class EpochRecord(NamedTuple):
    """One epoch. Training figures are taken on the fly, from the very forward passes that trained.

    Attributes:
        epoch: Counted from 1.
        loss: Mean training loss over the rows kept.
        accuracy: Against the labels as given, wrong ones included.
        clean_accuracy: Against the true labels of the training rows; ``None`` where they are not known.
        eval_accuracy: Of the evaluation batches after the epoch; ``None`` without any.
        alpha: Mean weight of the given label.
        agreement: Share of rows whose target still has its largest entry at the given label.
        learning_rate: Of the first parameter group, as the epoch began.
        seconds: Wall time, evaluation included.
        information_ratio: Of the labels as given, where an `InformationProbe` looked after this epoch.
        information_gain: Of the refined labels over them, then.
    """

    epoch: int
    loss: float
    accuracy: float
    clean_accuracy: float | None
    eval_accuracy: float | None
    alpha: float
    agreement: float
    learning_rate: float
    seconds: float
    information_ratio: float | None = None
    information_gain: float | None = None


class History:
    """The records of a run, oldest first.

    ``history["eval_accuracy"]`` is that column as a list, ``history[-1]`` the last record, ``history[:10]`` the history
    of the first ten epochs.

    Args:
        records: The epochs so far.
    """

    def __init__(self, records: list[EpochRecord] | None = None) -> None:
        self.records = list(records or ())

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[EpochRecord]:
        return iter(self.records)

    @overload
    def __getitem__(self, column: str) -> list: ...

    @overload
    def __getitem__(self, column: SupportsIndex) -> EpochRecord: ...

    @overload
    def __getitem__(self, column: slice) -> "History": ...

    def __getitem__(self, column: str | SupportsIndex | slice) -> "list | EpochRecord | History":
        if isinstance(column, slice):
            return History(self.records[column])
        if isinstance(column, SupportsIndex):
            return self.records[column]
        if column not in EpochRecord._fields:
            raise KeyError(f"got {column!r}, wanted one of {', '.join(EpochRecord._fields)}")
        return [getattr(record, column) for record in self.records]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History) and self.records == other.records

    __hash__ = None  # type: ignore[assignment]  # it grows

    def __repr__(self) -> str:
        if not self.records:
            return "History(0 epochs)"
        last = self.records[-1]
        figures = {"loss": last.loss, "accuracy": last.accuracy, "eval_accuracy": last.eval_accuracy}
        shown = ", ".join(f"{name}={value:.4g}" for name, value in figures.items() if value is not None)
        return f"History({len(self)} epochs, last: {shown})"

    def append(self, record: EpochRecord) -> None:
        """Adds an epoch."""
        self.records.append(record)

    @property
    def last(self) -> EpochRecord:
        """The latest epoch."""
        return self.records[-1]

    @property
    def best(self) -> EpochRecord:
        """The first epoch with the largest evaluation accuracy.

        Chosen by looking at the evaluation data: an oracle, where those are the test data.

        Raises:
            ValueError: No epoch was evaluated.
        """
        evaluated = [record for record in self.records if math.isfinite(_number(record.eval_accuracy))]
        if not evaluated:
            raise ValueError("history: no epoch was evaluated, so none is best; pass eval= to fit")
        return max(evaluated, key=lambda record: _number(record.eval_accuracy))

    def to_dicts(self) -> list[dict]:
        """One dictionary an epoch."""
        return [record._asdict() for record in self.records]

    @classmethod
    def from_dicts(cls, dicts: list[dict]) -> "History":
        """The inverse of `to_dicts`."""
        return cls([EpochRecord(**values) for values in dicts])

    def to_json(self, path: str | os.PathLike) -> None:
        """Writes all records; a number JSON does not know becomes ``"nan"`` or ``"inf"``."""
        rows = [{name: strict_number(value) for name, value in values.items()} for values in self.to_dicts()]
        _files.write_text(path, json.dumps({"epochs": rows}, indent=1, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "History":
        """Reads what `to_json` wrote."""
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["epochs"]
        return cls.from_dicts(
            [{name: float(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows]
        )

    def to_csv(self, path: str | os.PathLike) -> None:
        """Writes a table with one line an epoch; what is not known stays empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(EpochRecord._fields)
        writer.writerows(self.records)
        _files.write_text(path, text.getvalue())

    def plot(self, path: str | os.PathLike, *, subtitle: str = "", eval_name: str = "evaluation") -> None:
        """Draws loss, accuracies and α over the epochs as a PNG; needs matplotlib.

        Args:
            path: Of the PNG.
            subtitle: What was trained on what, above the panels.
            eval_name: What the evaluation data are, for the legend: ``"test"``.

        Raises:
            ValueError: There is no epoch to draw.
        """
        from sdfast import plots

        if not self.records:
            raise ValueError("history: has no epoch, so there is nothing to plot")
        plots.save(plots.training_curves(self, subtitle, eval_name), path)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def strict_number(value: float | int | None) -> float | int | str | None:
    """`value` as strict JSON can hold it."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
