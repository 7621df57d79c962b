"""``sdfast teacher``: when to stop a teacher, seen by the students of several of its epochs."""

import argparse

from sdfast.train import sweep_command
from sdfast.train.data_flags import (
    add_data_arguments,
    add_model_arguments,
    add_recipe_arguments,
    model_maker,
    recipe_of,
)
from sdfast.train.flags import named_as_flags
from sdfast.train.recipe import SCHEDULES
from sdfast.train.records import percent
from sdfast.train.teacher import TeacherSweep, teacher_sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_data_arguments(parser)
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument(
        "--teacher-epochs", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 128], help="at which it teaches"
    )
    add_model_arguments(teacher, "teacher")
    teacher.add_argument("--teacher-lr", type=float, default=0.05, help="its learning rate")
    teacher.add_argument("--teacher-schedule", choices=SCHEDULES, default="constant", help="of its learning rate")
    student = parser.add_argument_group("student")
    add_model_arguments(student)
    student.add_argument("--temperature", type=float, default=4.0, help="of both softmaxes")
    student.add_argument("--alpha", type=float, default=0.0, help="weight of the labels' own loss")
    add_recipe_arguments(student, epochs=80)
    student.add_argument("--runs", type=int, default=3, help="how many teachers, from other weights and other noise")
    sweep_command.add_output_arguments(parser, "sdfast-teacher")


def run(arguments: argparse.Namespace) -> int:
    """Runs the sweep, prints its table and writes its report."""
    data, labels = sweep_command.prepare(arguments)
    with named_as_flags():
        student = recipe_of(arguments)
        teacher = recipe_of(arguments, learning_rate=arguments.teacher_lr, schedule=arguments.teacher_schedule)
        makers = [model_maker(arguments, data, role) for role in ("teacher", "")]
    with sweep_command.begun(arguments, epochs="teacher_epochs"):
        result = teacher_sweep(
            makers[0], makers[1], data, arguments.teacher_epochs, teacher=teacher, student=student,
            temperature=arguments.temperature, alpha=arguments.alpha, labels=labels, runs=arguments.runs,
            seed=arguments.seed, folder=arguments.output / sweep_command.RUNS, progress=not arguments.no_progress,
        )  # fmt: skip
        subtitle = sweep_command.describe(arguments, data, labels)
        headers, rows = table(result)
        sweep_command.write(arguments, result, "When to stop the teacher", subtitle, headers, rows, reading(result))
    return 0


def table(result: TeacherSweep) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: one an epoch of the teacher."""
    columns = ("student_accuracy", "teacher_accuracy", "teacher_train_accuracy")
    curves = [list(zip(*result.curve(column), strict=True)) for column in columns]
    rows = [
        [str(epoch), *map(percent, cells)]
        for epoch, cells in zip(result.epochs, zip(*curves, strict=True), strict=True)
    ]
    headers = ["teacher's epoch", "student, test", "teacher, test", "teacher, train as given"]
    return headers, [*rows, ["no teacher", percent(result.alone), "", ""]]


def reading(result: TeacherSweep) -> str:
    """What the sweep showed, in a sentence."""
    means = dict(zip(result.epochs, (m for m, _ in result.mean_and_deviation("student_accuracy")), strict=True))
    best, last = result.best_epoch, result.epochs[-1]
    if best == last:
        return f"The teacher's last epoch, {last}, teaches best: stopping it early gained nothing here."
    return (
        f"The teacher of epoch {best} teaches best: its students reach {100 * means[best]:.1f} %, those of epoch "
        f"{last} {100 * means[last]:.1f} %."
    )
