"""Multi-head attention: torch's own function, looked into, so that its projections are seen as linear layers.

`F.multi_head_attention_forward` reaches a torch function mode as one call. It merges positions and samples and splits
them again inside, so it is followed call by call: its projections are served by the rule of linear layers, its biases
of keys and values by the generic rule. Attention itself (`F.scaled_dot_product_attention`) has no parameter.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch.nn import functional


def _looked_into(function: Any) -> Callable:
    """The same function, whose inner calls reach the active mode: it does not hand itself over as a whole."""
    names = {**function.__globals__, "has_torch_function": lambda arguments: False}
    inner = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    inner.__kwdefaults__ = function.__kwdefaults__
    return inner


COMPOSITES: dict[Any, Callable] = {
    functional.multi_head_attention_forward: _looked_into(functional.multi_head_attention_forward)
}
