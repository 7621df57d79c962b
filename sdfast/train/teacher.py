"""When to stop a teacher: students of one teacher at several of its epochs (Dong et al. 2019, §2.1)."""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdfast import _files
from sdfast.data.batches import Batches
from sdfast.data.images import evaluation_batches
from sdfast.data.parts import Dataset
from sdfast.ops.distillation import distillation_loss
from sdfast.ops.self_distillation import self_distillation_loss
from sdfast.train.recipe import Recipe, accuracy, derived_seed
from sdfast.train.records import FAILURES, RunFile, data_settings, labels_of_runs, mean_and_deviation, model_settings
from sdfast.train.self_distiller import SelfDistiller

__all__ = ["TeacherSweep", "teacher_sweep"]


@dataclass
class TeacherSweep:
    """Accuracies of a teacher at some of its epochs, and of the student that each of them taught.

    Attributes:
        epochs: Of the teacher.
        runs: For each run that ended, one dictionary an epoch: ``epoch``, ``teacher_accuracy`` and
            ``student_accuracy`` on the test part, ``teacher_train_accuracy`` against the labels given, ``seconds``.
        alone: For each run, the test accuracy of a student that learned from the labels alone.
        failures: Of the others, run number -> what happened.
        settings: That all runs share.
    """

    epochs: list[int]
    runs: list[list[dict[str, float]]]
    alone: list[float] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def curve(self, column: str) -> list[list[float]]:
        """One of the columns, (runs, epochs)."""
        return [[record[column] for record in run] for run in self.runs]

    def mean_and_deviation(self, column: str) -> list[tuple[float, float]]:
        """Mean and sample standard deviation over the runs, epoch by epoch."""
        return [mean_and_deviation(values) for values in zip(*self.curve(column), strict=True)]

    @property
    def best_epoch(self) -> int:
        """The teacher's epoch whose students have the largest mean test accuracy: an oracle."""
        means = [mean for mean, _ in self.mean_and_deviation("student_accuracy")]
        return self.epochs[means.index(max(means))]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        names = ("epochs", "settings", "runs", "alone", "failures")
        return {name: getattr(self, name) for name in names}

    def plot(self, path: str | os.PathLike, *, subtitle: str = "") -> None:
        """Draws teacher and student over the teacher's epochs, mean ± deviation, as a PNG; needs matplotlib."""
        from sdfast import plots

        plots.save(self.figure(subtitle), path)

    def figure(self, subtitle: str = "") -> Any:
        """The picture, as a matplotlib figure."""
        from sdfast import plots

        curves = [
            plots.Curve("student", plots.BLUE, self.curve("student_accuracy")),
            plots.Curve("teacher", plots.VERMILLION, self.curve("teacher_accuracy")),
        ]
        alone, _ = mean_and_deviation(self.alone)
        return plots.comparison(
            "When to stop the teacher",
            subtitle or f"mean ± standard deviation of {len(self.runs)} runs",
            [
                plots.Panel(
                    "Accuracy on test data", curves, level=alone, level_name="student without a teacher",
                    x_name="epochs of the teacher", xs=self.epochs, log_x=True, deviation=True,
                )
            ],
        )  # fmt: skip


