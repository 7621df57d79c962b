"""``sdfast hilbert``: rounds of self-distillation on a kernel, round by round, and the round to stop at."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdfast import _files, plots, report
from sdfast.hilbert import bounds, figures, kernels, mixing, selection
from sdfast.hilbert.distill import self_distill
from sdfast.hilbert.path import DistillationPath
from sdfast.hilbert.selection import RoundChoice

CLASSIFICATION = ("digits", "wine", "breast_cancer", "iris")
REGRESSION = ("diabetes", "friedman")


class Data(NamedTuple):
    """A data set split in two, its training labels made noisy.

    Attributes:
        train: (n, features).
        test: (m, features).
        targets: (n, outputs), centred: one-hot rows, or the target.
        offset: (outputs,), what was subtracted.
        given: (n,) noisy labels, or targets.
        clean: (n,) true labels; the targets themselves for regression.
        truth: (m,) of the test part.
        classes: How many, or ``None`` for regression.
    """

    train: np.ndarray
    test: np.ndarray
    targets: np.ndarray
    offset: np.ndarray
    given: np.ndarray
    clean: np.ndarray
    truth: np.ndarray
    classes: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=(*CLASSIFICATION, *REGRESSION), default="digits", help="from scikit-learn")
    data.add_argument("--noise", type=float, default=0.0, help="probability with which a training label is redrawn")
    data.add_argument("--noise-convention", choices=("all", "others"), default="all", help="redrawn over which classes")
    data.add_argument("--test-fraction", type=float, default=0.25, help="share held out for testing")
    data.add_argument("--seed", type=int, default=0, help="of the split and the noise")

    kernel = parser.add_argument_group("kernel")
    kernel.add_argument(
        "--kernel", choices=[name for name in kernels.KERNELS if name != "spline"], default="rbf", help="which"
    )
    kernel.add_argument("--gamma", type=float, help="of rbf, laplacian and polynomial (default: 1 / features)")
    kernel.add_argument("--degree", type=float, help="of polynomial (default: 3)")
    kernel.add_argument("--length-scale", type=float, help="of matern (default: 1)")
    kernel.add_argument("--depth", type=int, help="hidden layers of arc_cosine and relu_ntk (default: 1)")

    rounds = parser.add_argument_group("self-distillation")
    rounds.add_argument("--tolerance", type=float, default=0.05, help="of each fit, as a share of the label energy")
    rounds.add_argument("--rounds", type=int, help="the most fits (default: to the collapse)")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, default=Path("sdfast-hilbert"), help="folder for the report and the plots"
    )
    output.add_argument("--json", action="store_true", help="print one JSON document instead of the table")


def run(arguments: argparse.Namespace) -> int:
    """Prints the table and the chosen round; fills the output folder."""
    _check_arguments(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    results, path = compute(arguments)
    if arguments.json:
        print(json.dumps(results))
    else:
        print(describe(results))
    write_output(arguments.output, results, path)
    return 0


def compute(arguments: argparse.Namespace) -> tuple[dict[str, Any], DistillationPath]:
    """What results.json holds, and the path itself."""
    data = load(arguments)
    options = _kernel_options(arguments)
    gram = kernels.gram(arguments.kernel, data.train, **options)
    cross = kernels.gram(arguments.kernel, data.test, data.train, **options)
    path = self_distill(gram, data.targets, relative_tolerance=arguments.tolerance, rounds=arguments.rounds)
    check_feasible(path, arguments.tolerance)
    return examine(arguments, data, path, path.best_round(), cross), path


def check_feasible(path: DistillationPath, share: float) -> None:
    """Refuses a `--tolerance` that these labels cannot be fitted to, and names the least that they can."""
    if path.infeasible:
        least = path.infeasible.unreachable_energy[0] / path.infeasible.tolerance[0] * share
        raise ValueError(f"--tolerance: got {share}, wanted above {least:.3g} for these labels: {path.infeasible}")


def _check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"--output: {arguments.output} is a file, wanted a folder")
    for name, low, high in (("noise", 0, 1), ("test_fraction", 0, 1), ("tolerance", 0, 1)):
        value = getattr(arguments, name)
        inside = low <= value <= high if name == "noise" else low < value < high
        if not inside:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, wanted between {low} and {high}")
    if not 0 <= arguments.seed < 2**32:
        raise ValueError(f"--seed: got {arguments.seed}, wanted an integer in [0, 2**32)")
    if arguments.rounds is not None and arguments.rounds < 1:
        raise ValueError(f"--rounds: got {arguments.rounds}, wanted at least 1")
    if arguments.noise and arguments.dataset in REGRESSION:
        raise ValueError(f"--noise: got {arguments.noise}, but {arguments.dataset} has no class labels to redraw")
    _kernel_options(arguments)  # refuses what the kernel does not take


def _kernel_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The kernel's own options; one that it does not take is refused."""
    takes = {
        "gamma": ("rbf", "laplacian", "polynomial"),
        "degree": ("polynomial",),
        "length_scale": ("matern",),
        "depth": ("arc_cosine", "relu_ntk"),
    }
    given = {name: value for name in takes if (value := getattr(arguments, name)) is not None}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if arguments.kernel not in takes[name]:
            raise ValueError(f"{flag}: got {value}, but --kernel {arguments.kernel} has no such option")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{flag}: got {value}, wanted a finite number > 0")
    return given


