"""A training that dies by kill -9 at chosen moments and is started again; run by test_checkpoint.py.

``python killed_training.py batches|dataloader FOLDER`` prints one line a start and exits with 0 where the last weights,
momenta and records are bitwise those of a training that nothing interrupted.
"""

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # noqa: F401  # optimizers import it when first used: here once, not in every process
from torch import nn
from torch.utils.data import DataLoader, Dataset

import sdfast
from sdfast.data import Batches
from sdfast.train import SelfDistiller

EPOCHS = 7
ROWS = 60
INPUTS = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(4, (ROWS,), generator=torch.Generator().manual_seed(1))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Augmented(Dataset):
    """Rows blurred with numbers of three random generators."""

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        blur = 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return INPUTS[row] + blur, LABELS[row], row


class Mortal(nn.Module):
    """A network with dropout that dies in its n-th forward pass of training."""

    def __init__(self, passes):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
        self.passes = passes

    def forward(self, inputs):
        if self.training:
            self.passes -= 1
            if self.passes == 0:
                die()
        return self.layers(inputs)


def on_call(number, function, before):
    """`function` that dies in its n-th call: before it, or after."""
    calls = 0

    def counted(*arguments):
        nonlocal calls
        calls += 1
        if calls == number and before:
            die()
        result = function(*arguments)
        if calls == number:
            die()
        return result

    return counted


def loader(kind):
    if kind == "batches":
        return Batches(INPUTS, LABELS, 8, seed=3, with_indices=True)
    if kind == "dataloader":
        return DataLoader(Augmented(), 8, shuffle=True)  # the order comes from torch's global generator
    return DataLoader(Augmented(), 8, shuffle=True, generator=torch.Generator().manual_seed(7))


def train(kind, checkpoint, seed, passes=0):
    for seeder in (random.seed, np.random.seed, torch.manual_seed):
        seeder(seed)
    model = Mortal(passes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=8 * EPOCHS)
    distiller = SelfDistiller(
        model,
        optimizer,
        alpha=sdfast.AdaptiveAlpha(1.0),
        scheduler=scheduler,
        scheduler_step="step",
        amp="bfloat16" if kind == "batches" else None,
    )
    history = distiller.fit(
        loader(kind),
        EPOCHS,
        eval=DataLoader(Augmented(), 30),
        checkpoint=checkpoint,
        progress=False,
        clean_labels=LABELS,
    )
    records = [record._replace(seconds=0.0) for record in history]
    torch.save((records, model.state_dict(), optimizer.state_dict()["state"]), f"{checkpoint}.end")


def in_child(*arguments, prepare=lambda: None):
    """The signal by which a forked process of this training ended, or 0."""
    child = os.fork()
    if child == 0:
        prepare()
        train(*arguments)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        sys.exit("a training failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def identical(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(identical(first[key], second[key]) for key in first)
    return first == second


def main(kind, folder):
    torch.set_num_threads(1)  # forked processes have no thread pool
    whole, broken = folder / "whole.pt", folder / "broken.pt"
    if in_child(kind, whole, 0):
        sys.exit("the uninterrupted training was killed")

    def replacing(number, before):
        return lambda: setattr(os, "replace", on_call(number, os.replace, before))

    def syncing(number):
        return lambda: setattr(os, "fsync", on_call(number, os.fsync, True))

    # Each start has other seeds and other first weights: all must come from the checkpoint.
    deaths = [
        ((kind, broken, 0, 12), lambda: None),  # in the middle of the second epoch
        ((kind, broken, 1), syncing(1)),  # with an unfinished temporary file
        ((kind, broken, 2), replacing(2, True)),  # with a whole temporary file beside the old checkpoint
        ((kind, broken, 3), replacing(1, False)),  # right after the rename
        ((kind, broken, 4, 17), lambda: None),
    ]
    for number, (arguments, prepare) in enumerate(deaths):
        ended = in_child(*arguments, prepare=prepare)
        print(f"start {number} ended by signal {ended}")
        if ended != signal.SIGKILL:
            sys.exit("it should have been killed")
    in_child(kind, broken, 5)
    ends = [torch.load(f"{path}.end", weights_only=False) for path in (whole, broken)]
    for name, first, second in zip(("records", "weights", "optimizer"), *ends, strict=True):
        if not identical(first, second):
            sys.exit(f"the {name} differ")
    if torch.load(broken, weights_only=True)["step"] != 8 * EPOCHS:
        sys.exit("the steps differ")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