def teacher_sweep(
    make_teacher: Callable[[], nn.Module],
    make_student: Callable[[], nn.Module],
    data: Dataset,
    epochs: Sequence[int],
    *,
    teacher: Recipe | None = None,
    student: Recipe | None = None,
    temperature: float = 4.0,
    alpha: float = 0.0,
    labels: Tensor | Sequence[Tensor] | None = None,
    runs: int = 1,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> TeacherSweep:
    """Trains one teacher, and a fresh student from what it was at each of some epochs; and all of it `runs` times.

    A student's loss is ``α · CE(student, labels) + (1 − α) · T² · KL(softmax(teacher / T) ‖ softmax(student / T))``
    (Hinton et al. 2015), the teacher in evaluation mode on the very batch the student sees. All students of a run start
    from the same weights and see the same batches; one more learns from the labels alone.

    Args:
        make_teacher: Makes a fresh teacher, called without arguments after torch's generator is seeded.
        make_student: Makes a fresh student.
        data: A data set; accuracies are measured on its test part.
        epochs: Of the teacher, increasing, at which students are taught.
        teacher: How the teacher is trained; its own ``epochs`` are replaced by the last of `epochs`. ``None`` is a
            constant learning rate of .05.
        student: How students are trained; ``None`` is ``Recipe()``.
        temperature: T.
        alpha: Weight of the label's own loss.
        labels: (N,) classes to learn instead of the data set's own, such as noisy ones; or one such tensor a run.
        runs: How many times.
        seed: Of everything drawn.
        folder: Where the teacher's checkpoints and each student's figures are written; a sweep that is there goes on
            where it stopped.
        progress: Show a progress bar on a terminal.

    Returns:
        The accuracies. A run that fails is noted and loses no other.

    Raises:
        ValueError: An argument is impossible, or the folder holds a sweep with other settings.
        FloatingPointError: All runs failed so; other errors likewise.
    """
    wanted = list(epochs)
    if not wanted or wanted != sorted({int(epoch) for epoch in wanted}) or wanted[0] < 1:
        raise ValueError(f"epochs: got {wanted}, wanted increasing integers from 1 on")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, wanted a finite number > 0")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}, wanted within [0, 1]")
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise ValueError(f"runs: got {runs!r}, wanted an integer >= 1")
    teaching = Recipe(schedule="constant", learning_rate=0.05) if teacher is None else teacher
    teaching = replace(teaching, epochs=wanted[-1])
    learning = Recipe() if student is None else student
    given = labels_of_runs(data, labels, runs)
    settings = {
        "temperature": temperature, "alpha": alpha, "seed": seed, "teacher": asdict(teaching),
        "student": asdict(learning), "models": [model_settings(make) for make in (make_teacher, make_student)],
    }  # fmt: skip
    result = TeacherSweep(wanted, [], settings={**settings, "runs": runs})
    failed: Exception | None = None
    total = runs * (wanted[-1] + (len(wanted) + 1) * learning.epochs)
    with tqdm(total=total, unit="epoch", disable=None if progress else True) as bar:
        for run in range(runs):
            bar.set_description(f"run {run + 1}/{runs}")
            file = RunFile(folder, f"run-{run + 1}", {**settings, **data_settings(data, given[run])})
            one = _Run(make_teacher, make_student, data, given[run], teaching, learning, temperature, alpha,
                       derived_seed(seed, run), file, bar)  # fmt: skip
            try:
                alone, records = one.sweep(wanted)
            except FAILURES as error:
                failed = error
                result.failures[run + 1] = f"{type(error).__name__}: {error}"
            else:
                result.alone.append(alone)
                result.runs.append(records)
    if not result.runs and failed is not None:
        raise failed
    return result


