"""Calls of the two linear losses with the same signature, for the tests of what they share."""

import torch
from helpers import random_numbers

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
