"""How many rounds of self-distillation help, predicted from a kernel and the noisy labels alone, and then measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdfast import plots
from sdfast.data.images import evaluation_batches
from sdfast.experiments.claims import Claim, above
from sdfast.experiments.experiment import Common, Experiment, Summary
from sdfast.experiments.task import checkpoint, draw_rows, load_task, network, prepared
from sdfast.hilbert import kernels, self_distill
from sdfast.ntk import gram
from sdfast.train.recipe import Recipe, derived_seed, logits_of
from sdfast.train.records import mean_and_deviation, mean_text, percent
from sdfast.train.rounds import distill_rounds

LOSS = "cross_entropy"
RULES = {
    "network": "its tangent kernel",
    "rbf": "Gaussian kernel",
    "residual": "its tangent kernel, ε its own residual",
}
SHORT = {"network": "tangent", "rbf": "Gaussian", "residual": "own ε"}


@dataclass(frozen=True)
class Settings(Common):
    """Settings of the comparison.

    Attributes:
        dataset: Name for `load_dataset`.
        model: Name for `make_model`.
        hidden: Widths of an ``mlp``.
        rounds: Trainings in a chain, the first an ordinary one.
        epochs: Of each training.
        batch_size: Rows in a step.
        learning_rate: At the start; it falls by a cosine.
        weight_decay: Of SGD.
        noise: Probability with which a label is redrawn.
        rows: Of the training part, of which the kernels are made; 0 takes all.
        gamma: Of the Gaussian kernel.
        tolerance: ε of each fit on a kernel, as a share of the label energy.
        bound: How many points the predicted round may lose to the best, as a fraction.
        checkpoints: Write the first training after every epoch, and each round.
    """

    dataset: str = "digits"
    model: str = "mlp"
    hidden: tuple[int, ...] = (256, 256)
    rounds: int = 8
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 2e-3
    noise: float = 0.4
    rows: int = 0
    gamma: float = 0.1
    tolerance: float = 0.05
    bound: float = 0.015
    checkpoints: bool = False


PAPER = Settings(
    seeds=3, jobs=1, dataset="cifar10", model="resnet20", epochs=200, weight_decay=1e-4, rows=5000,
    gamma=1 / 3072, checkpoints=True,
)  # fmt: skip


def run_seed(settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """The predictions, before any second round is trained, and the chain of networks."""
    data, labels = load_task(settings, seed, settings.noise)
    recipe = Recipe(
        epochs=settings.epochs, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay, device=settings.device,
    )  # fmt: skip
    make = network(data, settings.model, settings.hidden)
    path = checkpoint(settings, folder, "first")
    # The chain's own first network, by its seed.
    first, _ = recipe.train(make, data, labels, derived_seed(seed, 0, 1), loss=LOSS, evaluate=False, checkpoint=path)
    predictions = predict(settings, first.model, data, labels, seed)
    chain = distill_rounds(
        make, data, settings.rounds, LOSS, 1, recipe=recipe, labels=labels, seed=seed,
        folder=folder if settings.checkpoints else None, progress=False,
    )  # fmt: skip
    logits = logits_of(first.model, evaluation_batches(data, device=settings.device))
    return {
        "predictions": predictions,
        "test": chain.curve("test_accuracy")[0],
        "train": chain.curve("train_accuracy")[0],
        "first_test": float((logits.argmax(1) == data.test_labels).double().mean()),
        "wrong_labels": float((labels != data.train_labels).double().mean()),
    }


def predict(settings: Settings, model: torch.nn.Module, data: Any, labels: Tensor, seed: int) -> dict[str, Any]:
    """By each rule the round where GCV stops, from noisy labels alone, and the ε it rests on."""
    count = len(labels)
    rows = draw_rows(count, settings.rows or count, seed)
    inputs = prepared(data, data.train_inputs[rows])
    onehot = np.eye(data.num_classes)[labels[rows].numpy()]
    y = onehot - onehot.mean(0)
    model.eval()
    with torch.no_grad():
        fitted = torch.cat([model(part.to(settings.device)).softmax(1).cpu() for part in inputs.split(1024)])
    residual = float(((fitted.double().numpy() - onehot) ** 2).sum() / (y**2).sum())
    model.to(torch.float64)
    tangent = gram(model, inputs.to(settings.device, torch.float64), outputs="mean").cpu().numpy()
    model.to(torch.float32)
    gaussian = kernels.gram("rbf", inputs.flatten(1).double().numpy(), gamma=settings.gamma)
    asked = {
        "network": (tangent, settings.tolerance),
        "rbf": (gaussian, settings.tolerance),
        "residual": (tangent, residual),
    }
    return {rule: _best_fit(kernel, y, tolerance) for rule, (kernel, tolerance) in asked.items()}


def _best_fit(kernel: np.ndarray, y: np.ndarray, tolerance: float) -> dict[str, Any]:
    """The number of fits at which GCV is least; none where the zero function already meets ε, or no function does."""
    if tolerance >= 1:
        return {"tolerance": tolerance, "fits": None, "collapse": 0}
    path = self_distill(kernel, y, relative_tolerance=tolerance)
    if path.infeasible is not None:
        return {"tolerance": tolerance, "fits": None, "collapse": None}
    return {"tolerance": tolerance, "fits": int(path.best_round()), "collapse": path.collapsed_at}


def round_of(settings: Settings, run: dict[str, Any], rule: str) -> int:
    """The round to stop at, 1 the ordinary training: no rule says less, and the chain has no more."""
    return min(run["predictions"][rule]["fits"] or 1, settings.rounds)


def lost(settings: Settings, run: dict[str, Any], rule: str) -> float:
    """How much test accuracy the predicted round is short of the best of the chain."""
    return max(run["test"]) - run["test"][round_of(settings, run, rule) - 1]


def summarise(settings: Settings, seeds: dict[int, dict[str, Any]]) -> Summary:
    """Predicted against measured."""
    runs = list(seeds.values())
    means = [mean_and_deviation(column)[0] for column in zip(*(run["test"] for run in runs), strict=True)]
    best = means.index(max(means)) + 1
    kernel_names = {"network": "network's tangent", "rbf": "Gaussian"}
    claims = [
        above(
            f"The round that the {name} kernel predicts loses at most {100 * settings.bound:g} points to the best of "
            "its chain",
            [settings.bound - lost(settings, run, rule) for run in runs], "points to spare",
        )
        for rule, name in kernel_names.items()
    ]  # fmt: skip
    gains = [run["test"][round_of(settings, run, "network") - 1] - run["test"][0] for run in runs]
    claims.append(
        above("The round that the network's tangent kernel predicts tests better than ordinary training", gains)
    )
    none = sum(round_of(settings, run, "residual") == 1 for run in runs)
    size = f"in {none} of {len(runs)}"
    text = (
        "With ε set to what the network itself left unfitted, the tangent kernel predicts no self-distillation at all"
    )
    claims.append(Claim(text, none == len(runs), size, None, len(runs)))
    chosen = {rule: mean_text([float(round_of(settings, run, rule)) for run in runs]) for rule in RULES}
    losses = {rule: percent([lost(settings, run, rule) for run in runs]) for rule in RULES}
    holds = [name for claim, name in zip(claims, kernel_names.values(), strict=False) if claim.holds]
    verdict = (
        f"within the bound for the {' and the '.join(holds)} kernel" if holds else "not shown to be within the bound"
    )
    residual = 100 * mean_and_deviation([run["predictions"]["residual"]["tolerance"] for run in runs])[0]
    reading = (
        f"Test accuracy is best in round {best}: {100 * means[best - 1]:.1f} %, against {100 * means[0]:.1f} % after "
        "ordinary training. Before a second round is trained, the network's tangent kernel and the noisy labels "
        f"predict round {chosen['network']}, which loses {losses['network']} points to the best of its own chain "
        f"(chosen on the test data); a Gaussian kernel predicts {chosen['rbf']} and loses {losses['rbf']}: {verdict}. "
        f"The tolerance ε of these predictions is {100 * settings.tolerance:g} % of the labels' squared length, set "
        f"before. The theory would take what the trained network itself leaves unfitted, {residual:.0f} %; with that "
        f"the kernel predicts ordinary training alone {size} seeds."
    )
    return Summary(reading, claims, _tables(settings, runs), lambda: _figure(settings, runs))


def _tables(settings: Settings, runs: list[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    rows = []
    for rule, name in RULES.items():
        found = [run["predictions"][rule] for run in runs]
        rounds = [round_of(settings, run, rule) for run in runs]
        there = [run["test"][t - 1] for run, t in zip(runs, rounds, strict=True)]
        rows.append(
            [
                name, mean_text([100 * one["tolerance"] for one in found]), mean_text([*map(float, rounds)]),
                f"{min(rounds)} to {max(rounds)}", percent(there),
                percent([lost(settings, run, rule) for run in runs]),
            ]
        )  # fmt: skip
    at_best = [float(run["test"].index(max(run["test"])) + 1) for run in runs]
    rows.append(
        [
            "the best round, by test accuracy", "", mean_text(at_best), f"{min(at_best):.0f} to {max(at_best):.0f}",
            percent([max(run["test"]) for run in runs]), "",
        ]
    )  # fmt: skip
    headers = [
        "kernel",
        "ε (% of the labels' squared length)",
        "predicted round",
        "range",
        "test accuracy there (%)",
        "loses",
    ]
    curve = [
        [str(t + 1), percent([run["test"][t] for run in runs]), percent([run["train"][t] for run in runs])]
        for t in range(settings.rounds)
    ]
    return [
        ("Predicted and measured; round 1 is ordinary training", headers, rows),
        ("Measured, accuracy (%)", ["round", "test", "train, labels as given"], curve),
    ]


def _figure(settings: Settings, runs: list[dict[str, Any]]) -> Any:
    accuracy = [plots.Curve("networks", plots.BLUE, [run["test"] for run in runs])]
    colors = {"network": plots.VERMILLION, "rbf": plots.ORANGE, "residual": plots.GREY}
    shares = [
        plots.Curve(
            SHORT[rule], color,
            [[float(round_of(settings, run, rule) == t + 1) for t in range(settings.rounds)] for run in runs],
        )
        for rule, color in colors.items()
    ]  # fmt: skip
    wrong = 100 * mean_and_deviation([run["wrong_labels"] for run in runs])[0]
    return plots.comparison(
        "The round to stop at, measured and predicted",
        f"{settings.model} on {settings.dataset}, {wrong:.0f} % wrong labels; mean and range of {len(runs)} chains",
        [
            plots.Panel("Measured: accuracy on test data", accuracy, x_name="round"),
            plots.Panel("Predicted: share of the seeds", [c._replace(runs=[_mean(c.runs)]) for c in shares],
                        x_name="round", percent=False),
        ],
    )  # fmt: skip


def _mean(curves: Sequence[Sequence[float]]) -> list[float]:
    return [mean_and_deviation(column)[0] for column in zip(*curves, strict=True)]


EXPERIMENT = Experiment(
    title="The number of rounds, predicted",
    source="ours, on the theory of Mobahi, Farajtabar, Bartlett 2020, §3",
    question="Can one tell from the noisy labels alone, before any second training, how many rounds will help?",
    presets={"small": Settings(), "paper": PAPER},
    run_seed=run_seed,
    summarise=summarise,
    unstated=(
        "everything: the paper predicts no round for networks. Here the rounds are computed on a kernel in closed "
        "form, with an ε set beforehand, and generalised cross-validation, which needs nothing but the labels given, "
        "picks one."
    ),
)
