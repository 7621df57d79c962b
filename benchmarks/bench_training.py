"""Training steps: by hand with cross entropy, with self-distillation and from a bank, and by `SelfDistiller`.

A time is that of an epoch, of 4 batches of pictures (20 on a GPU) or 200 of rows, which are there already: forward,
loss, backward, SGD with momentum, and on the trainer's side what it records. "by hand: self" calls the trainer's loss
without its statistics; "trainer: plain" is α = 1 and "trainer: self" `AdaptiveAlpha(1.0)`. Before anything is timed
trainer and loop must reach the same weights, bit for bit.
"""

import copy
import functools

import torch
import torch.nn.functional as F

import sdfast
from benchmarks.harness import DEVICE, Case, interleaved, measure
from benchmarks.shapes import ON_GPU, TINY, sized
from sdfast.models import make_model
from sdfast.train import SelfDistiller

PEERS = {
    "same loop by hand": "by hand: self", "trainer, plain": "trainer: plain", "F.cross_entropy": "by hand: F.cross"
}  # fmt: skip
ROWS = ("by hand: F.cross_entropy", "by hand: self", "by hand: bank", "trainer: plain", "trainer: self")
(BATCH,) = sized(128)
CLASSES = 10
# name -> (model, inputs, batches of an epoch, mixed precision)
NETWORKS = {
    "ResNet-20": ("resnet20", (3, 32, 32), 20 if ON_GPU else 4, None),
    "MLP 64-256-256-10": ("mlp", (64,), 200, None),
}
if ON_GPU:  # where a ResNet-20 is too small a step to tell
    NETWORKS["ResNet-56"] = ("resnet56", (3, 32, 32), 20, None)
    NETWORKS["ResNet-56 bf16 autocast"] = ("resnet56", (3, 32, 32), 20, "bfloat16")
GROUPS = {f"{name}, batch {BATCH}": network for name, network in NETWORKS.items()}
PICTURES = {
    "trainer: self": (1.03, 1.03, None),
    "by hand: self": (None, None, 1.03),
    "by hand: bank": (None, None, 1.05),
}
# The 1.4 ms step of the MLP may cost 60 µs more than by hand.
TARGETS = {group: PICTURES if "ResNet" in group else {"trainer: self": (1 + 60 / 1400, None, None)} for group in GROUPS}


@functools.lru_cache(maxsize=1)
def task(group):
    """A network, and its batches on the device, with indices."""
    torch.manual_seed(0)
    name, shape, steps, _ = GROUPS[group]
    model = make_model(name, shape, CLASSES).to(DEVICE)
    steps = 2 if TINY else steps
    rows = torch.arange(steps * BATCH).split(BATCH)
    return model, [(torch.randn(BATCH, *shape), torch.randint(CLASSES, (BATCH,)), part) for part in rows]


def loss_of(name, batches):
    """(logits, labels, indices) -> loss."""
    if name.endswith("F.cross_entropy"):
        return lambda logits, labels, _: F.cross_entropy(logits, labels)
    if name.endswith("bank"):
        bank = sdfast.PredictionBank(len(batches) * BATCH, CLASSES)
        return lambda logits, labels, indices: sdfast.self_distillation_loss(
            logits, labels, 0.5, source=bank.rows(indices), label_fn="softmax"
        )
    alpha = 1.0 if name.endswith("plain") else sdfast.AdaptiveAlpha(1.0)
    return lambda logits, labels, _: sdfast.self_distillation_loss(logits, labels, alpha)


def by_hand(model, optimizer, batches, loss, amp):
    """The loop one would write."""
    model.train()
    for inputs, labels, indices in batches:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp is not None):
            value = loss(model(inputs), labels, indices)
        value.backward()
        optimizer.step()


def prepare(group, name):
    """A row's epoch; the trainer's is checked against the loop's."""
    network, batches = task(group)
    amp = GROUPS[group][3]

    def parts():
        model = copy.deepcopy(network)
        return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    hand, optimizer = parts()
    loss = loss_of(name, batches)
    step = functools.partial(by_hand, hand, optimizer, batches, loss, amp)
    step()
    if name.startswith("trainer"):
        alpha = 1.0 if name.endswith("plain") else sdfast.AdaptiveAlpha(1.0)
        trainer = SelfDistiller(*parts(), alpha=alpha, amp=amp)
        trainer.fit(batches, 1, progress=False)
        for ours, theirs in zip(trainer.model.parameters(), hand.parameters(), strict=True):
            if not torch.equal(ours, theirs):
                raise SystemExit(f"bench_training: {group}: trainer and loop reach other weights")
        step = functools.partial(trainer.fit, batches, 1, progress=False)
    rounds = 1 if "ResNet" in group and not ON_GPU else 3
    return Case(step, rounds=rounds, about={"dtype": "float32", "batches": len(batches)})


@interleaved(GROUPS, ROWS)
def test_epoch(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)
