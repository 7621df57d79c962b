"""Processes that share a Gram matrix, some of which fail on purpose."""

import datetime
import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from sdfast.ntk import checkpoint, gram

OPTIONS = {"outputs": "trace", "batch_size": 10}


class Faulty(nn.Sequential):
    """Does what it is told to when it is called for the n-th time."""

    calls, fault = 0, None

    def forward(self, x):
        Faulty.calls += 1
        if Faulty.fault is not None and Faulty.calls > 40:
            Faulty.fault()
        return super().forward(x)


class MindsItsFormat(nn.Module):
    """Run with its channels last on many samples it fails in one process, and takes another path in a second one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, 2), nn.Linear(36, 2)
        self.formats, self.rank = [], None

    def forward(self, x):
        self.formats.append(x.is_contiguous(memory_format=torch.channels_last))
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        if self.rank is not None and self.rank > 0 and len(x) > 3 and not x.is_contiguous():
            if self.rank == 1:
                raise OSError("strides")
            x = x + 0
        return self.last(x.flatten(1))


def convolutions_and_pictures():
    generator = torch.Generator().manual_seed(0)
    model = MindsItsFormat()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model, torch.randn(50, 3, 9, 9, generator=generator)


def minds_its_format(rank, group, folder):
    """The same matrix twice; how the model was called goes to the folder."""
    model, pictures = convolutions_and_pictures()
    model.rank = rank
    first = gram(model, pictures, group=group, **OPTIONS)
    tried, model.formats = any(model.formats), []
    again = gram(model, pictures, group=group, **OPTIONS)
    (folder / f"tried.{rank}.txt").write_text(json.dumps([tried, any(model.formats)]))
    return torch.stack([first, again])


def model_and_samples():
    generator = torch.Generator().manual_seed(0)
    model = Faulty(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 6)
    return model, torch.randn(50, 6, generator=generator)


def cases(rank, folder):
    """What each of the tests computes; `None` where a process ends by itself."""
    model, x = model_and_samples()
    world = torch.distributed.group.WORLD
    yield "same", lambda: gram(model, x, group=world, **OPTIONS)
    yield "small", lambda: gram(model, x, group=world, memory=20_000, **OPTIONS)
    yield "columns", lambda: gram(model, x, x[:7] * 2, group=world, **OPTIONS)
    yield "out", lambda: gram(model, x, group=world, out=torch.full((50, 100), torch.nan)[:, ::2], **OPTIONS)
    yield "argument", lambda: gram(model, x, group=world, params=["none"] if rank else None, **OPTIONS)
    yield "bad", lambda: gram(model, x if rank == 0 else x.double(), group=world, checkpoint=folder / "b.pt", **OPTIONS)
    yield "format", lambda: minds_its_format(rank, world, folder)
    yield "differ", lambda: gram(model, x * (1 + rank), group=world, **OPTIONS)
    yield "checkpoint", lambda: gram(model, x, group=world, memory=20_000, checkpoint=folder / "c.pt", **OPTIONS)


def work(asked, folder, rank, world):
    """One process: what it computes is left in the folder, or why not."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    checkpoint.SHARE = 0  # every group is written
    if asked in ("die", "raise") and rank == 1:
        Faulty.fault = (lambda: os._exit(9)) if asked == "die" else (lambda: (_ for _ in ()).throw(OSError("disk")))
    if asked == "continue":
        torch.save(torch.load(folder / f"c.pt.{rank}")["done"], folder / f"before.{rank}.pt")
    if asked == "broken" and rank == 1:
        (folder / "c.pt.1").write_bytes(b"half a file")
    wanted = ["checkpoint"] if asked in ("die", "raise", "continue", "broken") else asked.split(",")
    for name, compute in cases(rank, folder):
        if name not in wanted:
            continue
        try:
            torch.save(compute(), folder / f"{name}.{rank}.pt")
        except (RuntimeError, ValueError, OSError) as error:
            (folder / f"{name}.{rank}.txt").write_text(f"{type(error).__name__}: {error}")
            os._exit(1)
    torch.distributed.destroy_process_group()
    os._exit(0)


def share(asked, folder, world):
    """Forks the processes, so that torch is imported once; their exit codes. None lives longer than a minute."""
    (folder / "store").unlink(missing_ok=True)
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            try:
                work(asked, folder, rank, world)
            finally:  # never back into the loop of the parent
                os._exit(2)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main():
    """Scenarios as ``name:processes:folder``; prints the exit codes of each."""
    torch.set_num_threads(1)
    for scenario in sys.argv[1:]:
        asked, world, folder = scenario.split(":")
        Path(folder).mkdir(exist_ok=True)
        print(json.dumps(share(asked, Path(folder), int(world))), flush=True)


if __name__ == "__main__":
    main()
