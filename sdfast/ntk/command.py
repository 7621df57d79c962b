"""``sdfast ntk``: the kernel of a network on a data set, its spectrum, and the labels' share of its eigenspace."""

import argparse
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdfast import _devices, _files, plots, report
from sdfast.data import DATASETS, load_dataset
from sdfast.models import mlp
from sdfast.models.state import load_state
from sdfast.ntk import figures, retrieval
from sdfast.ntk.eigenspace import Eigenspace, eigenspace
from sdfast.ntk.gram import gram
from sdfast.ntk.information import information_ratio
from sdfast.ntk.products import PRECISIONS

MODELS = ("mlp",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.set_defaults(when_interrupted="; the same command with the same --checkpoint continues")
    data = parser.add_argument_group("data and network")
    data.add_argument("--dataset", choices=sorted(DATASETS), default="digits", help="whose training part is taken")
    data.add_argument("--samples", type=int, default=500, help="how many of its samples, from the first")
    data.add_argument("--model", choices=MODELS, default="mlp", help="the network")
    data.add_argument("--hidden", type=int, nargs="*", default=[256, 256], help="widths of its hidden layers")
    data.add_argument("--weights", type=Path, metavar="FILE", help="its state_dict; by default it is as initialised")
    data.add_argument("--seed", type=int, default=0, help="of the split and the weights")

    kernel = parser.add_argument_group("kernel")
    kernel.add_argument("--outputs", default="mean", help="sum, trace, mean, or the index of one output")
    kernel.add_argument("--precision", choices=tuple(PRECISIONS), default="float32", help="of the products")
    kernel.add_argument("--batch-size", type=int, help="samples of a micro-batch (default: 32 to 192, of an MLP 1024)")
    kernel.add_argument("--memory", type=float, metavar="GIB", help="for gradients held at a time (default: 2)")
    kernel.add_argument("--device", default="cpu", help="where to compute")
    kernel.add_argument("--checkpoint", type=Path, metavar="FILE", help="continue from it, and write to it")

    labels = parser.add_argument_group("what the labels hold of its top eigenspace")
    labels.add_argument("--topk", type=int, metavar="K", help="pairs of the eigenspace (default with --noise-sweep: 5)")
    labels.add_argument("--noise-sweep", action="store_true", help="the information ratio against the flipped labels")
    labels.add_argument(
        "--positive", type=int, nargs="+", metavar="CLASS", help="classes that count as +1, others as -1"
    )
    labels.add_argument("--center", action="store_true", help="take the mean of the labels off first")
    labels.add_argument(
        "--rates", type=float, nargs="+", metavar="RATE", help="shares to flip (default: 0 0.1 ... 0.5)"
    )
    labels.add_argument("--repeats", type=int, help=f"draws for each share (default: {retrieval.REPEATS})")

    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("sdfast-ntk"), help="folder for gram.npz and the pictures")
    output.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    output.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Computes the matrix, prints its spectrum and fills the output folder."""
    _check_arguments(arguments)
    data = load_dataset(arguments.dataset, seed=arguments.seed)
    if arguments.samples > len(data.train_inputs):
        raise ValueError(
            f"--samples: got {arguments.samples}, wanted at most the {len(data.train_inputs)} training samples of "
            f"{arguments.dataset}"
        )
    _check_classes(arguments, data.num_classes)
    outputs: int | str = int(arguments.outputs) if arguments.outputs.isdigit() else arguments.outputs
    if isinstance(outputs, int) and outputs >= data.num_classes:
        raise ValueError(f"--outputs: got {outputs}, wanted an index below {data.num_classes}")
    inputs, labels = data.train_inputs[: arguments.samples].flatten(1), data.train_labels[: arguments.samples]
    device = _devices.usable(arguments.device)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(arguments.seed)
        model = mlp((inputs.shape[1], *arguments.hidden, data.num_classes))
    if arguments.weights is not None:
        load_state(model, arguments.weights, "--weights")
    matrix = gram(
        model.to(device),
        inputs.to(device),
        outputs=outputs,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        memory=None if arguments.memory is None else int(arguments.memory * 2**30),
        progress=not arguments.no_progress and sys.stderr.isatty(),
        checkpoint=arguments.checkpoint,
    ).cpu()
    values = torch.linalg.eigvalsh(matrix.double()).flip(0)
    results = summary(arguments, model, matrix, values)
    space = None
    if arguments.topk is not None or arguments.noise_sweep:
        space = eigenspace(matrix, min(5, len(matrix)) if arguments.topk is None else arguments.topk)
        results |= label_results(arguments, space, retrieval.coded(labels, data.num_classes, arguments.positive))
    written = write_output(arguments, matrix, labels, values, results, space)
    print(json.dumps(results) if arguments.json else f"{describe(results)}\n{written}")
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"--output: {arguments.output} is a file, wanted a folder")
    for name in ("samples", "batch_size", "repeats"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, wanted at least 1")
    if arguments.rates is not None and not all(0 <= rate <= 1 for rate in arguments.rates):
        raise ValueError(f"--rates: got {arguments.rates}, wanted shares within [0, 1]")
    if arguments.memory is not None and not (math.isfinite(arguments.memory) and arguments.memory > 0):
        raise ValueError(f"--memory: got {arguments.memory}, wanted a number of GiB > 0")
    if not 0 <= arguments.seed < 2**32:
        raise ValueError(f"--seed: got {arguments.seed}, wanted an integer in [0, 2**32)")
    if any(width < 1 for width in arguments.hidden):
        raise ValueError(f"--hidden: got {arguments.hidden}, wanted widths of at least 1")
    if arguments.outputs not in ("sum", "trace", "mean") and not arguments.outputs.isdigit():
        raise ValueError(f"--outputs: got {arguments.outputs!r}, wanted sum, trace, mean or the index of an output")


def _check_classes(arguments: argparse.Namespace, classes: int) -> None:
    if arguments.topk is not None and not 1 <= arguments.topk <= arguments.samples:
        raise ValueError(f"--topk: got {arguments.topk}, wanted 1 to {arguments.samples}, the samples")
    if arguments.positive is not None and not all(0 <= label < classes for label in arguments.positive):
        raise ValueError(f"--positive: got {arguments.positive}, wanted classes below {classes}")
    if not arguments.noise_sweep:
        needless = [name for name in ("rates", "repeats") if getattr(arguments, name) is not None]
        if arguments.topk is None:
            needless += ["positive"] * (arguments.positive is not None) + ["center"] * arguments.center
        if needless:
            raise ValueError(f"--{needless[0]}: belongs to --noise-sweep, which was not asked for")


def label_results(arguments: argparse.Namespace, space: Eigenspace, targets: Tensor) -> dict[str, Any]:
    """The eigenspace, the labels' information ratio and, where asked for, how it falls with noise."""
    ratio = information_ratio(space, targets, center=arguments.center, joint=True)
    results: dict[str, Any] = {"eigenspace": retrieval.space_results(space), "information_ratio": float(ratio)}
    if arguments.noise_sweep:
        rates = retrieval.RATES if arguments.rates is None else arguments.rates
        repeats = retrieval.REPEATS if arguments.repeats is None else arguments.repeats
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an unstable ratio was warned of above
            found = retrieval.sweep(space, targets, rates, repeats, arguments.center, arguments.seed)
        results["noise_sweep"] = retrieval.sweep_results(found)
    return results


