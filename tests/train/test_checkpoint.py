"""A killed training continues as if nothing had happened, and a checkpoint of other settings is refused."""

import errno
import io
import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import sdfast
from sdfast.data import Batches
from sdfast.train import SelfDistiller

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))


def fit(
    path, epochs=4, train=None, lr=0.1, seed=0, schedule=None, width=8, callbacks=(), optimizer=torch.optim.SGD,
    eval=None, **options,
):  # fmt: skip
    for seeder in (random.seed, np.random.seed, torch.manual_seed):
        seeder(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3))
    chosen = optimizer(model.parameters(), lr=lr)
    scheduler = None if schedule is None else schedule(chosen)
    distiller = SelfDistiller(model, chosen, **{"alpha": 0.5, "scheduler": scheduler, **options})
    train = Batches(X, Y, 8) if train is None else train
    history = distiller.fit(train, epochs, eval, checkpoint=path, progress=False, callbacks=callbacks)
    return model.state_dict(), history


def assert_same(first, second):
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
@pytest.mark.parametrize("kind", ["batches", "dataloader", "dataloader with its own generator"])
def test_killed_five_times_it_ends_in_the_same_bits(kind, tmp_path):
    script = Path(__file__).with_name("killed_training.py")
    done = subprocess.run([sys.executable, script, kind, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ended by signal 9") == 5


SCHEDULES = {
    "none": None,
    "step": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3]),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    "warm-up": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1, 1, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stopped_and_continued_it_ends_in_the_same_bits(schedule, optimizer, tmp_path):
    def interrupt(distiller, history):
        if len(history) == 3:
            raise KeyboardInterrupt

    options = {"schedule": SCHEDULES[schedule], "optimizer": optimizer}
    whole, _ = fit(None, **options)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run.pt", callbacks=[interrupt], **options)
    continued, history = fit(tmp_path / "run.pt", seed=9, **options)
    assert_same(whole, continued)
    assert history["epoch"] == [1, 2, 3, 4]
    again, same = fit(tmp_path / "run.pt", seed=10, **options)  # nothing is left to do
    assert_same(whole, again)
    assert same == history


def test_a_finished_training_may_be_made_longer(tmp_path):
    whole, _ = fit(None, epochs=6)
    fit(tmp_path / "run.pt", epochs=2)
    longer, history = fit(tmp_path / "run.pt", epochs=6)
    assert_same(whole, longer)
    assert len(history) == 6


def test_a_training_that_a_callback_ended_stays_ended(tmp_path):
    _, first = fit(tmp_path / "run.pt", callbacks=[lambda distiller, history: len(history) == 2])
    _, second = fit(tmp_path / "run.pt", callbacks=[lambda distiller, history: False])
    assert len(first) == len(second) == 2


class OneBatch:
    """Batches that nothing can look at without going through them."""

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        yield self.batch


def test_a_nan_epoch_is_not_checkpointed(tmp_path):
    path = tmp_path / "run.pt"
    fit(path, epochs=1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"train\.data differs"):
        fit(path, epochs=2, train=Batches(X * float("nan"), Y, 8))
    train = OneBatch((X, Y))
    other = tmp_path / "other.pt"
    fit(other, epochs=1, train=train)
    saved = other.read_bytes()
    train.batch = (X * float("nan"), Y)
    with pytest.raises(FloatingPointError, match="the loss of epoch 2 is nan"):
        fit(other, epochs=2, train=train)
    assert path.read_bytes() == before
    assert other.read_bytes() == saved


def test_a_loader_with_a_state_of_its_own_is_saved(tmp_path):
    class Stateful(list):
        position = 0

        def __iter__(self):
            self.position += 1
            return iter([(X * self.position, Y)])

        def state_dict(self):
            return {"position": self.position}

        def load_state_dict(self, state):
            self.position = state["position"]

    whole, _ = fit(None, train=Stateful([0]))
    fit(tmp_path / "run.pt", epochs=2, train=Stateful([0]))
    continued, _ = fit(tmp_path / "run.pt", train=Stateful([0]))
    assert_same(whole, continued)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"alpha": 0.25}, "alpha was '0.5' and is '0.25'"),
        ({"alpha": sdfast.AdaptiveAlpha(1.0)}, "alpha was '0.5' and is 'AdaptiveAlpha(1.0, sync=False)'"),
        ({"lr": 0.2}, "optimizer[0].lr was 0.1 and is 0.2"),
        ({"optimizer": torch.optim.Adam}, "optimizer was 'SGD' and is 'Adam'"),
        ({"width": 9}, "model differs"),
        ({"loss": "kl"}, "loss was 'cross_entropy' and is 'kl'"),
        ({"label_smoothing": 0.1}, "label_smoothing was '0.0' and is '0.1'"),
        ({"class_weight": torch.ones(3)}, "class_weight was None and is '[1.0, 1.0, 1.0]'"),
        ({"schedule": lambda optimizer: lr_scheduler.StepLR(optimizer, 2)}, "scheduler was None and is 'StepLR'"),
        ({"amp": "bfloat16"}, "amp was None and is 'bfloat16'"),
        ({"eval": [(X, Y)]}, "eval was False and is True"),
        ({"train": Batches(X, Y, 10)}, "train.batch_size was 8 and is 10"),
        ({"train": Batches(X, Y, 8, seed=1)}, "train.seed was 0 and is 1"),
        ({"train": Batches(X, Y.flip(0), 8)}, "train.data differs"),
        ({"train": DataLoader(TensorDataset(X, Y), 8)}, "train was 'Batches' and is 'DataLoader'"),
    ],
)
def test_other_settings_are_refused_by_name(changes, difference, tmp_path):
    path = tmp_path / "run.pt"
    fit(path, epochs=1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="belongs to a training with other settings") as caught:
        fit(path, epochs=2, **changes)
    assert difference in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_fewer_epochs_than_done_are_refused(tmp_path):
    fit(tmp_path / "run.pt", epochs=3)
    with pytest.raises(ValueError, match=r"epochs: got 2, but the checkpoint .* has 3 behind it"):
        fit(tmp_path / "run.pt", epochs=2)