def load(arguments: argparse.Namespace) -> Data:
    """The data set, split, scaled, with noise."""
    import sklearn.datasets
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    if arguments.dataset == "friedman":
        inputs, labels = sklearn.datasets.make_friedman1(600, noise=1.0, random_state=arguments.seed)
    else:
        loader: Callable[..., Any] = getattr(sklearn.datasets, f"load_{arguments.dataset}")
        inputs, labels = loader(return_X_y=True)
    train, test, clean, truth = train_test_split(
        inputs, labels, test_size=arguments.test_fraction, random_state=arguments.seed
    )
    if arguments.dataset == "digits":
        train, test = train / 16, test / 16
    else:
        scaler = StandardScaler().fit(train)
        train, test = scaler.transform(train), scaler.transform(test)
    if arguments.dataset in REGRESSION:
        targets, given, classes = clean[:, None].astype(np.float64), clean, None
    else:
        classes = int(labels.max()) + 1
        given = flip(clean, arguments.noise, classes, arguments.noise_convention, arguments.seed)
        targets = np.eye(classes)[given]
    if (targets == targets[0]).all():
        raise ValueError(
            f"--test-fraction: got {arguments.test_fraction}, which leaves {len(train)} training points, all of one "
            "label: wanted a smaller share"
        )
    offset = targets.mean(0)
    return Data(train, test, targets - offset, offset, given, clean, truth, classes)


def flip(labels: np.ndarray, rate: float, classes: int, convention: str, seed: int) -> np.ndarray:
    """Labels of which each is redrawn with probability `rate`, over all classes or the others (without torch)."""
    rng = np.random.default_rng(seed)
    chosen = rng.random(len(labels)) < rate
    if convention == "all":
        replacement = rng.integers(0, classes, len(labels))
    else:
        replacement = (labels + rng.integers(1, classes, len(labels))) % classes
    return np.where(chosen, replacement, labels)


