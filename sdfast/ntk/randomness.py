"""A model that draws random numbers has no Jacobian: it is refused, and the module that draws is named."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sdfast.ntk import inputs as feeding
from sdfast.ntk.inputs import Inputs
from sdfast.ntk.unchanged import random_states, same_states


@contextmanager
def refuse_randomness(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Watches the generators of Python, NumPy and torch while the model runs inside.

    Args:
        model: What runs.
        inputs: A sample of which is used to find the module.

    Yields:
        Nothing.

    Raises:
        ValueError: A number was drawn.
    """
    before = random_states(inputs.device)
    yield
    if not same_states(before, random_states(inputs.device)):
        where = _drawing_module(model, inputs)
        raise ValueError(
            f"model: {where} draws random numbers, so the gradients are not defined; call model.eval(), or take the "
            "randomness out"
        )


def _drawing_module(model: nn.Module, inputs: Inputs) -> str:
    """The innermost module that draws first."""
    open_modules: list[tuple[str, Any]] = []
    found: list[str] = []

    def enter(name: str) -> Any:
        return lambda module, arguments: open_modules.append((name, random_states(inputs.device)))

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        name, states = open_modules.pop()
        if not found and not same_states(states, random_states(inputs.device)):
            found.append(f"{name or 'the model itself'} ({type(module).__name__})")

    handles = []
    try:
        for name, module in model.named_modules():
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
        feeding.call(model, inputs.pick([0, inputs.samples - 1]))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "its forward"
