"""Figure 4 of Dong et al. 2019: training curves with 40 % of the labels redrawn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdfast import plots
from sdfast.experiments.claims import above
from sdfast.experiments.experiment import Common, Experiment, Summary
from sdfast.experiments.task import checkpoint, load_task, network, points
from sdfast.ops.self_distillation import AdaptiveAlpha
from sdfast.train.recipe import Recipe
from sdfast.train.records import mean_and_deviation

PLAIN, OURS = "cross entropy", "self-distillation"
COLORS = {PLAIN: plots.VERMILLION, OURS: plots.BLUE}
PAPER_LAST = {PLAIN: "overfits (a curve, no number)", OURS: "90.82"}  # Table 1: CIFAR-10, p = .4


@dataclass(frozen=True)
class Settings(Common):
    """Settings of the figure.

    Attributes:
        dataset: Name for `load_dataset`.
        model: Name for `make_model`.
        hidden: Widths of an ``mlp``.
        epochs: Of each training.
        batch_size: Rows in a step.
        learning_rate: At the start; it falls by a cosine.
        weight_decay: Of SGD.
        noise: Probability with which a label is redrawn over all classes.
        ratio: λ of 1 − α = λ · batch accuracy.
        cnn_seeds: How many seeds also train ``small_cnn`` on the digits as pictures.
        cnn_epochs: Of those.
        checkpoints: Write one after every epoch.
    """

    dataset: str = "digits"
    model: str = "mlp"
    hidden: tuple[int, ...] = (256, 256)
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 0.0
    noise: float = 0.4
    ratio: float = 1.0
    cnn_seeds: int = 2
    cnn_epochs: int = 30
    checkpoints: bool = False


PAPER = Settings(
    seeds=3, jobs=1, dataset="cifar10", model="shake_shake26_32", epochs=600, learning_rate=0.2, weight_decay=1e-4,
    cnn_seeds=0, checkpoints=True,
)  # fmt: skip


def run_seed(settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """Both methods' curves on one draw of split, noise, weights and order."""
    values = _curves(settings, seed, folder, settings.dataset, settings.model, settings.epochs)
    if seed < settings.cnn_seeds:
        values["cnn"] = _curves(settings, seed, folder, "digit_pictures", "small_cnn", settings.cnn_epochs)
    return values


def _curves(settings: Settings, seed: int, folder: Path, dataset: str, model: str, epochs: int) -> dict[str, Any]:
    data, labels = load_task(settings, seed, settings.noise, dataset)
    recipe = Recipe(
        epochs=epochs, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay, device=settings.device,
    )  # fmt: skip
    values: dict[str, Any] = {"wrong_labels": float((labels != data.train_labels).double().mean())}
    for method, alpha in ((PLAIN, 1.0), (OURS, AdaptiveAlpha(settings.ratio))):
        path = checkpoint(settings, folder, f"{model}-{method.replace(' ', '-')}")
        make = network(data, model, settings.hidden)
        _, history = recipe.train(make, data, labels, seed, alpha=alpha, checkpoint=path)
        columns = {"test": "eval_accuracy", "train": "accuracy", "true": "clean_accuracy"}
        values[method] = {name: history[column] for name, column in columns.items()}
    return values


def summarise(settings: Settings, seeds: dict[int, dict[str, Any]]) -> Summary:
    """Last and best epochs, and the drop between them."""
    runs = list(seeds.values())
    last = {method: [run[method]["test"][-1] for run in runs] for method in COLORS}
    best = {method: [max(run[method]["test"]) for run in runs] for method in COLORS}
    drop = {m: [high - end for high, end in zip(best[m], last[m], strict=True)] for m in COLORS}
    claims = [
        above(
            f"Cross entropy overfits {100 * settings.noise:.0f} % noise: its test accuracy falls further from its best "
            "epoch to its last than self-distillation's",
            [a - b for a, b in zip(drop[PLAIN], drop[OURS], strict=True)],
        ),
        above(
            "Self-distillation ends with a higher test accuracy than cross entropy",
            [a - b for a, b in zip(last[OURS], last[PLAIN], strict=True)],
        ),
    ]
    rows = [[m, points(last[m]), points(best[m]), points(drop[m]), PAPER_LAST[m]] for m in COLORS]
    headers = ["method", "last epoch (%)", "best epoch (%)", "drop", "paper, CIFAR-10, last (%)"]
    tables = [(f"{settings.model} on {settings.dataset}, {len(runs)} seeds", headers, rows)]
    cnn = [run["cnn"] for run in runs if "cnn" in run]
    if cnn:
        rows = [[m, points([r[m]["test"][-1] for r in cnn]), points([max(r[m]["test"]) for r in cnn])] for m in COLORS]
        title = f"small_cnn on the digits as pictures, {settings.cnn_epochs} epochs, {len(cnn)} seeds"
        tables.append((title, headers[:3], rows))
    plain, ours = (mean_and_deviation(last[m])[0] for m in COLORS)
    wrong = 100 * mean_and_deviation([run["wrong_labels"] for run in runs])[0]
    holds = {True: "as in the paper's figure", False: "not as in the paper's figure", None: "too few seeds to say more"}
    verdict = None if any(claim.holds is None for claim in claims) else all(claim.holds for claim in claims)
    reading = (
        f"With {wrong:.0f} % of the labels wrong, cross entropy ends at {100 * plain:.1f} % after a best epoch of "
        f"{points(best[PLAIN])} %, self-distillation at {100 * ours:.1f} %: {holds[verdict]}. The numbers themselves "
        "compare only at the paper preset, which has its data and its network."
    )
    return Summary(reading, claims, tables, lambda: _figure(settings, runs, wrong))


def _figure(settings: Settings, runs: list[dict[str, Any]], wrong: float) -> Any:
    def panel(title: str, column: str, **options: Any) -> plots.Panel:
        curves = [plots.Curve(m, color, [run[m][column] for run in runs]) for m, color in COLORS.items()]
        return plots.Panel(title, curves, **options)

    return plots.comparison(
        "Training on wrong labels, with and without self-distillation",
        f"{settings.model} on {settings.dataset}, {wrong:.0f} % wrong labels; mean and range of {len(runs)} seeds",
        [
            panel("Accuracy on test data", "test"),
            panel("Agreement with the labels as given", "train", level=1 - wrong / 100, level_name="right labels"),
        ],
    )


EXPERIMENT = Experiment(
    title="Training curves on noisy labels",
    source="Dong et al. 2019, Figure 4",
    question="Does a network that mixes its labels with its own predictions stop memorising the wrong ones?",
    presets={"small": Settings(), "paper": PAPER},
    run_seed=run_seed,
    summarise=summarise,
    unstated="whether predictions are hardened (here: hardmax), and whether a redrawn label may stay (here: it may).",
)
