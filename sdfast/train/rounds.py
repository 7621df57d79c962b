"""Rounds of self-distillation: each network learns what the one before it predicts (Mobahi et al. 2020, §5)."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdfast import _checks
from sdfast.data.images import evaluation_batches
from sdfast.data.parts import Dataset
from sdfast.train.recipe import Recipe, accuracy, derived_seed, logits_of, share
from sdfast.train.records import FAILURES, RunFile, data_settings, labels_of_runs, mean_and_deviation, model_settings

__all__ = ["DistilledRounds", "distill_rounds"]

LOSSES = ("brier", "cross_entropy", "mse")
COLUMNS = ("test_accuracy", "train_accuracy", "clean_accuracy")


@dataclass
class DistilledRounds:
    """Accuracies of every run after every round.

    Attributes:
        runs: For each run that ended, one dictionary a round: ``round`` (from 1), ``test_accuracy``,
            ``train_accuracy`` against the labels given at first, ``clean_accuracy`` against the data set's own, the
            last epoch's ``loss``, and ``seconds``.
        failures: Of the others, run number -> what happened.
        settings: That all runs share.
    """

    runs: list[list[dict[str, float]]]
    failures: dict[int, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many rounds there are."""
        return min((len(run) for run in self.runs), default=0)

    def curve(self, column: str) -> list[list[float]]:
        """One of the columns, (runs, rounds)."""
        return [[record[column] for record in run] for run in self.runs]

    def mean_and_deviation(self, column: str) -> list[tuple[float, float]]:
        """Mean and sample standard deviation over the runs, round by round."""
        return [mean_and_deviation(values) for values in zip(*self.curve(column), strict=True)]

    @property
    def best_round(self) -> int:
        """The round, counted from 1, with the largest mean test accuracy: an oracle that looks at the test data."""
        means = [mean for mean, _ in self.mean_and_deviation("test_accuracy")]
        return 1 + means.index(max(means))

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"settings": self.settings, "runs": self.runs, "failures": self.failures}

    def plot(self, path: str | os.PathLike, *, subtitle: str = "") -> None:
        """Draws test and training accuracy over the rounds, mean ± deviation, as a PNG; needs matplotlib."""
        from sdfast import plots

        plots.save(self.figure(subtitle), path)

    def figure(self, subtitle: str = "") -> Any:
        """The picture, as a matplotlib figure."""
        from sdfast import plots

        def panel(title: str, names: Sequence[tuple[str, str, str]]) -> Any:
            curves = [plots.Curve(name, color, self.curve(column)) for name, color, column in names]
            return plots.Panel(title, curves, x_name="round", deviation=True)

        train = [("labels as given", plots.ORANGE, "train_accuracy"), ("true labels", plots.GREEN, "clean_accuracy")]
        if self.curve("train_accuracy") == self.curve("clean_accuracy"):
            train = [("train", plots.ORANGE, "train_accuracy")]
        return plots.comparison(
            "Rounds of self-distillation",
            subtitle or f"mean ± standard deviation of {len(self.runs)} runs",
            [
                panel("Accuracy on test data", [("test", plots.BLUE, "test_accuracy")]),
                panel("Accuracy on the training data", train),
            ],
        )


def distill_rounds(
    make_model: Callable[[], nn.Module],
    data: Dataset,
    rounds: int = 12,
    loss: str = "brier",
    runs: int = 10,
    *,
    recipe: Recipe | None = None,
    labels: Tensor | Sequence[Tensor] | None = None,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> DistilledRounds:
    """Trains on the labels, then a fresh network on that one's predictions, and so on; and all of it `runs` times.

    Round 1 is ordinary training. Each later round learns softmax(f(x)) of the round before on the training inputs, or
    f(x) itself with ``loss="mse"``, predicted in evaluation mode without augmentation.

    Args:
        make_model: Makes a fresh network, called without arguments after torch's generator is seeded.
        data: A data set; accuracies are measured on its test part.
        rounds: How many trainings a run has.
        loss: ``"brier"`` (the paper's ℓ2 on softmax outputs), ``"cross_entropy"``, or ``"mse"`` on logits.
        runs: How many times, from other initial weights and orders.
        recipe: How each network is trained; ``None`` is ``Recipe()``.
        labels: (N,) classes to learn in round 1 instead of the data set's own, such as noisy ones; or one such tensor
            a run.
        seed: Of everything drawn.
        folder: Where each run writes what it has after every round; runs that are there go on where they stopped, and
            more `rounds` make them longer.
        progress: Show a progress bar on a terminal.

    Returns:
        The accuracies. A run that fails (a loss that is not finite, memory) is noted and loses no other.

    Raises:
        ValueError: An argument is impossible, or the folder holds runs with other settings.
        FloatingPointError: All runs failed so; other errors likewise.
    """
    _checks.check_option("loss", loss, LOSSES)
    for name, value in (("rounds", rounds), ("runs", runs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, wanted an integer >= 1")
    recipe = Recipe() if recipe is None else recipe
    given = labels_of_runs(data, labels, runs)
    settings = {"loss": loss, "seed": seed, "recipe": asdict(recipe), "model": model_settings(make_model)}
    result = DistilledRounds([], settings={**settings, "rounds": rounds, "runs": runs})
    failed: Exception | None = None
    with tqdm(total=runs * rounds * recipe.epochs, unit="epoch", disable=None if progress else True) as bar:
        for run in range(runs):
            bar.set_description(f"run {run + 1}/{runs}")
            file = RunFile(folder, f"run-{run + 1}", {**settings, **data_settings(data, given[run])})
            chain = _Chain(make_model, data, given[run], loss, recipe, (seed, run), file)
            try:
                result.runs.append(chain.up_to(rounds, bar))
            except FAILURES as error:
                failed = error
                result.failures[run + 1] = f"{type(error).__name__}: {error}"
    if not result.runs and failed is not None:
        raise failed
    return result


@dataclass
class _Chain:
    """One run: a network after another."""

    make_model: Callable[[], nn.Module]
    data: Dataset
    labels: Tensor
    loss: str
    recipe: Recipe
    seeds: tuple[int, int]
    file: RunFile

    def up_to(self, rounds: int, bar: tqdm) -> list[dict[str, float]]:
        records: list[dict[str, float]] = list(self.file.state.get("records", []))
        targets = self.file.state.get("targets", self.labels)
        bar.update(min(len(records), rounds) * self.recipe.epochs)
        for round in range(len(records) + 1, rounds + 1):
            record, targets = self._round(round, targets, bar)
            records.append(record)
            self.file.save(records=records, targets=targets)
        return records[:rounds]

    def _round(self, round: int, targets: Tensor, bar: tqdm) -> tuple[dict[str, float], Tensor]:
        began = time.perf_counter()
        seed = derived_seed(*self.seeds, round)
        distiller, history = self.recipe.train(
            self.make_model, self.data, targets, seed, loss=self.loss, evaluate=False,
            callbacks=[lambda *_: bar.update()],
        )  # fmt: skip
        device = self.recipe.device
        logits = logits_of(distiller.model, evaluation_batches(self.data, "train", device=device))
        predicted = logits.argmax(1)
        record = {
            "round": round,
            "test_accuracy": accuracy(distiller.model, evaluation_batches(self.data, device=device)),
            "train_accuracy": share(predicted == self.labels),
            "clean_accuracy": share(predicted == self.data.train_labels),
            "loss": history.last.loss,
            "seconds": time.perf_counter() - began,
        }
        return record, logits if self.loss == "mse" else torch.softmax(logits, 1)
