"""A training step of a CIFAR ResNet on synthetic pictures: plain cross entropy against self-distillation and its probe.

Forward, loss, backward and SGD with momentum at batch 128; "bank" distils from a `PredictionBank`; "probe" is one look
of the `InformationProbe` at 128 samples. Time against plain cross entropy is what self-distillation costs.
"""

import itertools

import torch
import torch.nn.functional as F

import sdfast
from benchmarks.harness import DEVICE, Case, interleaved, measure
from benchmarks.shapes import ON_GPU, TINY, sized
from sdfast.train import InformationProbe

PEERS = {"F.cross_entropy": "F.cross_entropy"}
DEPTH = 8 if TINY else 56 if ON_GPU else 20
BATCH, SAMPLES = sized(128, 2048)
GROUPS = [f"ResNet-{DEPTH} {dtype}" for dtype in (("float32", "bf16 autocast") if ON_GPU else ("float32",))]
TARGETS = {group: {"self-distillation": (1.05,), "bank": (1.05,)} for group in GROUPS}
NAMES = ("F.cross_entropy", "self-distillation", "bank", "probe")


def loss_of(name, bank):
    """(logits, labels, indices) -> loss."""
    if name == "F.cross_entropy":
        return lambda x, y, _: F.cross_entropy(x, y)
    if name == "self-distillation":
        return lambda x, y, _: sdfast.self_distillation_loss(x, y, sdfast.AdaptiveAlpha(1.0))
    return lambda x, y, indices: sdfast.self_distillation_loss(x, y, 0.5, source=bank.rows(indices), label_fn="softmax")


def prepare(group, name):
    """A row's step: the whole of it, on the next batch of pictures that lie on the device."""
    torch.manual_seed(0)
    pictures, labels = torch.randn(SAMPLES, 3, 32, 32), torch.randint(0, 10, (SAMPLES,))
    model = sdfast.models.CifarResNet(DEPTH)
    loss = loss_of(name, sdfast.PredictionBank(SAMPLES, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    turn = itertools.cycle(torch.randperm(SAMPLES).split(BATCH))
    if name == "probe":
        probe = InformationProbe(pictures[:BATCH], labels[:BATCH])
        return Case(lambda: probe(model), rounds=3, about={"dtype": "float32"})

    def step():
        indices = next(turn)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled="bf16" in group):
            logits = model(pictures[indices])
        value = loss(logits, labels[indices], indices)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return value

    first = step().item()
    if not abs(first - torch.tensor(10.0).log().item()) < 3:
        raise SystemExit(f"bench_training: {name} begins at a loss of {first:.3g}")
    return Case(step, copies=1, rounds=None if ON_GPU else 1, about={"dtype": "float32", "pictures": BATCH})


@interleaved(GROUPS, NAMES, 1 if TINY else 5)
def test_step(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)
