"""``sdfast demo``: the same small network on the same noisy labels, by cross entropy and by self-distillation.

And why: what the labels hold of the network's own kernel, and rounds of self-distillation in closed form.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sdfast
from sdfast import _dispatch, _files, plots, report
from sdfast.data import Batches, Dataset, NoisyLabels, flip_labels, load_dataset
from sdfast.experiments import demo_kernel
from sdfast.hilbert import command as hilbert_command
from sdfast.models import mlp
from sdfast.ops.self_distillation import AdaptiveAlpha
from sdfast.train import History, SelfDistiller

NOISE_RATE = 0.4
WIDTHS = (64, 256, 256, 10)
BATCH_SIZE = 128
LEARNING_RATE = 0.1
MOMENTUM = 0.9

KERNEL_ROUNDS = ("--dataset", "digits", "--noise", str(NOISE_RATE), "--kernel", "rbf")  # of ``sdfast hilbert``

# Both rows are the same trainer and the same loss; α = 1 is plain cross entropy.
METHODS: dict[str, tuple[str, float | AdaptiveAlpha]] = {
    "cross entropy": (plots.VERMILLION, 1.0),
    "self-distillation": (plots.BLUE, AdaptiveAlpha(1.0)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--seeds", type=int, default=3, help="how many runs of each method")
    parser.add_argument("--epochs", type=int, default=100, help="of each run; memorising the noise takes about 100")
    parser.add_argument("--output", type=Path, default=Path("sdfast-demo"), help="folder for the report")
    parser.add_argument("--picture", type=Path, help="also save the picture here")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON document instead of a table")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo, prints its table and writes its report."""
    for name in ("seeds", "epochs"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name}: got {getattr(arguments, name)}, wanted at least 1")
    reason = plots.why_not()
    if reason is not None and arguments.picture is not None:
        raise ValueError(f"--picture: {reason}")
    if arguments.picture is not None and not arguments.picture.parent.is_dir():
        raise ValueError(f"--picture: there is no folder {arguments.picture.parent}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = run_demo(arguments.seeds, arguments.epochs, progress=not arguments.no_progress)
    watched = watch(arguments.epochs)
    results["kernel"] = watched.results
    _files.write_text(arguments.output / "results.json", json.dumps(results, indent=1) + "\n")
    headers, rows = summary(results)
    pictures: dict[str, bytes] = {}
    if reason is None:
        figures = {"curves.png": draw(results), "rounds.png": hilbert_command.draw(results["kernel_rounds"])}
        figures |= demo_kernel.draw(watched)
        pictures = {name: plots.png(figure) for name, figure in figures.items()}
        for name, picture in pictures.items():
            _write_picture(arguments.output / name, picture)
        if arguments.picture is not None:
            _write_picture(arguments.picture, pictures["curves.png"])
    write_report(arguments.output / "index.html", results, headers, rows, pictures)
    if arguments.json:
        print(json.dumps(results))
    else:
        print(f"Test accuracy after training on digits, {redrawn(results)}\n")
        print(report.plain_table(headers, rows))
        print(f"\nInformation ratio of the labels along training, in the top {demo_kernel.TOP} of the tangent kernel\n")
        print(report.plain_table(*demo_kernel.table(results["kernel"])))
        print(f"\n{demo_kernel.reading(results['kernel'])}")
        print(f"\nRounds of self-distillation on a kernel ({kernel_command()})\n")
        print(report.plain_table(*hilbert_command.table(results["kernel_rounds"])))
        print(f"\n{hilbert_command.reading(results['kernel_rounds'])}")
        print(f"\nreport: {arguments.output / 'index.html'}")
    if reason is not None:
        print(f"sdfast demo: no picture: {reason}", file=sys.stderr)
    return 0


def _write_picture(path: Path, picture: bytes) -> None:
    _files.write_atomically(path, lambda file: file.write(picture))


def kernel_command() -> str:
    """The command that shows the kernel's rounds alone."""
    return " ".join(("sdfast hilbert", *KERNEL_ROUNDS))


def kernel_rounds() -> dict[str, Any]:
    """What that command finds: each round's test accuracy, and the round that GCV picks from the noisy labels."""
    parser = argparse.ArgumentParser()
    hilbert_command.add_arguments(parser)
    return hilbert_command.compute(parser.parse_args(KERNEL_ROUNDS))[0]


def run_demo(seeds: int, epochs: int, progress: bool = True) -> dict[str, Any]:
    """Trains every method once per seed.

    Args:
        seeds: How many seeds: of the split, the noise, the initial weights and the order.
        epochs: Of each run.
        progress: Show a progress bar on a terminal.

    Returns:
        What results.json holds: the setting, the environment, each run's curves, and the rounds on a kernel.
    """
    with _one_thread():
        runs, wrong_labels = _train_all(seeds, epochs, progress)
    return {
        "data": "digits",
        "noise_rate": NOISE_RATE,
        "wrong_labels": wrong_labels,
        "widths": WIDTHS,
        "batch_size": BATCH_SIZE,
        "epochs": epochs,
        "optimizer": f"SGD, momentum {MOMENTUM}, learning rate {LEARNING_RATE} falling to 0 by a cosine",
        "runs": runs,
        "kernel_rounds": kernel_rounds(),
        "environment": {
            "sdfast": sdfast.__version__,
            "torch": torch.__version__,
            "threads": 1,
            "backend": _dispatch.automatic("cpu"),
        },
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """So small a network gains nothing from a second thread, and crawls where another program wants that core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_all(seeds: int, epochs: int, progress: bool) -> tuple[dict[str, list[dict]], float]:
    """The runs of each method, and the mean share of wrong labels."""
    runs: dict[str, list[dict]] = {method: [] for method in METHODS}
    rates = []
    for _, alpha in METHODS.values():  # what a process does once (imports, first allocations) is in no run's seconds
        train_once(alpha, 0, 1, lambda *_: None)
    with tqdm(total=seeds * len(METHODS) * epochs, unit="epoch", disable=None if progress else True) as bar:
        for seed in range(seeds):
            for method, (_, alpha) in METHODS.items():
                bar.set_description(f"{method}, seed {seed}")
                began = time.perf_counter()
                rate, history = train_once(alpha, seed, epochs, lambda *_: bar.update())
                seconds = time.perf_counter() - began
                columns = ("accuracy", "clean_accuracy", "eval_accuracy", "alpha", "loss")
                runs[method].append({"seed": seed, "seconds": seconds, **{name: history[name] for name in columns}})
            rates.append(rate)
    return runs, statistics.mean(rates)


def watch(epochs: int) -> demo_kernel.Watched:
    """The first run of self-distillation once more, seen through its kernel: the runs themselves are timed."""
    trained: list[SelfDistiller] = []

    def train(probe: Callable[[SelfDistiller, History], object]) -> torch.nn.Module:
        def look(distiller: SelfDistiller, history: History) -> None:
            probe(distiller, history)
            trained[:] = [distiller]

        train_once(METHODS["self-distillation"][1], 0, epochs, look)
        return trained[0].model

    with _one_thread():
        return demo_kernel.watch(*_noisy_digits(0), train)


def _noisy_digits(seed: int) -> tuple[Dataset, NoisyLabels]:
    data = load_dataset("digits", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return data, flip_labels(data.train_labels, NOISE_RATE, data.num_classes, generator=generator)


def train_once(
    alpha: float | AdaptiveAlpha, seed: int, epochs: int, callback: Callable[[SelfDistiller, History], object]
) -> tuple[float, History]:
    """One run: the realised noise rate, and the history with test and clean accuracies."""
    data, noise = _noisy_digits(seed)
    torch.manual_seed(seed)
    model = mlp(WIDTHS)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    distiller = SelfDistiller(model, optimizer, alpha=alpha, scheduler=scheduler)
    history = distiller.fit(
        Batches(data.train_inputs, noise.labels, BATCH_SIZE, seed=seed, with_indices=True),
        epochs,
        eval=[(data.test_inputs, data.test_labels)],
        callbacks=[callback],
        progress=False,
        clean_labels=data.train_labels,
    )
    return noise.realised_rate, history


def summary(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table: one row a method, mean ± standard deviation over the seeds."""
    rows = []
    for method, runs in results["runs"].items():
        last = [100 * run["eval_accuracy"][-1] for run in runs]
        best = [100 * max(run["eval_accuracy"]) for run in runs]
        seconds = statistics.mean(run["seconds"] for run in runs)
        rows.append([method, mean_and_deviation(last), mean_and_deviation(best), f"{seconds:.1f}"])
    return ["method", "last epoch (%)", "best epoch (%)", "seconds a run"], rows


def redrawn(results: dict[str, Any]) -> str:
    """The noise in words: a redraw over all classes leaves some labels right."""
    rate, wrong = results["noise_rate"], results["wrong_labels"]
    return f"{100 * rate:.0f} % of the training labels redrawn at random, {100 * wrong:.0f} % wrong"


def mean_and_deviation(values: Sequence[float]) -> str:
    """The mean, and the sample standard deviation where there are two values or more."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


def draw(results: dict[str, Any]) -> Any:
    """The picture: test accuracy on the left, agreement with the training labels on the right."""

    def curves(column: str) -> list[plots.Curve]:
        runs = results["runs"].items()
        return [plots.Curve(name, METHODS[name][0], [run[column] for run in each]) for name, each in runs]

    wrong = results["wrong_labels"]
    setting = f"{'-'.join(map(str, results['widths']))} network"
    seeds = len(next(iter(results["runs"].values())))
    return plots.comparison(
        "Training on wrong labels, by cross entropy and by self-distillation",
        f"digits, {redrawn(results)}; {setting}; mean and range of {seeds} seed{'s' if seeds > 1 else ''}",
        [
            plots.Panel("Accuracy on test data", curves("eval_accuracy")),
            plots.Panel(
                "Agreement with the training labels as given",
                curves("accuracy"),
                level=1 - wrong,
                level_name=f"{100 * (1 - wrong):.0f} % are right: more means memorised errors",
            ),
        ],
    )


def write_report(
    path: Path, results: dict[str, Any], headers: Sequence[str], rows: Sequence[Sequence[str]], pictures: dict
) -> None:
    """The page: pictures, tables, setting."""
    ends = ", ".join(f"{method} {figure} %" for method, figure, *_ in rows)
    parts = []
    if pictures:
        description = f"Test accuracy over the epochs; at the last epoch: {ends}"
        parts.append(report.section("What happens", report.picture(pictures["curves.png"], description)))
    parts.append(
        report.section(
            "Test accuracy",
            report.table(headers, rows),
            report.text(
                "Mean ± standard deviation over the seeds. The best epoch is chosen by looking at the test data, which "
                "nobody can do in earnest: the last epoch is what training without an early-stopping set gives."
            ),
        )
    )
    parts.append(demo_kernel.section(results["kernel"], pictures))
    parts += [_rounds_section(results["kernel_rounds"], pictures), _setting_section(results)]
    parts.append(
        report.section(
            "References",
            report.text(
                "Dong, Hou, Lu, Zhang 2019: Distillation ≈ Early Stopping? Harvesting Dark Knowledge Utilizing "
                "Anisotropic Information Retrieval For Overparameterized Neural Network. Algorithm 1."
            ),
            report.text(
                "Mobahi, Farajtabar, Bartlett 2020: Self-Distillation Amplifies Regularization in Hilbert Space."
            ),
        )
    )
    environment = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    report.write_page(path, "Training on wrong labels, with and without self-distillation", parts, environment)


def _rounds_section(rounds: dict[str, Any], pictures: dict[str, bytes]) -> str:
    reading = hilbert_command.reading(rounds)
    content = [report.picture(pictures["rounds.png"], reading)] if pictures else []
    content += [
        report.text(
            "Kernel ridge regression that learns from its own predictions, round after round, in closed form. Wrong "
            "labels lie in the eigenvectors of small eigenvalues, which vanish first; the collapse comes when all do."
        ),
        report.table(*hilbert_command.table(rounds)),
        report.text(f"{reading} The same by {kernel_command()}."),
    ]
    return report.section("How many rounds help", *content)


def _setting_section(results: dict[str, Any]) -> str:
    setting = [
        ("data", "scikit-learn's digits, a random quarter held out for testing"),
        ("label noise", f"each label redrawn over all classes with probability {results['noise_rate']}"),
        ("labels that end up wrong", f"{100 * results['wrong_labels']:.1f} %"),
        ("network", "-".join(map(str, results["widths"]))),
        ("training", f"{results['optimizer']}; batch {results['batch_size']}; {results['epochs']} epochs"),
        ("self-distillation", "target = α · label + (1 − α) · own hard prediction, with 1 − α = accuracy of the batch"),
    ]
    return report.section("Setting", report.table(("", ""), setting))
