"""A killed training continues as if nothing had happened, and a checkpoint of other settings is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import sdfast
from sdfast.data import Batches
from sdfast.train import SelfDistiller

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))


def fit(
    path, epochs=4, train=None, lr=0.1, seed=0, schedule=None, width=8, callbacks=(), optimizer=torch.optim.SGD,
    eval=None, **options,
):  # fmt: skip
    torch.manual_seed(seed)
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


def test_a_nan_epoch_is_not_checkpointed(tmp_path):
    path = tmp_path / "run.pt"
    fit(path, epochs=1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"train\.data was"):
        fit(path, epochs=2, train=Batches(X * float("nan"), Y, 8))
    batch = [(X, Y)]
    other = tmp_path / "other.pt"
    fit(other, epochs=1, train=batch)
    saved = other.read_bytes()
    batch[0] = (X * float("nan"), Y)
    with pytest.raises(FloatingPointError, match="the loss of epoch 2 is nan"):
        fit(other, epochs=2, train=batch)
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
        ({"alpha": sdfast.AdaptiveAlpha(1.0)}, "alpha was '0.5' and is 'AdaptiveAlpha(ratio=1.0"),
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
        ({"train": Batches(X, Y.flip(0), 8)}, "train.data was"),
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


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 cut short"])
def test_a_broken_file_is_refused(content, tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint: .*run\.pt cannot be read as one: ") as caught:
        fit(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"is no checkpoint of SelfDistiller\.fit"):
        fit(tmp_path / "run.pt")


def test_persistent_workers_are_refused(tmp_path):
    loader = DataLoader(TensorDataset(X, Y), 8, num_workers=1, persistent_workers=True)
    with pytest.raises(NotImplementedError, match="checkpoint: persistent workers keep random states"):
        fit(tmp_path / "run.pt", train=loader)
