"""Banks that hold something, batches for them and the losses on them, for the tests of every backend."""

import torch

import sdfast
from sdfast import PredictionBank, elr_loss, self_distillation_loss


def inputs(rows=12, classes=7, dtype=torch.float32):
    logits = torch.randn(rows, classes, dtype=dtype).requires_grad_()
    return logits, torch.randint(classes, (rows,)), torch.randperm(20)[:rows]


def filled(classes=7, **options):
    bank = PredictionBank(20, classes, 0.6, **options)
    bank.seen.copy_(torch.randint(1, 4, (20,)))
    rows = torch.randn(20, classes).softmax(-1)
    if bank.top_k:
        rows, bank.classes[:] = sdfast.ops.prediction_bank.storage.sparse_rows(rows, bank.top_k)
    bank.predictions.copy_(rows)
    return bank


LOSSES = {
    "distillation": lambda x, y, rows, **k: self_distillation_loss(x, y, 0.4, source=rows, **k),
    "softmax": lambda x, y, rows, **k: self_distillation_loss(
        x, y, sdfast.AdaptiveAlpha(0.9), source=rows, label_fn="softmax", temperature=0.5, **k
    ),
    "elr": elr_loss,
}


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
               if isinstance(a, torch.Tensor))  # fmt: skip
