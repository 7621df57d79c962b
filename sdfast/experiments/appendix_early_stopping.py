"""Self-distillation against early stopping (Mobahi et al. 2020, §3.4), at equal training error."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdfast import plots
from sdfast.data.images import evaluation_batches
from sdfast.experiments.claims import Claim, above
from sdfast.experiments.experiment import Common, Experiment, Summary
from sdfast.experiments.task import load_task, network, points
from sdfast.hilbert import kernels, self_distill
from sdfast.train.recipe import Recipe, accuracy
from sdfast.train.records import mean_and_deviation
from sdfast.train.rounds import distill_rounds


@dataclass(frozen=True)
class Settings(Common):
    """Settings of the comparison.

    Attributes:
        dataset: Name for `load_dataset`.
        model: Name for `make_model`.
        hidden: Widths of an ``mlp``.
        rounds: Trainings in a chain.
        epochs: Of each training.
        batch_size: Rows in a step.
        learning_rate: At the start; it falls by a cosine.
        weight_decay: Of SGD.
        noise: Probability with which a label is redrawn.
        kernel_rows: Training rows of the kernel's part; 0 leaves it out.
        gamma: Of its Gaussian kernel.
        tolerance: Its ε, as a share of the label energy.
        checkpoints: Write each round.
    """

    dataset: str = "digits"
    model: str = "mlp"
    hidden: tuple[int, ...] = (256, 256)
    rounds: int = 6
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 2e-3
    noise: float = 0.4
    kernel_rows: int = 400
    gamma: float = 0.1
    tolerance: float = 0.05
    checkpoints: bool = False


PAPER = Settings(
    seeds=3, jobs=1, dataset="cifar10", model="resnet56", rounds=6, epochs=200, weight_decay=1e-4, noise=0.0,
    kernel_rows=0, checkpoints=True,
)  # fmt: skip


def run_seed(settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """A chain of networks, one network followed epoch by epoch, and the kernel's path."""
    data, labels = load_task(settings, seed, settings.noise)
    recipe = Recipe(
        epochs=settings.epochs, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay, device=settings.device,
    )  # fmt: skip
    make = network(data, settings.model, settings.hidden)
    chain = distill_rounds(
        make, data, settings.rounds, "cross_entropy", 1, recipe=recipe, labels=labels, seed=seed,
        folder=folder if settings.checkpoints else None, progress=False,
    )  # fmt: skip
    train_part = evaluation_batches(data, "train", labels, device=settings.device)
    test_part = evaluation_batches(data, device=settings.device)
    stopped: list[tuple[float, float]] = []

    def look(distiller: Any, history: Any) -> None:
        stopped.append((accuracy(distiller.model, train_part), accuracy(distiller.model, test_part)))

    recipe.train(make, data, labels, seed, evaluate=False, callbacks=[look])
    matches = [_match(stopped, record["train_accuracy"]) for record in chain.runs[0]]
    values: dict[str, Any] = {
        "test": chain.curve("test_accuracy")[0],
        "train": chain.curve("train_accuracy")[0],
        "stopped_test": [test for _, test, _ in matches],
        "stopped_train": [train for train, _, _ in matches],
        "stopped_epoch": [epoch for _, _, epoch in matches],
    }
    if settings.kernel_rows:
        values["kernel"] = _kernel(settings, data, labels)
    return values


def _match(stopped: list[tuple[float, float]], train_accuracy: float) -> tuple[float, float, int]:
    """The first epoch of ordinary training whose training accuracy is at least that of a round, else its last."""
    for epoch, (train, test) in enumerate(stopped, 1):
        if train >= train_accuracy:
            return train, test, epoch
    train, test = stopped[-1]
    return train, test, len(stopped)


def _kernel(settings: Settings, data: Any, labels: Any) -> dict[str, Any]:
    """Contrasts of the spectral filters at equal training error (Mobahi et al. 2020, §3.4)."""
    rows = slice(0, settings.kernel_rows)
    inputs = data.train_inputs[rows].flatten(1).double().numpy()
    y = np.eye(data.num_classes)[labels[rows].numpy()]
    path = self_distill(
        kernels.gram("rbf", inputs, gamma=settings.gamma), y - y.mean(0), relative_tolerance=settings.tolerance
    )
    match = path.early_stopping_match()
    return {
        "distilled": [float(value) for value in match.contrast],
        "stopped": [float(value) for value in match.early_stopping_contrast],
        "limit": float(match.limit),
    }


