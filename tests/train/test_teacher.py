"""teacher_sweep: its students against one taught by hand, and after an interruption."""

import pytest
import torch
import torch.nn.functional as F

from sdfast.data import Batches, Dataset, flip_labels
from sdfast.models import mlp
from sdfast.train import Recipe, teacher_sweep
from sdfast.train.recipe import derived_seed

TEACHER = Recipe(batch_size=16, learning_rate=0.05, schedule="constant")
STUDENT = Recipe(epochs=3, batch_size=16)


def data(rows=60):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 3
    inputs = torch.randn(rows, 5, generator=generator) + 2 * F.one_hot(labels, 5)
    return Dataset(inputs[20:], labels[20:], inputs[:20], labels[:20], 3, "tiny")


LABELS = flip_labels(data().train_labels, 0.4, 3, generator=torch.Generator().manual_seed(0)).labels


def big():
    return mlp((5, 16, 3))


def small():
    return mlp((5, 6, 3))


def train_by_hand(make, seed, epochs, rate, cosine, loss):
    tiny = data()
    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs) if cosine else None
    batches = Batches(tiny.train_inputs, LABELS, 16, seed=seed)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            loss(model, x, y).backward()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
    with torch.no_grad():
        return model, float((model(tiny.test_inputs).argmax(1) == tiny.test_labels).double().mean())


def test_students_are_those_taught_by_hand():
    result = teacher_sweep(
        big, small, data(), [1, 3], teacher=TEACHER, student=STUDENT, labels=LABELS, seed=5, progress=False
    )
    seed = derived_seed(5, 0)
    near = 1.01 / 20

    def plain(model, x, y):
        return F.cross_entropy(model(x), y)

    _, alone = train_by_hand(small, derived_seed(seed, 2), 3, 0.1, True, plain)
    assert result.alone[0] == pytest.approx(alone, abs=near)
    for record, epochs in zip(result.runs[0], (1, 3), strict=True):
        teacher, accuracy = train_by_hand(big, derived_seed(seed, 1), epochs, 0.05, False, plain)
        assert record["teacher_accuracy"] == pytest.approx(accuracy, abs=near)

        def taught(model, x, y, teacher=teacher):
            return 16 * -(F.softmax(teacher(x).detach() / 4, 1) * F.log_softmax(model(x) / 4, 1)).sum(1).mean()

        _, accuracy = train_by_hand(small, derived_seed(seed, 2), 3, 0.1, True, taught)
        assert record["student_accuracy"] == pytest.approx(accuracy, abs=near)
        assert record["epoch"] == epochs


def figures(result):
    return result.alone, [
        [{k: v for k, v in record.items() if k != "seconds"} for record in run] for run in result.runs
    ]


@pytest.mark.parametrize("killed_at", [2, 3, 4, 5, 6])
def test_it_goes_on_where_it_stopped(killed_at, tmp_path):
    """Killed while the teacher or any student is made, then resumed."""
    options = {
        "teacher": TEACHER, "student": STUDENT, "labels": LABELS, "runs": 2, "seed": 3, "progress": False,
    }  # fmt: skip
    whole = teacher_sweep(big, small, data(), [1, 2], **options)
    calls = 0

    def counted(make):
        def made():
            nonlocal calls
            calls += 1
            if calls == 2 + killed_at:  # the first two are for the settings
                raise KeyboardInterrupt
            return make()

        return made

    with pytest.raises(KeyboardInterrupt):
        teacher_sweep(counted(big), counted(small), data(), [1, 2], folder=tmp_path, **options)
    resumed = teacher_sweep(big, small, data(), [1, 2], folder=tmp_path, **options)
    assert figures(resumed) == figures(whole)
    with pytest.raises(ValueError, match=r"temperature was 4\.0 and is 2\.0"):
        teacher_sweep(big, small, data(), [1, 2], folder=tmp_path, temperature=2.0, **options)


def test_a_teacher_killed_in_training_goes_on(tmp_path, monkeypatch):
    options = {"teacher": TEACHER, "student": STUDENT, "labels": LABELS, "seed": 3, "progress": False}
    whole = teacher_sweep(big, small, data(), [2, 4], **options)
    from sdfast import _files

    write, written = _files.write_atomically, []

    def stopping(path, content):
        written.append(path.name)
        if len([name for name in written if name == "run-1-teacher.pt"]) == 4:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(_files, "write_atomically", stopping)
    with pytest.raises(KeyboardInterrupt):
        teacher_sweep(big, small, data(), [2, 4], folder=tmp_path, **options)
    monkeypatch.undo()
    assert (tmp_path / "run-1-teacher-2.pt").exists()
    assert not (tmp_path / "run-1-teacher-4.pt").exists()
    assert figures(teacher_sweep(big, small, data(), [2, 4], folder=tmp_path, **options)) == figures(whole)


def test_the_best_epoch_and_the_picture():
    pytest.importorskip("matplotlib")
    result = teacher_sweep(big, small, data(), [1, 4], teacher=TEACHER, student=STUDENT, runs=2, progress=False)
    means = [mean for mean, _ in result.mean_and_deviation("student_accuracy")]
    assert means[[1, 4].index(result.best_epoch)] == max(means)
    (axes,) = result.figure().axes
    assert axes.lines[0].get_xdata().tolist() == [1, 4]
    assert axes.get_xscale() == "log"
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([100 * mean for mean in means])


def test_a_run_that_fails_loses_no_other():
    calls = 0

    def sometimes_bad():
        nonlocal calls
        calls += 1
        model = small()
        if calls == 2:
            torch.nn.init.constant_(model[0].weight, float("nan"))
        return model

    result = teacher_sweep(big, sometimes_bad, data(), [1], teacher=TEACHER, student=STUDENT, runs=2, progress=False)
    assert list(result.failures) == [1]
    assert len(result.runs) == len(result.alone) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": [2, 1]}, "epochs: got [2, 1], wanted increasing integers"),
        ({"epochs": []}, "epochs: got []"),
        ({"epochs": [0, 1]}, "wanted increasing integers from 1 on"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"alpha": 1.5}, "alpha: got 1.5"),
        ({"runs": 0}, "runs: got 0"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        teacher_sweep(**{"make_teacher": big, "make_student": small, "data": data(), "epochs": [1], **change})
    assert message in str(caught.value)
