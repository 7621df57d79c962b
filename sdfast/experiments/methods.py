"""``sdfast methods``: every method of `sdfast.baselines` on the same noisy digits, and the page that compares them."""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sdfast
from sdfast import _devices, _dispatch, _files, report
from sdfast.baselines import METHODS, TwoNetworks, make_method
from sdfast.data import Batches, flip_labels, load_dataset
from sdfast.experiments.methods_page import page
from sdfast.models import mlp
from sdfast.train import SelfDistiller
from sdfast.train.records import mean_text

WIDTHS = (64, 256, 256, 10)
BATCH_SIZE = 128
LEARNING_RATE = 0.1
MOMENTUM = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.set_defaults(when_interrupted="; the same command continues")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="which of them")
    parser.add_argument("--noise", nargs="+", type=float, default=[0.2, 0.4, 0.6], help="shares of labels redrawn")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs of each method at each noise")
    parser.add_argument("--epochs", type=int, default=100, help="of each run")
    parser.add_argument(
        "--results", type=Path, default=Path("sdfast-methods.json"), help="record of the runs; one begun is continued"
    )
    parser.add_argument("--page", type=Path, help="also write the comparison here, as Markdown")
    parser.add_argument("--json", action="store_true", help="print the record as one JSON document instead of a table")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Runs what the record does not hold yet, then prints the table and writes the page."""
    for name in ("seeds", "epochs"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name}: got {getattr(arguments, name)}, wanted at least 1")
    for rate in arguments.noise:
        if not 0 <= rate <= 1:
            raise ValueError(f"--noise: got {rate}, wanted within [0, 1]")
    for name in ("results", "page"):
        path = getattr(arguments, name)
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"--{name}: there is no folder {path.parent}")
    results = run_methods(
        arguments.methods, arguments.noise, arguments.seeds, arguments.epochs, arguments.results,
        progress=not arguments.no_progress,
    )  # fmt: skip
    if arguments.page is not None:
        _files.write_text(arguments.page, page(results, *summary(results)))
    if arguments.json:
        print(json.dumps(results))
    else:
        print("Test accuracy after the last epoch (best epoch), %\n")
        print(report.plain_table(*summary(results)))
        print(f"\nrecord: {arguments.results}")
    return 0


def run_methods(
    methods: Sequence[str], noise: Sequence[float], seeds: int, epochs: int, path: Path, progress: bool = True
) -> dict[str, Any]:
    """Trains every method at every noise rate once per seed.

    Args:
        methods: Names in `METHODS`.
        noise: Shares of the labels redrawn over all classes.
        seeds: How many seeds: of the split, the noise, the initial weights and the order.
        epochs: Of each run.
        path: Of the record, written after each run; runs that it holds are not run again.
        progress: Show a progress bar on a terminal.

    Returns:
        The record: setting, environment, and of each run what was reached.

    Raises:
        ValueError: The file is no record, or one of another setting.
    """
    setting = {
        "data": "digits", "widths": list(WIDTHS), "batch_size": BATCH_SIZE, "epochs": epochs,
        "optimizer": f"SGD, momentum {MOMENTUM}, learning rate {LEARNING_RATE} falling to 0 by a cosine",
    }  # fmt: skip
    environment = _environment()
    results = _begun(path, setting) or {"setting": setting, "environment": environment, "runs": []}
    begun = results["environment"]["commit"]
    later = {} if environment["commit"] == begun else {k: environment[k] for k in ("commit", "date", "device", "torch")}
    done = {(run["method"], run["noise"], run["seed"]) for run in results["runs"]}
    plan = [(rate, seed, method) for rate in noise for seed in range(seeds) for method in methods]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network gains nothing from a second one
    try:
        with tqdm(total=len(plan), unit="run", disable=None if progress else True) as bar:
            for rate, seed, method in plan:
                bar.set_description(f"{method}, noise {rate}, seed {seed}")
                if (method, rate, seed) not in done:
                    results["runs"].append({**train_once(method, rate, seed, epochs), **later})
                    _files.write_text(path, json.dumps(results, indent=1) + "\n")
                bar.update()
    finally:
        torch.set_num_threads(threads)
    chosen = {(method, rate, seed) for rate, seed, method in plan}
    return {**results, "runs": [r for r in results["runs"] if (r["method"], r["noise"], r["seed"]) in chosen]}


def train_once(name: str, noise: float, seed: int, epochs: int) -> dict[str, Any]:
    """One run: what it was and what it reached."""
    data = load_dataset("digits", seed=seed)
    noisy = flip_labels(data.train_labels, noise, data.num_classes, generator=torch.Generator().manual_seed(seed))
    # Co-teaching must be told how many labels are wrong; nobody else is.
    options = {"forget_rate": round(noisy.realised_rate, 4)} if name == "co-teaching" else {}
    method = make_method(name, noisy.labels, data.num_classes, **options)
    torch.manual_seed(seed)
    model = mlp(WIDTHS) if name != "co-teaching" else TwoNetworks(mlp(WIDTHS), mlp(WIDTHS))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    began = time.perf_counter()
    history = SelfDistiller(model, optimizer, method=method, scheduler=scheduler).fit(
        Batches(data.train_inputs, noisy.labels, BATCH_SIZE, seed=seed, with_indices=True),
        epochs,
        eval=[(data.test_inputs, data.test_labels)],
        progress=False,
        clean_labels=data.train_labels,
    )
    return {
        "method": name, "options": method.options, "noise": noise, "wrong_labels": noisy.realised_rate, "seed": seed,
        "last": history.last.eval_accuracy, "best": history.best.eval_accuracy, "best_epoch": history.best.epoch,
        "given_accuracy": history.last.accuracy, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def summary(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: a method a row, a noise rate a column, mean ± standard deviation over the seeds."""
    rates = sorted({run["noise"] for run in results["runs"]})
    rows = []
    for method in dict.fromkeys(run["method"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["method"] == method]
        cells = []
        for rate in rates:
            last = [100 * run["last"] for run in runs if run["noise"] == rate]
            best = [100 * run["best"] for run in runs if run["noise"] == rate]
            cells.append(f"{mean_text(last)} ({statistics.mean(best):.1f})" if last else "")
        rows.append([method, *cells])
    return ["method", *(f"noise {rate:g}" for rate in rates)], rows


def _begun(path: Path, setting: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        same = results["setting"] == setting
        known = isinstance(results["runs"], list) and isinstance(results["environment"], dict)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--results: {path} is no record of sdfast methods; name another file") from None
    if not same or not known:
        raise ValueError(f"--results: {path} is of another setting: {results['setting']}; name another file")
    return results


def _environment() -> dict[str, Any]:
    root = Path(sdfast.__file__).parent.parent
    commit = ""
    if (root / ".git").exists():
        described = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        try:
            commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            commit = ""
    return {
        "command": shlex.join(["sdfast", *sys.argv[1:]]),
        "commit": commit or f"version {sdfast.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{_devices.processor_name()}, 1 thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sdfast": sdfast.__version__,
        "backend": _dispatch.automatic("cpu"),
    }
