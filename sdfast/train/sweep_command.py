"""What ``sdfast rounds`` and ``sdfast teacher`` have in common: their folder, their results and their page."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdfast import _files, _locks, plots, report
from sdfast.data import Dataset
from sdfast.train.data_flags import check_noise, load_data, noisy_labels
from sdfast.train.flags import CAN_RESUME, check_resume, named_as_flags
from sdfast.train.records import mean_and_deviation

RUNS = "runs"


def add_output_arguments(parser: argparse.ArgumentParser, folder: str) -> None:
    """The folder, and what is printed."""
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path(folder), help="folder of the runs and the report")
    output.add_argument("--resume", action="store_true", help="continue the runs in that folder, by the same flags")
    output.add_argument("--json", action="store_true", help="print the results as one JSON document, not as a table")
    output.add_argument("--no-progress", action="store_true", help="show no progress bar")


def prepare(arguments: argparse.Namespace) -> tuple[Dataset, list[Any]]:
    """The data, and the labels of each run: noise is drawn for every run anew.

    Raises:
        ValueError: A flag is impossible, the folder holds runs and --resume was not given, or none and it was.
    """
    folder = arguments.output / RUNS
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"--output: {arguments.output} is a file, wanted a folder")
    if folder.is_dir() and any(folder.iterdir()) and not arguments.resume:
        raise ValueError(f"--output: {arguments.output} holds runs; add --resume to continue them, or name another")
    if arguments.runs < 1:
        raise ValueError(f"--runs: got {arguments.runs}, wanted at least 1")
    if arguments.resume:
        check_resume(arguments, folder.is_dir())
    check_noise(arguments)
    with named_as_flags():
        data = load_data(arguments)
        labels = [noisy_labels(arguments, data, arguments.seed + run).labels for run in range(arguments.runs)]
    return data, labels


@contextmanager
def begun(arguments: argparse.Namespace, **flags: str) -> Iterator[None]:
    """The folder is this process's, and from now on --resume continues there; errors name the flags."""
    (arguments.output / RUNS).mkdir(parents=True, exist_ok=True)
    arguments.when_interrupted = CAN_RESUME
    with _locks.held(arguments.output, f"sdfast {arguments.command}"), named_as_flags(folder="output", **flags):
        yield


def describe(arguments: argparse.Namespace, data: Dataset, labels: Sequence[Any]) -> str:
    """Data and noise in one line."""
    wrong = [float((given != data.train_labels).double().mean()) for given in labels]
    noise = f"{100 * mean_and_deviation(wrong)[0]:.0f} % of the labels wrong" if any(wrong) else "labels as they are"
    return f"{data.name}, {noise}; mean ± standard deviation of {arguments.runs} run{'s' * (arguments.runs > 1)}"


def write(
    arguments: argparse.Namespace, result: Any, title: str, subtitle: str, headers: Sequence[str],
    rows: Sequence[Sequence[str]], reading: str,
) -> None:  # fmt: skip
    """Fills the folder with results.json, curves.png and index.html, and prints the table."""
    folder, document = arguments.output, result.to_dict()
    _files.write_text(folder / "results.json", json.dumps(document, indent=1) + "\n")
    parts = [report.section("Accuracy (%)", report.table(headers, rows), report.text(f"{subtitle}. {reading}"))]
    reason = plots.why_not()
    if reason is None:
        picture = plots.png(result.figure(subtitle))
        _files.write_atomically(folder / "curves.png", lambda file: file.write(picture))
        parts.insert(0, report.section("What happens", report.picture(picture, reading)))
    else:
        print(f"sdfast {arguments.command}: no picture: {reason}", file=sys.stderr)
    if result.failures:
        failed = [(f"run {run}", why) for run, why in result.failures.items()]
        parts.append(report.section("Runs that failed", report.table(("", ""), failed)))
        for run, why in result.failures.items():
            print(f"sdfast {arguments.command}: warning: run {run} failed: {why}", file=sys.stderr)
    report.write_page(folder / "index.html", title, parts, json.dumps(result.settings))
    if arguments.json:
        print(json.dumps(document))
        return
    print(f"{subtitle}\n\n{report.plain_table(headers, rows)}\n\n{reading}\nreport: {folder / 'index.html'}")