def damaged(whole):
    """What may become of a file: empty, of other bytes, cut short, or with a byte changed."""
    yield b""
    yield from (
        b"no checkpoint at all",
        b"PK\x03\x04 cut short",
        b"\x80\x02",
        b"\x80\x02}q\x00.",
        b"q\x01" * 20,
        b"\0" * 99,
    )
    yield from (whole[:length] for length in range(1, len(whole), len(whole) // 40))
    for position in range(0, len(whole), len(whole) // 150):
        yield whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :]


def test_a_damaged_file_is_one_line_that_names_it(tmp_path):
    path = tmp_path / "run.pt"
    fit(path, epochs=1)
    whole = path.read_bytes()
    weights, _ = fit(path, epochs=1)
    refused = 0
    for content in damaged(whole):
        path.write_bytes(content)
        try:  # a changed byte in the file's padding changes nothing
            assert_same(weights, fit(path, epochs=1, seed=9)[0])
        except ValueError as error:
            assert "run.pt" in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
    assert refused > 100
    path.write_bytes(b"no checkpoint at all")
    with pytest.raises(ValueError, match=r"run\.pt is no readable checkpoint \(UnpicklingError\); delete it to start"):
        fit(path)
    with pytest.raises(ValueError, match=r"checkpoint: .* is no readable checkpoint \(Is a directory\)"):
        fit(tmp_path)


@pytest.mark.parametrize("part", ["parts", "history", "settings", "functions", "random", "generators", "step"])
def test_a_file_that_lacks_or_garbles_a_part_is_refused(part, tmp_path):
    path = tmp_path / "run.pt"
    fit(path, epochs=1)
    state = torch.load(path)
    whole = state.pop(part)
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"run\.pt is no readable checkpoint \(it lacks {part}\)"):
        fit(path)
    if part != "step":
        torch.save({**state, part: "garbled" if isinstance(whole, dict) else {"garbled": 1}}, path)
        with pytest.raises(ValueError, match=r"run\.pt is no readable checkpoint \("):
            fit(path)


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint: the folder of .*run\.pt does not exist; make it first"):
        fit(tmp_path / "none" / "run.pt")


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"is no checkpoint of SelfDistiller\.fit"):
        fit(tmp_path / "run.pt")