def summarise(settings: Settings, seeds: dict[int, dict[str, Any]]) -> Summary:
    """Test accuracies at equal training accuracy, and the filters of the kernel."""
    runs = list(seeds.values())
    gains = [max(run["test"][1:] or run["test"]) for run in runs]
    last = [run["test"][-1] - run["stopped_test"][-1] for run in runs]
    claims = [
        above(f"At the training accuracy of round {settings.rounds}, self-distillation tests better than a network "
              "stopped early", last),
    ]  # fmt: skip
    rows = [
        [
            str(t + 1), *(points([run[name][t] for run in runs]) for name in ("train", "test", "stopped_test")),
            f"{mean_and_deviation([float(run['stopped_epoch'][t]) for run in runs])[0]:.0f}",
        ]
        for t in range(settings.rounds)
    ]  # fmt: skip
    headers = ["round", "train, labels as given", "self-distilled, test", "stopped early, test", "at epoch"]
    title = "Accuracy (%), round by round and at the epoch of ordinary training with the same training accuracy"
    tables = [(title, headers, rows)]
    sentence = ""
    kernel = [run["kernel"] for run in runs if "kernel" in run]
    if kernel:
        # A single fit cannot tell eigenvectors further apart than their eigenvalues are; rounds multiply.
        always = all(a >= b - 1e-9 for one in kernel for a, b in zip(one["distilled"], one["stopped"], strict=True))
        beyond = sum(one["distilled"][-1] > one["stopped"][-1] for one in kernel)
        text = "On a kernel, rounds never keep more directions than a single fit stopped at the same error"
        claims.append(Claim(text, always, f"last round sparser in {beyond} of {len(kernel)}", None, len(kernel)))
        fits = min(len(one["distilled"]) for one in kernel)
        rows = [
            [
                str(t + 1),
                *(
                    f"{mean_and_deviation([one[name][t] for one in kernel])[0]:.2f}"
                    for name in ("distilled", "stopped")
                ),
            ]
            for t in range(fits)
        ]
        title = (
            "Gaussian kernel: log₁₀ of how much better the strongest direction is kept than the weakest, at equal error"
        )
        tables.append((title, ["round", "self-distilled", "stopped early"], rows))
        verdict = (
            ", as the theory says" if always and beyond == len(kernel) else ", not in every seed as the theory says"
        )
        sentence = (
            f" On a kernel round {fits} keeps its strongest direction 10^{rows[-1][1]} times better than its weakest, "
            f"a single fit of the same training error 10^{rows[-1][2]} times: rounds leave fewer directions{verdict}."
        )
    mean, _ = mean_and_deviation(last)
    reading = (
        f"At equal training accuracy, round {settings.rounds} of self-distillation differs from early stopping by "
        f"{100 * mean:+.1f} points of test accuracy; the best later round, chosen on the test data, reaches "
        f"{points(gains)} %.{sentence}"
    )
    return Summary(reading, claims, tables, lambda: _figure(settings, runs))


def _figure(settings: Settings, runs: list[dict[str, Any]]) -> Any:
    curves = [
        plots.Curve("self-distilled", plots.BLUE, [run["test"] for run in runs]),
        plots.Curve("stopped early", plots.VERMILLION, [run["stopped_test"] for run in runs]),
    ]
    panels = [plots.Panel("Test accuracy at equal training accuracy", curves, x_name="round", deviation=True)]
    kernel = [run["kernel"] for run in runs if "kernel" in run]
    if kernel:
        fits = min(len(one["distilled"]) for one in kernel)
        curves = [
            plots.Curve("self-distilled", plots.BLUE, [one["distilled"][:fits] for one in kernel]),
            plots.Curve("stopped early", plots.VERMILLION, [one["stopped"][:fits] for one in kernel]),
        ]
        title = "Kernel: log₁₀ largest over smallest filter entry"
        panels.append(plots.Panel(title, curves, x_name="round", deviation=True, percent=False))
    noise = f", {100 * settings.noise:.0f} % of the labels redrawn" if settings.noise else ""
    return plots.comparison(
        "Self-distillation against early stopping",
        f"{settings.model} on {settings.dataset}{noise}; mean ± standard deviation of {len(runs)} seeds",
        panels,
    )


EXPERIMENT = Experiment(
    title="Self-distillation against early stopping",
    source="Mobahi, Farajtabar, Bartlett 2020, §3.4 and its appendix",
    question="Is self-distillation just another way to stop early?",
    presets={"small": Settings(), "paper": PAPER},
    run_seed=run_seed,
    summarise=summarise,
    unstated="how the two are paired (here: by training accuracy against the labels as given), and all of training.",
)
