"""Training steps by `SelfDistiller` beside the same written by hand, and self-distillation beside cross entropy.

A time is that of an epoch, of 4 batches of pictures or 200 of rows that are there already: forward, loss, backward,
optimizer, and on the trainer's side what it records. "by hand" calls the same loss without its statistics; "plain" is
the trainer at α = 1, "self" at `AdaptiveAlpha(1.0)`. Before anything is timed, trainer and loop must reach the same
weights, bit for bit.
"""

import copy
import functools

import torch

import sdfast
from benchmarks.harness import DEVICE, Case, interleaved, measure
from sdfast.models import make_model
from sdfast.train import SelfDistiller

PEERS = {"same loop by hand": "by hand: self", "plain cross entropy": "trainer: plain"}
RESNET, MLP = "ResNet-20, 128 pictures", "MLP 64-256-256-10, 128 rows"
# The 1.4 ms step of the MLP may cost 60 µs more than by hand.
TARGETS = {RESNET: {"trainer: self": (1.03, 1.03)}, MLP: {"trainer: self": (1 + 60 / 1400, None)}}
GROUPS = [RESNET, MLP]
ROWS = ("by hand: self", "trainer: self", "trainer: plain")

SHAPES = {RESNET: ("resnet20", (3, 32, 32)), MLP: ("mlp", (64,))}
STEPS = {RESNET: 4, MLP: 200}
BATCH, CLASSES = 128, 10
if DEVICE.type == "cuda":  # where a ResNet-20 is too small a step to tell
    DEEP = "ResNet-56, 128 pictures"
    GROUPS, SHAPES[DEEP], STEPS[DEEP], TARGETS[DEEP] = [*GROUPS, DEEP], ("resnet56", (3, 32, 32)), 20, TARGETS[RESNET]


@functools.lru_cache(maxsize=1)
def task(group):
    """A network, and its batches on the device."""
    torch.manual_seed(0)
    name, shape = SHAPES[group]
    model = make_model(name, shape, CLASSES).to(DEVICE)
    steps = range(STEPS[group])
    return model, [(torch.randn(BATCH, *shape), torch.randint(CLASSES, (BATCH,))) for _ in steps]


def by_hand(model, optimizer, batches, alpha):
    """The loop one would write."""
    model.train()
    for inputs, labels in batches:
        optimizer.zero_grad()
        sdfast.self_distillation_loss(model(inputs), labels, alpha).backward()
        optimizer.step()


def prepare(group, name):
    """A row's epoch, checked against the loop."""
    network, batches = task(group)
    alpha = 1.0 if name.endswith("plain") else sdfast.AdaptiveAlpha(1.0)

    def parts():
        model = copy.deepcopy(network)
        return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    hand, hand_optimizer = parts()
    model, optimizer = parts()
    trainer = SelfDistiller(model, optimizer, alpha=alpha)
    by_hand(hand, hand_optimizer, batches, alpha)
    trainer.fit(batches, 1, progress=False)
    for ours, theirs in zip(model.parameters(), hand.parameters(), strict=True):
        if not torch.equal(ours, theirs):
            raise SystemExit(f"bench_trainer: {group}: trainer and loop reach other weights")
    if name.startswith("by hand"):
        step = functools.partial(by_hand, hand, hand_optimizer, batches, alpha)
    else:
        step = functools.partial(trainer.fit, batches, 1, progress=False)
    return Case(step, rounds=3, about={"dtype": "float32", "batches": len(batches)})


@interleaved(GROUPS, ROWS)
def test_step(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)