def test_a_file_without_an_epoch_stands_in_nobodys_way(tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(IndexError):
        fit(path, train=Batches(X, Y + 7, 8))
    assert path.exists()
    repaired, _ = fit(path, lr=0.05)
    assert_same(repaired, fit(None, lr=0.05)[0])


class Rows(Dataset):
    """A data set that only its own code can read; `blur` draws from the global generators."""

    def __init__(self, labels, scale=1.0, blur=False, generator=None):
        self.labels_of_rows, self.scale, self.blur, self.generator = labels, scale, blur, generator

    def __len__(self):
        return len(X)

    def __getitem__(self, row):
        noise = torch.randn(3) * random.random() * float(np.random.rand()) if self.blur else 0
        if self.generator is not None:
            noise = torch.randn(3, generator=self.generator)
        return self.scale * X[row] + noise, self.labels_of_rows[row]


class Targets(Rows):
    @property
    def targets(self):
        return self.labels_of_rows.tolist()


ONE_WRONG = Y.clone()
ONE_WRONG[2] = (Y[2] + 1) % 3  # a row that is not among those looked at


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (lambda: TensorDataset(X, Y), lambda: TensorDataset(X, ONE_WRONG)),
        (lambda: Subset(TensorDataset(X, Y), range(8, 32)), lambda: Subset(TensorDataset(X, Y), range(9, 33))),
        (
            lambda: ConcatDataset([TensorDataset(X, Y), Subset(TensorDataset(X, Y), [1, 2])]),
            lambda: ConcatDataset([TensorDataset(X, Y), Subset(TensorDataset(X, ONE_WRONG), [1, 2])]),
        ),
        (lambda: Rows(Y), lambda: Rows(Y, scale=1.001)),
        (lambda: Rows(Y, blur=True), lambda: Rows(Y, scale=1.001, blur=True)),
        (lambda: Targets(Y), lambda: Targets(ONE_WRONG)),
    ],
    ids=["tensors", "subset", "concatenation", "rows", "random rows", "targets"],
)
def test_other_data_in_a_loader_are_refused(make, changed, workers, tmp_path):
    path = tmp_path / "run.pt"

    def loader(dataset):
        return DataLoader(dataset, 8, shuffle=True, num_workers=workers)

    fit(path, epochs=1, train=loader(make()))
    with pytest.raises(ValueError, match=r"other settings: train\.data differs; give it those"):
        fit(path, epochs=2, train=loader(changed()))
    continued, _ = fit(path, epochs=2, seed=9, train=loader(make()))
    assert_same(fit(None, epochs=2, train=loader(make()))[0], continued)  # looking draws no random number


def test_other_batches_in_a_list_are_refused(tmp_path):
    fit(tmp_path / "run.pt", epochs=1, train=[(X, Y)])
    with pytest.raises(ValueError, match=r"train\.data differs"):
        fit(tmp_path / "run.pt", train=[(X, ONE_WRONG)])
    fit(tmp_path / "run.pt", train=[(X.clone(), Y.clone())])


def test_rows_that_change_from_look_to_look_are_not_compared(tmp_path):
    generator = torch.Generator()
    fit(tmp_path / "run.pt", epochs=1, train=DataLoader(Rows(Y, generator=generator), 8))
    fit(tmp_path / "run.pt", epochs=2, train=DataLoader(Rows(Y, generator=generator), 8))


def test_a_data_set_that_numbers_do_not_address_trains(tmp_path):
    class Named(Rows):
        def __getitem__(self, name):
            return super().__getitem__({"one": 1, "two": 2}[name])

    for epochs in (1, 2):
        loader = DataLoader(Named(Y), 2, sampler=["one", "two"])
        fit(tmp_path / "run.pt", epochs=epochs, train=loader)


def test_an_own_fingerprint_decides(tmp_path):
    batches = OneBatch((X, Y))
    batches.fingerprint = lambda: "version 1"
    fit(tmp_path / "run.pt", epochs=1, train=batches)
    batches.fingerprint = lambda: "version 2"
    with pytest.raises(ValueError, match=r"train\.data differs"):
        fit(tmp_path / "run.pt", train=batches)


def falling(start):
    return lambda epoch, step: start - 0.01 * step


class Falling:
    def __init__(self, start):
        self.start = start

    def __call__(self, epoch, step):
        return torch.tensor(self.start - 0.01 * step)


@pytest.mark.parametrize("make", [falling, Falling, lambda start: partial(lambda start, epoch, step: start, start)])
def test_another_function_alpha_is_refused_by_its_values(make, tmp_path):
    path = tmp_path / "run.pt"
    fit(path, epochs=2, alpha=make(0.9))
    with pytest.raises(ValueError, match=r"other settings: alpha\(0, 0\) was 0\.[89]\d* and is 0\.[78]"):
        fit(path, epochs=3, alpha=make(0.8))
    elsewhere, _ = fit(path, epochs=3, seed=9, alpha=make(0.9))
    assert_same(fit(None, epochs=3, alpha=make(0.9))[0], elsewhere)


