"""A model, torch's settings and the random generators as they were, whatever happened inside."""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restores parameters, buffers, training flags and generators; inside, gradients are enabled and in full precision.

    Args:
        model: What will be called.
        device: Of its parameters.

    Yields:
        Nothing.
    """
    eager = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    buffers = [(module, dict(module._buffers)) for module in eager]
    tensors = [*model.parameters(), *model.buffers()]  # a forward may clip its weights, and batch norm counts
    values = {id(held): (held, held.detach().clone()) for held in tensors if held.layout is torch.strided}
    flags = [(module, module.training) for module in model.modules()]
    states = random_states(device)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(full_precision())
        if "torch._dynamo" in sys.modules:  # a compiled module is run as it was written, so that its calls are seen
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            for module, held in buffers:
                module._buffers.clear()
                module._buffers.update(held)
            for tensor, value in values.values():
                # Not by its version, which batch norm leaves as it is; and not touched where it is the same.
                if not torch.equal(tensor, value):
                    tensor.data.copy_(value)
            for module, training in flags:
                module.training = training
            _set_random_states(states, device)


@contextmanager
def full_precision(precision: str = "ieee") -> Iterator[None]:
    """Float32 products as float32, or as TF32 on purpose, and afterwards as the user had them."""
    backends: Any = torch.backends
    places = [
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.rnn,
    ]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        places[0].fp32_precision = precision
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def random_states(device: torch.device) -> tuple[Any, ...]:
    """The states of Python's, NumPy's and torch's generators."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def same_states(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """Whether nothing was drawn between two `random_states`."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return torch.equal(a, b)
        if isinstance(a, np.ndarray):
            return bool(np.array_equal(a, b))
        if isinstance(a, tuple):
            return all(map(equal, a, b))
        return bool(a == b)

    return equal(left, right)


def _set_random_states(states: tuple[Any, ...], device: torch.device) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[3], device)
