"""distill_rounds: against the chain written by hand, after an interruption, and where a run fails."""

import statistics

import pytest
import torch
import torch.nn.functional as F

from sdfast.data import Dataset, flip_labels
from sdfast.models import mlp
from sdfast.train import Recipe, distill_rounds
from sdfast.train.recipe import derived_seed

RECIPE = Recipe(epochs=4, batch_size=16, learning_rate=0.1)


def data(rows=60):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 3
    inputs = torch.randn(rows, 5, generator=generator) + 2 * F.one_hot(labels, 5)
    return Dataset(inputs[20:], labels[20:], inputs[:20], labels[:20], 3, "tiny")


def noisy(seed=0):
    return flip_labels(data().train_labels, 0.4, 3, generator=torch.Generator().manual_seed(seed)).labels


def make():
    return mlp((5, 8, 3))


def loss_by_hand(name, logits, targets):
    if name == "mse":
        return F.mse_loss(logits, targets)
    if name == "brier":
        return ((logits.softmax(1) - targets) ** 2).sum(1).mean()
    return -(targets * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("loss", ["brier", "cross_entropy", "mse"])
def test_a_chain_is_the_one_written_by_hand(loss):
    """Two rounds in plain torch, same seeds and batches; float32 paths may part by rounding, hence the tolerance."""
    from sdfast.data import Batches

    tiny, labels = data(), noisy()
    result = distill_rounds(make, tiny, 2, loss, 1, recipe=RECIPE, labels=labels, seed=7, progress=False)
    targets = F.one_hot(labels, 3).float()
    for round in (1, 2):
        seed = derived_seed(7, 0, round)
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        batches = Batches(tiny.train_inputs, targets, 16, seed=seed)
        for _ in range(4):
            for x, y in batches:
                optimizer.zero_grad()
                loss_by_hand(loss, model(x), y).backward()
                optimizer.step()
            scheduler.step()
        with torch.no_grad():
            logits = model(tiny.train_inputs)
            targets = logits if loss == "mse" else logits.softmax(1)
            record = result.runs[0][round - 1]
            near = 1.01 / len(logits)  # one row may stand on the border
            given = float((logits.argmax(1) == labels).double().mean())
            assert record["train_accuracy"] == pytest.approx(given, abs=near)
            clean = float((logits.argmax(1) == tiny.train_labels).double().mean())
            assert record["clean_accuracy"] == pytest.approx(clean, abs=near)
            test = float((model(tiny.test_inputs).argmax(1) == tiny.test_labels).double().mean())
            assert record["test_accuracy"] == pytest.approx(test, abs=1.01 / 20)


def figures(result):
    """All but the times."""
    return [[{k: v for k, v in record.items() if k != "seconds"} for record in run] for run in result.runs]


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Killed in the middle of a round, then resumed and made longer: the figures of an uninterrupted sweep."""
    options = {"recipe": RECIPE, "labels": [noisy(0), noisy(1)], "seed": 3, "progress": False}
    whole = distill_rounds(make, data(), 3, "brier", 2, **options)
    calls = 0

    def make_until_killed():
        nonlocal calls
        calls += 1
        if calls == 6:  # after one for the settings: the second run's second round
            raise KeyboardInterrupt
        return make()

    with pytest.raises(KeyboardInterrupt):
        distill_rounds(make_until_killed, data(), 3, "brier", 2, folder=tmp_path, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-1.pt", "run-2.pt"]
    resumed = distill_rounds(make, data(), 3, "brier", 2, folder=tmp_path, **options)
    assert figures(resumed) == figures(whole)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert figures(distill_rounds(make, data(), 2, "brier", 2, folder=tmp_path, **options)) == [
        run[:2] for run in figures(whole)
    ]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    longer = distill_rounds(make, data(), 4, "brier", 2, folder=tmp_path, **options)
    assert figures(longer) == figures(distill_rounds(make, data(), 4, "brier", 2, **options))


def test_other_settings_are_refused(tmp_path):
    options = {"recipe": RECIPE, "progress": False, "folder": tmp_path}
    distill_rounds(make, data(), 1, "brier", 1, **options)
    for change, said in (
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"labels": noisy()}, "labels was"),
        ({"recipe": Recipe(epochs=5)}, "recipe was"),
    ):
        with pytest.raises(ValueError, match=said):
            distill_rounds(make, data(), 1, "brier", 1, **{**options, **change})
    with pytest.raises(ValueError, match="loss was 'brier' and is 'mse'"):
        distill_rounds(make, data(), 1, "mse", 1, **options)
    with pytest.raises(ValueError, match="model was"):
        distill_rounds(lambda: mlp((5, 9, 3)), data(), 1, "brier", 1, **options)
    (tmp_path / "run-1.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"run-1\.pt is no readable run"):
        distill_rounds(make, data(), 1, "brier", 1, **options)


def test_a_run_that_fails_loses_no_other():
    labels = [noisy(), noisy(), noisy()]
    calls = 0

    def make_one_bad():
        nonlocal calls
        calls += 1
        model = make()
        if calls == 3:  # the second run's first round
            torch.nn.init.constant_(model[0].weight, float("nan"))
        return model

    result = distill_rounds(make_one_bad, data(), 1, "brier", 3, recipe=RECIPE, labels=labels, progress=False)
    assert len(result.runs) == 2
    assert list(result.failures) == [2]
    assert "loss of epoch 1 is nan" in result.failures[2]
    with pytest.raises(FloatingPointError):
        distill_rounds(make, data(), 1, "mse", 2, recipe=Recipe(epochs=20, learning_rate=1e9), progress=False)


def test_means_deviations_and_the_best_round():
    result = distill_rounds(make, data(), 3, "brier", 3, recipe=RECIPE, labels=noisy(), progress=False)
    columns = list(zip(*result.curve("test_accuracy"), strict=True))
    assert len(result) == 3
    assert result.mean_and_deviation("test_accuracy") == [
        (pytest.approx(statistics.mean(column)), pytest.approx(statistics.stdev(column))) for column in columns
    ]
    means = [statistics.mean(column) for column in columns]
    assert means[result.best_round - 1] == max(means)
    pytest.importorskip("matplotlib")
    test, train = result.figure().axes
    assert test.lines[0].get_ydata().tolist() == pytest.approx([100 * mean for mean in means])
    band = test.collections[0].get_paths()[0].vertices[:, 1]
    mean, deviation = max(result.mean_and_deviation("test_accuracy"), key=sum)
    assert band.max() == pytest.approx(100 * (mean + deviation))
    assert len(train.lines) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "hinge"}, "loss: got 'hinge', wanted one of 'brier', 'cross_entropy', 'mse'"),
        ({"rounds": 0}, "rounds: got 0"),
        ({"runs": True}, "runs: got True"),
        ({"labels": [noisy()]}, "labels: got 1 tensors for 2 runs"),
        ({"labels": noisy()[:5]}, "labels: got shape (5,) of torch.int64, wanted classes of shape (40,)"),
        ({"labels": noisy().float()}, "of torch.float32, wanted classes"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        distill_rounds(**{"make_model": make, "data": data(), "rounds": 1, "loss": "brier", "runs": 2, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"), [("epochs", 0), ("batch_size", 1.5), ("momentum", -1), ("schedule", "step")]
)
def test_bad_recipe(option, value):
    with pytest.raises(ValueError, match=f"{option}: got {value!r}"):
        Recipe(**{option: value})
