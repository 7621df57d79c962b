"""Figure 3 of Mobahi et al. 2020: accuracy over the rounds of self-distillation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdfast import plots
from sdfast.experiments.claims import Claim, above
from sdfast.experiments.experiment import Common, Experiment, Summary
from sdfast.experiments.task import load_task, network, points
from sdfast.train.recipe import Recipe
from sdfast.train.records import mean_and_deviation
from sdfast.train.rounds import distill_rounds

NAMES = {"brier": "ℓ2 on softmax", "cross_entropy": "cross entropy"}
COLORS = {"brier": plots.GREEN, "cross_entropy": plots.BLUE}


@dataclass(frozen=True)
class Settings(Common):
    """Settings of the figure.

    Attributes:
        dataset: Name for `load_dataset`.
        model: Name for `make_model`.
        hidden: Widths of an ``mlp``.
        rounds: Trainings in a chain, the first an ordinary one.
        epochs: Of each training.
        batch_size: Rows in a step.
        learning_rate: At the start; it falls by a cosine.
        weight_decay: With cross entropy.
        brier_weight_decay: With ℓ2 on softmax outputs, whose gradient is smaller; chosen on seeds 1000 and 1001, which
            are not among those run.
        noise: Probability with which a label is redrawn; the paper has none.
        checkpoints: Write each round.
    """

    dataset: str = "digits"
    model: str = "mlp"
    hidden: tuple[int, ...] = (256, 256)
    rounds: int = 12
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 2e-3
    brier_weight_decay: float = 5e-4
    noise: float = 0.4
    checkpoints: bool = False


PAPER = Settings(
    jobs=1, dataset="cifar10", model="resnet56", rounds=12, epochs=200, weight_decay=1e-4, brier_weight_decay=1e-4,
    noise=0.0, checkpoints=True,
)  # fmt: skip


def run_seed(settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """One chain with each loss."""
    data, labels = load_task(settings, seed, settings.noise)
    values = {}
    for loss in NAMES:
        decay = settings.brier_weight_decay if loss == "brier" else settings.weight_decay
        recipe = Recipe(
            epochs=settings.epochs, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
            weight_decay=decay, device=settings.device,
        )  # fmt: skip
        chain = distill_rounds(
            network(data, settings.model, settings.hidden), data, settings.rounds, loss, 1, recipe=recipe,
            labels=labels, seed=seed, folder=folder / loss if settings.checkpoints else None, progress=False,
        )  # fmt: skip
        columns = ("test_accuracy", "train_accuracy", "clean_accuracy")
        values[loss] = {column: chain.curve(column)[0] for column in columns}
    return values


def summarise(settings: Settings, seeds: dict[int, dict[str, Any]]) -> Summary:
    """Means over the seeds, round by round."""
    runs = list(seeds.values())
    claims: list[Claim] = []
    tables, sentences = [], []
    for loss, name in NAMES.items():
        test = [run[loss]["test_accuracy"] for run in runs]
        train = [run[loss]["train_accuracy"] for run in runs]
        means = [mean_and_deviation(column)[0] for column in zip(*test, strict=True)]
        best = means.index(max(means))
        sentences.append(
            f"with {name}, test accuracy goes from {100 * means[0]:.1f} % to {100 * means[best]:.1f} % in round "
            f"{best + 1} and {100 * means[-1]:.1f} % in round {len(means)}"
        )
        if settings.rounds > 1:
            claims += [
                above(f"A second round improves on ordinary training ({name})", [c[1] - c[0] for c in test]),
                _later_rounds_hurt(name, test),
                above(
                    f"Training accuracy on the first labels falls from the first round to the last ({name})",
                    [curve[0] - curve[-1] for curve in train],
                ),
            ]
        columns = ("test_accuracy", "train_accuracy", "clean_accuracy")
        rows = [
            [str(t + 1), *(points([run[loss][column][t] for run in runs]) for column in columns)]
            for t in range(settings.rounds)
        ]
        tables.append((f"{name}, accuracy (%)", ["round", "test", "train, labels as given", "train, true"], rows))
    reading = (
        f"{'. '.join(s[0].upper() + s[1:] for s in sentences)}. In the paper both losses first gain and then lose test "
        "accuracy over ten rounds on CIFAR-10 and CIFAR-100, and training accuracy falls in every round; it prints "
        f"curves and no numbers.{_agreement(claims)}"
    )
    return Summary(reading, claims, tables, lambda: _figure(settings, runs))


def _agreement(claims: list[Claim]) -> str:
    """For which losses each of the three claims holds, once there are seeds enough to say."""
    if not claims or any(claim.holds is None for claim in claims):
        return ""
    said = []
    for number, words in enumerate(("a second round helps", "later rounds hurt", "training accuracy falls")):
        held = [name for name, claim in zip(NAMES.values(), claims[number::3], strict=True) if claim.holds]
        said.append(f"{words} with {' and with '.join(held)}" if held else f"that {words} is not shown")
    return f" Here {', '.join(said[:-1])}, and {said[-1]}."


def _later_rounds_hurt(name: str, test: list[list[float]]) -> Claim:
    """The best round is chosen on the other seeds, so that chance cannot choose it for the one it is judged by."""
    text = f"Rounds after the best lose test accuracy again ({name}; the best chosen on the other seeds)"
    if len(test) < 2:
        return Claim(text, None, "one seed", None, 1)
    losses = []
    for index, curve in enumerate(test):
        others = [other for number, other in enumerate(test) if number != index]
        sums = [sum(column) for column in zip(*others, strict=True)]
        losses.append(curve[sums.index(max(sums))] - curve[-1])
    return above(text, losses)


def _figure(settings: Settings, runs: list[dict[str, Any]]) -> Any:
    def panel(title: str, column: str) -> plots.Panel:
        curves = [plots.Curve(NAMES[loss], COLORS[loss], [run[loss][column] for run in runs]) for loss in NAMES]
        return plots.Panel(title, curves, x_name="round", deviation=True)

    noise = f", {100 * settings.noise:.0f} % of the labels redrawn" if settings.noise else ""
    return plots.comparison(
        "Rounds of self-distillation",
        f"{settings.model} on {settings.dataset}{noise}; mean ± standard deviation of {len(runs)} chains",
        [panel("Accuracy on test data", "test_accuracy"), panel("Training accuracy, first labels", "train_accuracy")],
    )


EXPERIMENT = Experiment(
    title="Rounds of self-distillation",
    source="Mobahi, Farajtabar, Bartlett 2020, Figure 3",
    question="If a network learns from another's predictions, and a third from that one's, when does it stop helping?",
    presets={"small": Settings(), "paper": PAPER},
    run_seed=run_seed,
    summarise=summarise,
    unstated="depth of the ResNet (here 56), optimiser, epochs and augmentation (an appendix of the paper has them).",
)
