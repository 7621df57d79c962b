"""Figure 1 of Dong et al. 2019: a teacher stopped early teaches better."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdfast import plots
from sdfast.experiments.claims import Claim, above, within
from sdfast.experiments.experiment import Common, Experiment, Summary
from sdfast.experiments.task import load_task, network, points
from sdfast.train.recipe import Recipe
from sdfast.train.records import mean_and_deviation
from sdfast.train.teacher import teacher_sweep

PAPER_BEST = 80  # of 40, 80, 120, 160, 200: CIFAR-100, clean labels


@dataclass(frozen=True)
class Settings(Common):
    """Settings of the figure.

    Attributes:
        dataset: Name for `load_dataset`.
        teacher_model: Name for `make_model`.
        teacher_hidden: Widths of an ``mlp``.
        student_model: Name for `make_model`.
        student_hidden: Widths of an ``mlp``.
        epochs: Of the teacher, at which it teaches.
        early: Of these the one that the claim calls early, fixed beforehand.
        student_epochs: Of each student.
        batch_size: Rows in a step.
        teacher_learning_rate: Of the teacher.
        teacher_schedule: Of the teacher.
        student_learning_rate: At the start; it falls by a cosine.
        weight_decay: Of both.
        temperature: Of both softmaxes.
        noises: Label noise of each panel.
        bound: Within which students of late teachers count as equal on clean labels.
        checkpoints: Write the teacher's after every epoch.
    """

    dataset: str = "digits"
    teacher_model: str = "mlp"
    teacher_hidden: tuple[int, ...] = (512, 512)
    student_model: str = "mlp"
    student_hidden: tuple[int, ...] = (256,)
    epochs: tuple[int, ...] = (2, 4, 8, 12, 32, 128)
    early: int = 12
    student_epochs: int = 80
    batch_size: int = 128
    teacher_learning_rate: float = 0.05
    teacher_schedule: str = "constant"
    student_learning_rate: float = 0.1
    weight_decay: float = 0.0
    temperature: float = 4.0
    noises: tuple[float, ...] = (0.0, 0.4)
    bound: float = 0.01
    checkpoints: bool = False


PAPER = Settings(
    seeds=1, jobs=1, dataset="cifar100", teacher_model="wide_resnet28_10", student_model="small_cnn",
    epochs=(40, 80, 120, 160, 200), early=80, student_epochs=200, teacher_learning_rate=0.1, teacher_schedule="cosine",
    weight_decay=5e-4, noises=(0.0,), checkpoints=True,
)  # fmt: skip


def run_seed(settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """A teacher and its students for each noise."""
    values = {}
    for noise in settings.noises:
        data, labels = load_task(settings, seed, noise)
        common = {"batch_size": settings.batch_size, "device": settings.device, "weight_decay": settings.weight_decay}
        teacher = Recipe(learning_rate=settings.teacher_learning_rate, schedule=settings.teacher_schedule, **common)  # type: ignore[arg-type]
        student = Recipe(epochs=settings.student_epochs, learning_rate=settings.student_learning_rate, **common)  # type: ignore[arg-type]
        sweep = teacher_sweep(
            network(data, settings.teacher_model, settings.teacher_hidden),
            network(data, settings.student_model, settings.student_hidden),
            data, settings.epochs, teacher=teacher, student=student, temperature=settings.temperature, labels=labels,
            seed=seed, folder=folder / f"noise-{noise}" if settings.checkpoints else None, progress=False,
        )  # fmt: skip
        names = ("student_accuracy", "teacher_accuracy", "teacher_train_accuracy")
        values[str(noise)] = {**{name: sweep.curve(name)[0] for name in names}, "alone": sweep.alone[0]}
    return values


def summarise(settings: Settings, seeds: dict[int, dict[str, Any]]) -> Summary:
    """Students by teacher's epoch, at each noise."""
    runs = list(seeds.values())
    at = settings.epochs.index(settings.early)
    claims: list[Claim] = []
    tables, sentences = [], []
    for noise in settings.noises:
        students = [run[str(noise)]["student_accuracy"] for run in runs]
        gains = [curve[at] - curve[-1] for curve in students]
        means = [mean_and_deviation(column)[0] for column in zip(*students, strict=True)]
        best = settings.epochs[means.index(max(means))]
        where = f"at {100 * noise:.0f} % noise" if noise else "on clean labels"
        late = "" if best == settings.epochs[-1] else f", after {settings.epochs[-1]} at {100 * means[-1]:.1f} %"
        sentences.append(
            f"{where} students end best when the teacher stops after {best} epochs, at {100 * max(means):.1f} %{late}"
        )
        if noise or len(settings.noises) == 1:
            text = f"A teacher stopped at epoch {settings.early} teaches better than at {settings.epochs[-1]}, {where}"
            claims.append(above(text, gains))
        else:
            either = f"{settings.early} and {settings.epochs[-1]}"
            text = f"On clean labels students of a teacher stopped at epochs {either} are equally good"
            claims.append(within(text, gains, settings.bound))
        tables.append((f"Test accuracy (%) {where}", *_table(settings, [run[str(noise)] for run in runs])))
    told = "; ".join(sentences)
    paper = f"The paper sees its best student, on clean CIFAR-100, from epoch {PAPER_BEST} of 200."
    reading = f"{told[0].upper()}{told[1:]}. {paper}{_agreement(settings, claims)}"
    return Summary(reading, claims, tables, lambda: _figure(settings, runs))