def summary(arguments: argparse.Namespace, model: torch.nn.Module, matrix: Tensor, values: Tensor) -> dict[str, Any]:
    """What is printed: sizes, trace, the largest eigenvalues."""
    positive = values.clamp(min=0)
    return {
        "dataset": arguments.dataset,
        "samples": len(matrix),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "outputs": arguments.outputs,
        "precision": arguments.precision,
        "trace": float(matrix.double().trace()),
        "effective_rank": float(positive.sum() ** 2 / positive.square().sum()) if positive.any() else 0.0,
        "eigenvalues": values[:10].tolist(),
    }


def describe(results: dict[str, Any]) -> str:
    """The summary for a terminal."""
    total = results["trace"] or 1.0
    sums = np.cumsum(results["eigenvalues"])
    rows = [
        (rank, f"{value:.4g}", f"{100 * value / total:.2f}", f"{100 * part / total:.2f}")
        for rank, (value, part) in enumerate(zip(results["eigenvalues"], sums, strict=True), 1)
    ]
    table = report.plain_table(("rank", "eigenvalue", "% of the trace", "together"), rows)
    told = [
        f"{results['dataset']}, {results['samples']} samples, {results['parameters']} parameters, outputs "
        f"{results['outputs']}, {results['precision']}: trace {total:.6g}, effective rank "
        f"{results['effective_rank']:.1f}",
        table,
    ]
    if "eigenspace" in results:
        told += ["", retrieval.space_line(results["eigenspace"], results["information_ratio"])]
    if "noise_sweep" in results:
        told += ["", retrieval.sweep_table(results["noise_sweep"])]
    return "\n".join(told)


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    _files.write_atomically(path, lambda file: np.savez(file, **arrays))


def write_output(
    arguments: argparse.Namespace,
    matrix: Tensor,
    labels: Tensor,
    values: Tensor,
    results: dict[str, Any],
    space: Eigenspace | None,
) -> str:
    """Fills the output folder; gives a line that says with what."""
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, dict[str, Any]] = {
        "gram.npz": {"gram": matrix.numpy(), "labels": labels.numpy(), "eigenvalues": values.numpy()}
    }
    if space is not None:
        columns = ("values", "vectors", "residuals", "converged")
        arrays["eigenspace.npz"] = {name: getattr(space, name).numpy() for name in columns}
    for name, content in arrays.items():
        _save_arrays(folder / name, content)
    _files.write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    if (reason := plots.why_not()) is not None:
        return f"wrote {' and '.join(str(folder / name) for name in arrays)} (no pictures: {reason})"
    where = f"NTK of {results['samples']} samples of {results['dataset']}"
    drawn = {
        "spectrum.png": figures.spectrum(values, where),
        "heatmap.png": figures.heat_map(matrix, labels, f"{where}, by label"),
    }
    if "noise_sweep" in results:
        drawn["noise_sweep.png"] = figures.noise_sweep(results["noise_sweep"], len(space or ()), where)
    for name, figure in drawn.items():
        plots.save(figure, folder / name)
    *most, last = [*arrays, *drawn]
    return f"wrote {folder}/{', '.join(most)} and {last}"