def test_a_function_alpha_may_be_written_otherwise_and_may_draw(tmp_path):
    fit(tmp_path / "run.pt", epochs=1, alpha=falling(0.9))
    fit(tmp_path / "run.pt", epochs=2, alpha=lambda e, s: 0.9 - 0.01 * s)
    drawing = {"alpha": lambda epoch, step: float(torch.rand(()))}
    fit(tmp_path / "drawing.pt", epochs=1, **drawing)
    continued, _ = fit(tmp_path / "drawing.pt", epochs=2, seed=9, **drawing)
    assert_same(fit(None, epochs=2, **drawing)[0], continued)
    values = [0.5, 0.6]  # of two epochs: it has no value beyond the end
    fit(tmp_path / "list.pt", epochs=2, alpha=lambda epoch, step: values[epoch])
    fit(tmp_path / "list.pt", epochs=2, alpha=lambda epoch, step: values[epoch])


def test_another_alpha_tensor_is_refused_by_its_last_digit(tmp_path):
    fit(tmp_path / "run.pt", epochs=1, alpha=torch.tensor(0.7))
    with pytest.raises(ValueError, match=r"alpha was '0\.6999"):
        fit(tmp_path / "run.pt", alpha=torch.tensor(0.700001))


@pytest.mark.parametrize("nested", [False, True])
def test_another_function_of_the_scheduler_is_refused(nested, tmp_path):
    def schedule(base):
        def make(optimizer):
            inner = lr_scheduler.LambdaLR(optimizer, lambda epoch: base**epoch)
            return lr_scheduler.ChainedScheduler([inner], optimizer) if nested else inner

        return make

    fit(tmp_path / "run.pt", epochs=2, schedule=schedule(0.9))
    with pytest.raises(ValueError, match=r"other settings: scheduler.*lr_lambda\[0\]\(1\) was 0\.9 and is 0\.8"):
        fit(tmp_path / "run.pt", schedule=schedule(0.8))
    fit(tmp_path / "run.pt", schedule=schedule(0.9))


def test_another_dropout_is_refused(tmp_path):
    def train(rate, epochs):
        model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(rate))
        distiller = SelfDistiller(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.5)
        distiller.fit(Batches(X, Y, 8), epochs, checkpoint=tmp_path / "run.pt", progress=False)

    train(0.2, 1)
    with pytest.raises(ValueError, match="other settings: model differs"):
        train(0.3, 2)


def test_no_name_in_a_refusal_begins_with_an_underscore(tmp_path):
    for schedule in SCHEDULES.values():
        fit(tmp_path / "run.pt", epochs=1, schedule=schedule)
        with pytest.raises(ValueError, match="other settings") as caught:
            fit(tmp_path / "run.pt", schedule=lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.2))
        names = str(caught.value).partition("other settings: ")[2]
        assert not re.search(r"(^|[.\s])_", names), names
        (tmp_path / "run.pt").unlink()


def test_numpys_numbers_are_saved_as_pythons(tmp_path):
    def schedule(optimizer):
        return lr_scheduler.StepLR(optimizer, np.int64(1), np.float64(0.5))

    options = {"lr": np.float64(0.1), "schedule": schedule}
    whole, _ = fit(None, **options)
    fit(tmp_path / "run.pt", epochs=2, **options)
    assert_same(whole, fit(tmp_path / "run.pt", seed=9, **options)[0])
    fit(tmp_path / "run.pt", lr=0.1, schedule=lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5))


@pytest.mark.parametrize("value", [np.zeros(2), lambda: 0])
def test_state_that_cannot_be_read_back_is_refused_before_training(value, tmp_path):
    class Odd(list):
        def state_dict(self):
            return {"value": value}

        def load_state_dict(self, state):
            pass

    path = tmp_path / "run.pt"
    with pytest.raises(NotImplementedError, match="checkpoint: the "):
        fit(path, train=Odd([(X, Y)]))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_the_systems_error_and_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    fit(path, epochs=1)
    before = path.read_bytes()

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() > 1000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr("sdfast._files.open", Full, raising=False)
    with pytest.raises(OSError, match="No space left on device"):
        fit(path, epochs=2)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"run.pt": before}


def test_persistent_workers_are_refused(tmp_path):
    loader = DataLoader(TensorDataset(X, Y), 8, num_workers=1, persistent_workers=True)
    with pytest.raises(NotImplementedError, match="checkpoint: persistent workers keep random states"):
        fit(tmp_path / "run.pt", train=loader)
