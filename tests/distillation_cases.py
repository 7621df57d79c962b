"""Calls of the distillation loss, drawn over all its options, for the tests of every backend."""

import dataclasses
import random

import torch
from helpers import DTYPES, LAYOUTS, assert_as_good_as_torch, awkward, lost_in_store, poison, random_numbers

import sdfast

DIVERGENCES = ("kl", "reverse_kl", "js")
FORMS = ("logits", "log_probabilities", "bucket", "uniform")


def make_teacher(logits, form, k=3, temperature=1.0):
    """A teacher of that form with the probabilities of softmax(logits / temperature)."""
    if form == "logits":
        return logits
    log_q = (logits / temperature).log_softmax(-1)
    if form == "log_probabilities":
        return sdfast.LogProbabilities(log_q)
    values, indices = log_q.topk(min(k, logits.shape[-1]), -1)
    # Not in order: nothing may rest on the largest coming first.
    return sdfast.TopK(values.roll(1, -1).flip(-1), indices.roll(1, -1).flip(-1), None, form)


def cast_teacher(teacher, dtype, layout="contiguous"):
    """The teacher with its floating tensor in `dtype`."""
    if isinstance(teacher, torch.Tensor):
        return awkward(teacher.to(dtype), layout)
    return teacher._replace(values=awkward(teacher.values.to(dtype), layout))


@dataclasses.dataclass(repr=False)
class Case:
    """One call: float64 tensors, given to each backend in their dtypes and `layout`."""

    logits: torch.Tensor
    teacher: object
    labels: torch.Tensor | None
    options: dict
    dtype: torch.dtype = torch.float64
    teacher_dtype: torch.dtype = torch.float64
    layout: str = "contiguous"

    def __repr__(self):
        shown = {k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()}
        labels = None if self.labels is None else f"{self.labels.dtype}{tuple(self.labels.shape)}"
        form = type(self.teacher).__name__ + getattr(self.teacher, "tail", "")
        dtypes = f"{self.dtype}, {form} {self.teacher_dtype}"
        return f"{tuple(self.logits.shape)} {dtypes}, {self.layout}, labels {labels}, {shown}"

    def _repr_pretty_(self, printer, cycle):  # what hypothesis asks for
        printer.text(repr(self))

    def run(self, backend, dtype):
        """(loss, gradient) of the values that the given dtypes can hold, computed in `dtype`."""
        logits = awkward(self.logits.to(self.dtype).to(dtype), self.layout).detach().requires_grad_()
        poison(logits)
        teacher = cast_teacher(self.teacher, self.teacher_dtype, self.layout)
        if not isinstance(teacher, torch.Tensor) and hasattr(teacher, "tail_mass") and teacher.tail_mass is None:
            # As the call derives it from the values as stored, but exactly.
            k, classes = teacher.values.shape[-1], logits.shape[-1]
            mass = (1 - teacher.values.double().exp().sum(-1)).clamp(min=0)
            teacher = teacher._replace(tail_mass=mass if k < classes else None)
        loss = sdfast.distillation_loss(logits, teacher, self.labels, backend=backend, **self.options)
        upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) if loss.dim() else None
        (gradient,) = torch.autograd.grad(loss, logits, upstream)
        return loss, gradient

    def check(self, backend):
        """The backend's error against float64 beside that of the reference in the same dtype."""
        got, torch_result = self.run(backend, self.dtype), self.run("reference", self.dtype)
        exact = self.run("reference", torch.float64)
        square = self.options.get("temperature", 4.0) ** 2
        spread = (self.logits[self.logits.isfinite()].abs().max().item() if self.logits.numel() else 0) + 1
        unit = 1.0 if self.options.get("reduction") in ("sum", "none") else 1.0 / max(1, len(self.logits))
        # What is added up: T² times log-probabilities, and T times probabilities times log-ratios.
        assert_as_good_as_torch("loss", got[0], torch_result[0], exact[0], max(1.0, square) * spread)
        ratios = spread if self.options.get("divergence", "kl") != "kl" else 1.0
        unit *= max(1.0, square**0.5) * ratios
        stored = lost_in_store(backend, self.dtype)
        assert_as_good_as_torch("gradient", got[1], torch_result[1], exact[1], unit, stored)


def draw_case(seed, rows_from=(0, 1, 2, 5, 40), classes_from=(1, 2, 3, 10, 16, 33, 129, 1000)):
    """Any valid call, from a seed."""
    choose = random.Random(seed)
    generator = random_numbers(seed)
    rows, classes = choose.choice(rows_from), choose.choice(classes_from)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    options = {
        "temperature": choose.choice((1.0, 0.5, 2.0, 4.0)),
        "divergence": choose.choice(DIVERGENCES),
        "reduction": choose.choice(("mean", "sum", "none")),
        "row_weight": choose.choice((None, uniform(rows))),
    }
    teacher = make_teacher(choose.choice((1.0, 5.0)) * normal(rows, classes), choose.choice(FORMS), 4, 1.5)
    if isinstance(teacher, torch.Tensor):
        options["teacher_temperature"] = choose.choice((None, 1.0, 3.0))
    labels = None
    kind = choose.choice(("none", "index", "probabilities"))
    if kind == "index":
        labels = torch.randint(0, classes, (rows,), generator=generator)
        labels[uniform(rows) < choose.choice((0.0, 0.3, 1.0))] = -100
    elif kind == "probabilities":
        labels = (2 * normal(rows, classes)).softmax(-1)
    if labels is not None:
        options["label_smoothing"] = choose.choice((0.0, 0.1))
        options["alpha"] = choose.choice((None, 0.0, 0.3, 1.0, uniform(rows), uniform(1)[0]))
    return Case(
        choose.choice((1.0, 8.0)) * normal(rows, classes), teacher, labels, options, choose.choice(DTYPES),
        choose.choice(DTYPES), choose.choice(LAYOUTS),
    )  # fmt: skip
