"""``sdfast rounds``: each network learns what the one before it predicts, round after round."""

import argparse

from sdfast.train import predict_rounds, sweep_command
from sdfast.train.data_flags import (
    add_data_arguments,
    add_model_arguments,
    add_recipe_arguments,
    model_maker,
    recipe_of,
)
from sdfast.train.flags import named_as_flags
from sdfast.train.records import percent
from sdfast.train.rounds import LOSSES, DistilledRounds, distill_rounds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_data_arguments(parser)
    rounds = parser.add_argument_group("rounds")
    rounds.add_argument("--rounds", type=int, default=12, help="trainings in a run; the first is ordinary training")
    rounds.add_argument("--runs", type=int, default=3, help="how many chains, from other weights and other noise")
    rounds.add_argument("--loss", choices=LOSSES, default="brier", help="to the predictions of the round before")
    training = parser.add_argument_group("training")
    add_model_arguments(training)
    add_recipe_arguments(training)
    predict_rounds.add_arguments(parser)
    sweep_command.add_output_arguments(parser, "sdfast-rounds")


def run(arguments: argparse.Namespace) -> int:
    """Runs the chains, prints their table and writes their report; or predicts them.

    Raises:
        ValueError: A flag is impossible.
    """
    if arguments.predict is not None:
        return predict_rounds.run(arguments)
    for name in ("tolerance", "samples"):
        if name in arguments.given:
            raise ValueError(f"--{name}: goes with --predict only")
    data, labels = sweep_command.prepare(arguments)
    with named_as_flags():
        recipe, make = recipe_of(arguments), model_maker(arguments, data)
    with sweep_command.begun(arguments):
        result = distill_rounds(
            make, data, arguments.rounds, arguments.loss, arguments.runs, recipe=recipe, labels=labels,
            seed=arguments.seed, folder=arguments.output / sweep_command.RUNS, progress=not arguments.no_progress,
        )  # fmt: skip
        subtitle = sweep_command.describe(arguments, data, labels)
        headers, rows = table(result)
        title = "Rounds of self-distillation"
        sweep_command.write(arguments, result, title, subtitle, headers, rows, reading(result))
    return 0


def table(result: DistilledRounds) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: one a round."""
    columns = ("test_accuracy", "train_accuracy", "clean_accuracy")
    curves = [list(zip(*result.curve(column), strict=True)) for column in columns]
    rows = [[str(t), *map(percent, cells)] for t, cells in enumerate(zip(*curves, strict=True), 1)]
    return ["round", "test", "train, as given", "train, true"], rows


def reading(result: DistilledRounds) -> str:
    """What the rounds did, in a sentence."""
    means = [mean for mean, _ in result.mean_and_deviation("test_accuracy")]
    best = result.best_round
    ends = f"{100 * means[0]:.1f} % after ordinary training and {100 * means[-1]:.1f} % after round {len(means)}"
    if best == 1:
        return f"No round improved on ordinary training: {ends}."
    return f"Round {best} is the best with {100 * means[best - 1]:.1f} % on test data, against {ends}."