@dataclass
class _Run:
    """One teacher and its students."""

    make_teacher: Callable[[], nn.Module]
    make_student: Callable[[], nn.Module]
    data: Dataset
    labels: Tensor
    teaching: Recipe
    learning: Recipe
    temperature: float
    alpha: float
    seed: int
    file: RunFile
    bar: tqdm
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def sweep(self, epochs: Sequence[int]) -> tuple[float, list[dict[str, float]]]:
        """The accuracy of the student without a teacher, and a record for each epoch."""
        records: list[dict[str, float]] = list(self.file.state.get("records", []))
        alone = self.file.state.get("alone")
        if alone is None:
            alone = self._student(None)
            self.file.save(alone=alone, records=records)
        else:
            self.bar.update(self.learning.epochs)
        missing = [epoch for epoch in epochs if epoch not in {record["epoch"] for record in records}]
        if missing:
            self._teach(missing)
        else:
            self.bar.update(self.teaching.epochs)
        self.bar.update((len(epochs) - len(missing)) * self.learning.epochs)
        for epoch in missing:
            records.append(self._record(epoch))
            self.file.save(alone=alone, records=records)
        return alone, sorted(records, key=lambda record: record["epoch"])

    def _teach(self, epochs: Sequence[int]) -> None:
        """Trains the teacher, keeping its weights at these epochs; in a folder, from where it was."""

        def keep(distiller: SelfDistiller, history: Any) -> None:
            epoch = len(history)
            self.bar.update()
            if epoch in epochs:
                state = distiller.model.state_dict()
                self._put(epoch, {name: value.detach().to("cpu", copy=True) for name, value in state.items()})

        path = self.file.path
        checkpoint = None if path is None else str(path.with_name(f"{path.stem}-teacher.pt"))
        places = [self._place(epoch) for epoch in epochs]
        if all(place is not None and place.exists() for place in places):
            self.bar.update(self.teaching.epochs)
            return
        self.teaching.train(
            self.make_teacher, self.data, self.labels, derived_seed(self.seed, 1), evaluate=False, callbacks=[keep],
            checkpoint=checkpoint,
        )  # fmt: skip

    def _place(self, epoch: int) -> Path | None:
        path = self.file.path
        return None if path is None else path.with_name(f"{path.stem}-teacher-{epoch}.pt")

    def _put(self, epoch: int, state: dict[str, Tensor]) -> None:
        place = self._place(epoch)
        if place is None:
            self.weights[epoch] = state
        else:
            _files.write_atomically(place, lambda file: torch.save(state, file))

    def _teacher_at(self, epoch: int) -> nn.Module:
        place = self._place(epoch)
        state = self.weights[epoch] if place is None else torch.load(place, map_location="cpu", weights_only=True)
        teacher = self.make_teacher()
        teacher.load_state_dict(state)
        return teacher.to(self.teaching.device).eval().requires_grad_(False)

    def _record(self, epoch: int) -> dict[str, float]:
        began = time.perf_counter()
        teacher = self._teacher_at(epoch)
        device, labels = self.teaching.device, self.labels
        record = {
            "epoch": epoch,
            "teacher_accuracy": accuracy(teacher, evaluation_batches(self.data, device=device)),
            "teacher_train_accuracy": accuracy(teacher, evaluation_batches(self.data, "train", labels, device=device)),
            "student_accuracy": self._student(teacher),
        }
        return {**record, "seconds": time.perf_counter() - began}

    def _student(self, teacher: nn.Module | None) -> float:
        """A student's test accuracy; without a teacher it learns from the labels alone."""
        seed = derived_seed(self.seed, 2)
        torch.manual_seed(seed)
        distiller = self.learning.distiller(self.make_student())
        batches = self.learning.batches(self.data, self.labels, seed)
        known = self._taught(distiller, teacher, batches)
        for _ in range(self.learning.epochs):
            self._epoch(distiller, teacher, known, batches)
            self.bar.update()
        return accuracy(distiller.model, evaluation_batches(self.data, device=self.learning.device))

    def _taught(self, distiller: SelfDistiller, teacher: nn.Module | None, batches: Batches) -> Tensor | None:
        """The teacher's logits of every row at once, where a row's inputs are the same in every epoch."""
        if teacher is None or type(batches) is not Batches:  # ImageBatches shift and mirror
            return None
        with torch.no_grad(), distiller._autocast():
            return torch.cat([teacher(rows) for rows in batches.inputs.split(4096)])

    def _loss(self, logits: Tensor, taught: Tensor | None, labels: Tensor) -> Tensor:
        if taught is None:
            return self_distillation_loss(logits, labels, 1.0)  # type: ignore[return-value]  # without stats, one tensor
        return distillation_loss(logits, taught, labels, alpha=self.alpha, temperature=self.temperature)

    def _epoch(
        self, distiller: SelfDistiller, teacher: nn.Module | None, known: Tensor | None, batches: Batches
    ) -> None:
        loss, taught = None, None
        for inputs, labels, rows in batches:
            distiller.optimizer.zero_grad()
            with distiller._autocast():
                logits = distiller._forward(inputs)
                if teacher is not None:
                    taught = teacher(inputs) if known is None else known[rows]
                loss = self._loss(logits, taught, labels)
            distiller.scaler.scale(loss).backward()
            distiller.scaler.step(distiller.optimizer)
            distiller.scaler.update()
        if distiller.scheduler is not None:
            distiller.scheduler.step()
        if loss is not None and not math.isfinite(float(loss.detach())):
            raise FloatingPointError(f"the student's loss is {float(loss.detach())}; lower its learning rate")
