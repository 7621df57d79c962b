"""Trainings of two processes, one of which dies by kill -9, and that are started again; run by test_torchrun.py.

``torchrun --nproc-per-node 2 torchrun_training.py FOLDER START``: in start 0 one process dies in a training whose
method remembers something of each sample, in start 1 the other one in a training of two networks. In start 2 each
process leaves a file of what differs from trainings that nothing interrupted, bit for bit: a file of nothing.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from sdfast import baselines
from sdfast.train import SelfDistiller

EPOCHS, ROWS, CLASSES = 4, 45, 4
INPUTS = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))
RANK, START = int(os.environ["RANK"]), int(sys.argv[2])
KINDS = ("elr", "co-teaching")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def network():
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, CLASSES)]
    return nn.Sequential(*layers)


class Mortal(nn.Module):
    """A network that dies in its n-th forward pass of training."""

    def __init__(self, layers, passes):
        super().__init__()
        self.layers, self.passes = layers, passes

    def forward(self, inputs):
        if self.training:
            self.passes -= 1
            if self.passes == 0:
                die()
        return self.layers(inputs)


def prepared(kind, seed, passes):
    """The trainer and its loader, with dropout and order from the process's own random states."""
    torch.manual_seed(seed)
    layers = baselines.TwoNetworks(network(), network()) if kind == "co-teaching" else network()
    model = nn.parallel.DistributedDataParallel(Mortal(layers, passes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options = {"method": baselines.co_teaching(0.3, 2)}
    if kind == "elr":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=3 * EPOCHS)
        options = {"method": baselines.elr(ROWS, CLASSES), "amp": "bfloat16", "scheduler": scheduler}
        options["scheduler_step"] = "step"
    data = TensorDataset(INPUTS, LABELS, torch.arange(ROWS))
    return SelfDistiller(model, optimizer, **options), DataLoader(data, 8, sampler=DistributedSampler(data, seed=3))


def train(kind, seed, checkpoint=None, passes=0):
    """What a process has at the end."""
    distiller, loader = prepared(kind, seed, passes)
    seen = [(INPUTS, LABELS)] if RANK == 0 else None  # one process evaluates, the other has no need to
    history = distiller.fit(loader, EPOCHS, eval=seen, checkpoint=checkpoint, progress=False, clean_labels=LABELS)
    return {
        "records": [record._replace(seconds=0.0) for record in history],
        "model": distiller.model.state_dict(),
        "optimizer": distiller.optimizer.state_dict()["state"],
        "method": {} if distiller.method is None else distiller.method.state_dict(),
    }


def identical(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(identical(first[key], second[key]) for key in first)
    return first == second


def write_then_die(number):
    """`os.replace` that dies in its n-th call, the new file beside the old one."""
    replace, calls = os.replace, 0

    def replaced(*arguments):
        nonlocal calls
        calls += 1
        if calls == number:
            die()
        replace(*arguments)

    return replaced


def main(folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {}
    for number, kind in enumerate(KINDS):
        passes = 0
        if number == START == 0:  # the second process, in the middle of the second epoch
            passes = 5 * RANK
        elif number == START and RANK == 0:  # the first one, which writes
            os.replace = write_then_die(3)
        seed = 100 * START + RANK  # other first weights and random states in every start
        found[kind] = train(kind, seed, folder / f"{kind}.pt", passes)
    different = []
    for number, kind in enumerate(KINDS):
        wanted = train(kind, 100 * number + RANK)
        different += [f"{kind}: {name}" for name in wanted if not identical(found[kind][name], wanted[name])]
    (folder / f"different-{RANK}").write_text("\n".join(different))
    torch.distributed.barrier()
    os._exit(0)  # an interpreter that ends may abort in gloo's own threads


if __name__ == "__main__":
    main(Path(sys.argv[1]))