def _agreement(settings: Settings, claims: list[Claim]) -> str:
    """Whether an early stop helps here too, once there are seeds enough to say."""
    if any(claim.holds is None for claim in claims):
        return ""
    helps = all(claim.holds for noise, claim in zip(settings.noises, claims, strict=True) if noise)
    if len(settings.noises) == 1:
        return " Here too an early stop helps." if claims[0].holds else " That an early stop helps is not shown here."
    noisy = "an early stop helps where labels are wrong"
    if not helps:
        noisy = "it is not shown that an early stop helps where labels are wrong"
    clean = [claim.holds for noise, claim in zip(settings.noises, claims, strict=True) if not noise]
    if not clean:
        return f" Here {noisy}."
    same = "makes no difference that counts" if all(clean) else "is not shown to make none"
    return f" Here {noisy}; on clean labels, the paper's case, it {same}."


def _table(settings: Settings, runs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    names = ("student_accuracy", "teacher_accuracy", "teacher_train_accuracy")
    rows = [
        [str(epoch), *(points([run[name][index] for run in runs]) for name in names)]
        for index, epoch in enumerate(settings.epochs)
    ]
    rows.append(["no teacher", points([run["alone"] for run in runs]), "", ""])
    return ["teacher's epoch", "student", "teacher", "teacher, labels as given"], rows


def _figure(settings: Settings, runs: list[dict[str, Any]]) -> Any:
    panels = []
    for noise in settings.noises:
        values = [run[str(noise)] for run in runs]
        curves = [
            plots.Curve("student", plots.BLUE, [run["student_accuracy"] for run in values]),
            plots.Curve("teacher", plots.VERMILLION, [run["teacher_accuracy"] for run in values]),
        ]
        alone = math.fsum(run["alone"] for run in values) / len(values)
        panels.append(
            plots.Panel(
                f"Test accuracy, {100 * noise:.0f} % label noise", curves, level=alone, level_name="without a teacher",
                x_name="epochs of the teacher", xs=settings.epochs, deviation=True, log_x=True,
            )
        )  # fmt: skip
    subtitle = f"{settings.dataset}; mean ± standard deviation of {len(runs)} seeds"
    return plots.comparison("Students of one teacher, by its epoch", subtitle, panels)


EXPERIMENT = Experiment(
    title="A teacher stopped early",
    source="Dong et al. 2019, Figure 1",
    question="From which epoch of a large network does a small one learn best?",
    presets={"small": Settings(), "paper": PAPER},
    run_seed=run_seed,
    summarise=summarise,
    unstated=(
        "the teacher's widening factor (here 10), both optimisers, the temperature (here 4) and the weight of the "
        "labels (here 0), the dropout rate of the student (here none). Its Table 2 prints 10 outputs for 100 classes."
    ),
)