def examine(
    arguments: argparse.Namespace, data: Data, path: DistillationPath, choice: RoundChoice, cross: np.ndarray
) -> dict[str, Any]:
    """Everything the command says, as plain values."""

    def quality(predicted: np.ndarray, truth: np.ndarray) -> float:
        if data.classes is None:
            return float(
                1 - ((predicted[:, 0] + data.offset[0] - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
            )
        return float(np.mean((predicted + data.offset).argmax(1) == truth))

    fitted = path.predictions
    error, freedom = path.label_error, path.degrees_of_freedom
    rows = []
    for t in range(1, len(path) + 1):
        row = {
            "round": t,
            "c": float(path.c[t - 1]),
            "degrees_of_freedom": float(freedom[t - 1]),
            "label_error": float(error[t - 1]),
            "gcv": float(choice.scores[t - 1]),
            "gcv_standard_error": float(choice.standard_errors[t - 1]),
            "gcv_difference_error": float(choice.difference_errors[t - 1]),
            "test": quality(path.predict(cross, t), data.truth),
        }
        if data.classes is not None:
            row["train_given"] = quality(fitted[t - 1], data.given)
            row["train_clean"] = quality(fitted[t - 1], data.clean)
            row["noise_rate"] = path.noise_rate(convention=arguments.noise_convention, round=t)
        rows.append(row)
    energy = (path.rotated**2).sum(1)
    ridge, _, _ = selection.ridge_of_least_gcv(path.spectrum.values, energy)
    plain = mixing.mixed_rounds(path.spectrum, data.targets, 1.0, ridge=ridge, rounds=1)
    r0 = float(path.norms[0] / math.sqrt(path.points * path.tolerance[0]))
    interval = bounds.fits_interval(r0)
    return {
        "dataset": arguments.dataset,
        "noise": arguments.noise,
        "noise_convention": arguments.noise_convention,
        "realised_noise": float(np.mean(data.given != data.clean)) if data.classes is not None else None,
        "kernel": arguments.kernel,
        "points": len(data.train),
        "measure": "accuracy" if data.classes is not None else "R²",
        "relative_tolerance": arguments.tolerance,
        "tolerance": float(path.tolerance[0]),
        "rank": path.spectrum.rank,
        "fits_interval": [int(interval.lower), int(interval.upper)],
        "collapsed_at": path.collapsed_at,
        "best_round": int(choice),
        "other_tolerances": {f"{factor:.3g}": found for factor, found in choice.other_tolerances.items()},
        "rounds": rows,
        "ridge": {"c": ridge, "test": quality(plain.predict(cross, 1), data.truth)},
    }


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows, the chosen round marked."""
    percent = results["measure"] == "accuracy"
    headers = ["round", "c", "degrees of freedom", "GCV"]
    headers += ["noise rate ≤", "train, given (%)", "train, clean (%)", "test (%)"] if percent else ["test R²"]
    rows = []
    for row in results["rounds"]:
        mark = " ← best by GCV" if row["round"] == results["best_round"] else ""
        cells = [f"{row['round']}", f"{row['c']:.3g}", f"{row['degrees_of_freedom']:.1f}"]
        cells.append(f"{row['gcv']:.4g} ± {row['gcv_standard_error']:.2g}")
        if percent:
            cells.append(f"{row['noise_rate']:.2f}")
            cells += [f"{100 * row[name]:.1f}" for name in ("train_given", "train_clean")]
        rows.append([*cells, (f"{100 * row['test']:.1f}" if percent else f"{row['test']:.3f}") + mark])
    width = max(len(cells[-1]) for cells in rows)
    return headers, [[*cells[:-1], cells[-1].ljust(width)] for cells in rows]


def describe(results: dict[str, Any]) -> str:
    """The table and what follows from it, as text."""
    low, high = results["fits_interval"]
    end = results["collapsed_at"]
    ridge = results["ridge"]
    test = f"{100 * ridge['test']:.1f} %" if results["measure"] == "accuracy" else f"{ridge['test']:.3f}"
    others = ", ".join(
        f"{factor}ε: {'none' if found is None else f'round {found[0]} (GCV {found[1]:.4g})'}"
        for factor, found in results["other_tolerances"].items()
    )
    noise = (
        "" if results["realised_noise"] is None else f", {100 * results['realised_noise']:.1f} % of the labels wrong"
    )
    lines = [
        f"{results['dataset']}, {results['points']} points{noise}; {results['kernel']} kernel of rank "
        f"{results['rank']}; tolerance {results['relative_tolerance']:g} of the label energy",
        "",
        report.plain_table(*table(results)),
        "",
        f"collapse after {end} fits" if end is not None else "no collapse within the rounds asked for",
        f"theory, whatever the kernel: between {low} and {high} fits",
        f"at other tolerances: {others}",
        f"one ridge fit tuned by GCV, for comparison: test {results['measure']} {test} (c = {ridge['c']:.3g})",
    ]
    return "\n".join(lines)


def write_output(folder: Path, results: dict[str, Any], path: DistillationPath) -> None:
    """results.json, index.html, and where matplotlib is, rounds.png and path.png."""
    _files.write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    parts = [
        report.section("Rounds", report.table(*table(results))),
        report.section("Reading", report.text(reading(results))),
    ]
    if (reason := plots.why_not()) is None:
        pictures = {"rounds.png": draw(results), "path.png": path.plot()}
        for name, figure in pictures.items():
            plots.save(figure, folder / name)
            picture = report.picture((folder / name).read_bytes(), reading(results))
            parts.append(report.section(name.removesuffix(".png"), picture))
    else:
        print(f"sdfast hilbert: no plots: {reason}", file=sys.stderr)
    title = f"Self-distillation on {results['dataset']} with a {results['kernel']} kernel"
    report.write_page(folder / "index.html", title, parts, f"tolerance {results['tolerance']:.6g}")
    print(f"report: {folder / 'index.html'}", file=sys.stderr)


def draw(results: dict[str, Any]) -> Any:
    """The panel: GCV's prediction beside the measured quality, the predicted round marked."""
    rows = results["rounds"]
    percent = results["measure"] == "accuracy"
    measured = [100 * row["test"] if percent else row["test"] for row in rows]
    noise = (
        "" if results["realised_noise"] is None else f", {100 * results['realised_noise']:.0f} % of the labels wrong"
    )
    return figures.prediction(
        [row["gcv"] for row in rows],
        [row["gcv_difference_error"] for row in rows],
        results["best_round"],
        measured,
        "Measured: test accuracy (%)" if percent else "Measured: test R²",
        f"{results['dataset']}, {results['points']} points{noise}; {results['kernel']} kernel",
    )


def reading(results: dict[str, Any]) -> str:
    """What the table shows, in a sentence."""
    chosen = results["rounds"][results["best_round"] - 1]["test"]
    first, ridge = results["rounds"][0]["test"], results["ridge"]["test"]
    return (
        f"GCV, from the noisy labels alone, stops at round {results['best_round']} of {len(results['rounds'])}: test "
        f"{results['measure']} {chosen:.3f}, against {first:.3f} after ordinary training and {ridge:.3f} of one ridge "
        "fit tuned by GCV."
    )
