"""SelfDistiller around DistributedDataParallel: two gloo processes do what one process would on both their batches."""

import copy

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import sdfast
from sdfast.data import Dataset
from sdfast.train import Recipe, SelfDistiller, distill_rounds, teacher_sweep

WORLD, EPOCHS, CLASSES = 2, 3, 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def toy(rows):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)


def batches(kind, rank):
    """What a process trains on: a loader whose sampler pads 45 rows to 46, or batches of its own, the last uneven."""
    if kind == "sampler":
        data = TensorDataset(*toy(45))
        return DataLoader(data, 8, sampler=DistributedSampler(data, WORLD, rank, seed=3))
    inputs, labels = (part[rank::WORLD] for part in toy(45))  # 23 rows and 22: the last batches have 7 and 6
    return list(zip(inputs.split(8), labels.split(8), strict=True))


def train(rank, store, kind, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    model = nn.parallel.DistributedDataParallel(network())
    distiller = SelfDistiller(model, optimizer_of(model), alpha=sdfast.AdaptiveAlpha(1.0, sync=True))
    # The first process alone evaluates, in batches of its own number: no other may be waited for.
    evaluated = [part for _ in range(3) for part in [toy(20)]] if rank == 0 else None
    history = distiller.fit(batches(kind, rank), EPOCHS, eval=evaluated, progress=False)
    results[rank] = (history.to_dicts(), [value.tolist() for value in model.module.parameters()])
    torch.distributed.destroy_process_group()


def by_hand(kind):
    """One process: the mean of both processes' losses, each with its own batch statistics, α from all rows."""
    first = network()
    models = [first, copy.deepcopy(first)]  # which differ in the running statistics alone
    optimizer = optimizer_of(first)
    sums = [[0.0, 0] for _ in range(WORLD)]
    for epoch in range(EPOCHS):
        sums = [[0.0, 0] for _ in range(WORLD)]
        loaders = [batches(kind, rank) for rank in range(WORLD)]
        for loader in loaders:
            if kind == "sampler":
                loader.sampler.set_epoch(epoch)
        for parts in zip(*loaders, strict=True):
            models[1].load_state_dict(first.state_dict())
            outputs = [model(inputs) for model, (inputs, _) in zip(models, parts, strict=True)]
            right = sum((z.argmax(1) == y).sum() for z, (_, y) in zip(outputs, parts, strict=True))
            alpha = 1 - float(right) / sum(len(y) for _, y in parts)
            losses = [
                sdfast.self_distillation_loss(z, y, alpha, backend="reference")
                for z, (_, y) in zip(outputs, parts, strict=True)
            ]
            optimizer.zero_grad()
            models[1].zero_grad()
            for loss in losses:
                (loss / WORLD).backward()
            for mine, other in zip(first.parameters(), models[1].parameters(), strict=True):
                mine.grad += other.grad
            optimizer.step()
            for total, loss, (_, y) in zip(sums, losses, parts, strict=True):
                total[0] += loss.item() * len(y)
                total[1] += len(y)
    return list(first.parameters()), [loss / rows for loss, rows in sums]


def run(kind, tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(train, (str(tmp_path / "store"), kind, results), nprocs=WORLD)
        return [results[rank] for rank in range(WORLD)]


def check(kind, tmp_path):
    (history, weights), (others, same) = run(kind, tmp_path)
    assert weights == same  # in every bit
    wanted, losses = by_hand(kind)
    for value, other in zip(weights, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(value), other.detach(), rtol=1e-4, atol=1e-5)
    # A history is that of the process's own rows; α is that of all.
    torch.testing.assert_close([history[-1]["loss"], others[-1]["loss"]], losses, rtol=1e-4, atol=1e-5)
    return history, others


def test_two_processes_train_as_one(tmp_path):
    history, others = check("sampler", tmp_path)
    assert history[-1]["alpha"] == others[-1]["alpha"]
    assert all(record["eval_accuracy"] is not None for record in history)
    assert all(record["eval_accuracy"] is None for record in others)


def test_uneven_last_batches_weigh_by_process_not_by_row(tmp_path):
    check("list", tmp_path)


def sweeps(make, folder):
    """Two rounds, and the students of two epochs, without their times."""
    inputs, labels = toy(45)
    data = Dataset(inputs[15:], labels[15:], inputs[:15], labels[:15], CLASSES, "toy")
    recipe = Recipe(epochs=2, batch_size=8)
    rounds = distill_rounds(make, data, 2, "brier", 1, recipe=recipe, folder=folder / "rounds", progress=False)
    teacher = teacher_sweep(
        make, make, data, [1, 2], teacher=recipe, student=recipe, folder=folder / "teacher", progress=False
    )
    records = [record for run in rounds.runs + teacher.runs for record in run]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records], teacher.alone


def sweep(rank, store, folder, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    results[rank] = sweeps(lambda: nn.parallel.DistributedDataParallel(network()), folder)
    torch.distributed.destroy_process_group()


def test_every_process_has_the_sweeps_of_one(tmp_path):
    """They share no rows: the mean of equal gradients is each of them, bit for bit."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(sweep, (str(tmp_path / "store"), tmp_path / "two", results), nprocs=WORLD)
        found = [results[rank] for rank in range(WORLD)]
    assert found == [sweeps(network, tmp_path / "one")] * WORLD
