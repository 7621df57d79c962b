"""Calls of the two linear losses with the same signature, for the tests of what they share."""

import torch
from helpers import assert_as_good_as_torch, random_numbers

import sdfast


def self_distillation(hidden, weight, labels, *, bias=None, **options):
    """The self-distillation loss, at α = 0.4 unless told."""
    return sdfast.linear_self_distillation_loss(hidden, weight, labels, options.pop("alpha", 0.4), bias=bias, **options)


def distillation(hidden, weight, labels, *, bias=None, **options):
    """The distillation loss against a fixed teacher of another width."""
    rows, classes = hidden.shape[:-1].numel(), len(weight)
    generator = random_numbers(0)
    teacher = torch.randn(rows, 5, generator=generator), 2 * torch.randn(classes, 5, generator=generator)
    shaped = teacher[0].reshape(*hidden.shape[:-1], 5).to(options.get("teacher_dtype", hidden.dtype))
    given = teacher[1].to(options.pop("teacher_dtype", hidden.dtype))
    return sdfast.linear_distillation_loss(hidden, weight, shaped, given, labels, bias=bias, **options)


FORMS = {"self_distillation": self_distillation, "distillation": distillation}


def draw(rows=50, width=12, classes=33, dtype=torch.float32, bias=True, ignored=7):
    """(hidden, weight, bias, labels): leaves that require grad, and labels of which every `ignored`-th is ignored."""
    hidden, weight = torch.randn(rows, width, dtype=torch.float64), torch.randn(classes, width, dtype=torch.float64)
    tensors = [hidden, weight / width**0.5 * 2, torch.randn(classes, dtype=torch.float64) if bias else None]
    labels = torch.randint(0, classes, (rows,))
    if ignored:
        labels[::ignored] = -100
    return *(None if t is None else t.to(dtype).requires_grad_() for t in tensors), labels


def loss_and_gradients(form, hidden, weight, bias, labels, upstream=None, **options):
    """(loss, gradients of hidden, weight, bias), of those that require one."""
    loss = FORMS[form](hidden, weight, labels, bias=bias, **options)
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return (loss.detach(), *torch.autograd.grad(loss, leaves, upstream))


def cast(tensors, dtype):
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def check(form, backend, tensors, labels, **options):
    """Loss and gradients against the reference in float64, beside the reference in the same dtype."""
    dtype = tensors[0].dtype
    plan = {name: options.pop(name) for name in ("chunk_rows", "workspace") if name in options}
    rows = len(labels)
    upstream = torch.linspace(-1, 2, rows) if options.get("reduction") == "none" else None

    def run(which, compute, **more):
        wide = torch.float64 if compute == torch.float64 else torch.float32
        up = None if upstream is None else upstream.to(wide)
        if form == "distillation" and "teacher_dtype" not in options:
            more["teacher_dtype"] = torch.float64 if dtype == torch.float64 else torch.float32
        return loss_and_gradients(form, *cast(tensors, compute), labels, up, backend=which, **more, **options)

    got, peer, exact = run(backend, dtype, **plan), run("reference", dtype), run("reference", torch.float64)
    unit = 1 / rows if options.get("reduction", "mean") == "mean" else 1.0
    for name, g, t, e in zip(("loss", "hidden", "weight", "bias"), got, peer, exact, strict=False):
        # What is added up: `rows` terms of the size of hidden states, for the weight.
        scale = 40.0 if name == "loss" else 40 * unit * (rows if name != "hidden" else 1) ** 0.5
        assert_as_good_as_torch(name, g, t, e, scale)
