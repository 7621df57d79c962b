"""The rules: which gives gradients per sample for which torch function. One file per family of layers.

A rule of one's own is a `Rule` (or `NamedRule`) given to `register` with the functions it serves; it is asked first.
"""

from collections.abc import Callable
from typing import Any

from sdfast.ntk.layers import attention, convolution, embedding, linear, normalization
from sdfast.ntk.layers.generic import LoopRule, VmapRule
from sdfast.ntk.layers.rule import Call, NamedRule, Rule, Slot

__all__ = ["COMPOSITES", "GENERIC", "LOOP", "Call", "NamedRule", "Rule", "Slot", "register", "registered", "rule_for"]

GENERIC, LOOP = VmapRule(), LoopRule()

# function -> rules to ask in turn
_RULES: dict[Any, list[Rule]] = {}

# function of several layers -> the same in calls of simpler functions
COMPOSITES: dict[Any, Callable] = {**attention.COMPOSITES}


def register(rule: Rule, *functions: Callable) -> None:
    """Lets a rule serve calls of these functions, before the rules that serve them already.

    Args:
        rule: Is asked by `Rule.serves` for each call.
        functions: As they are called: ``torch.nn.functional.linear``, ``torch.Tensor.matmul``.

    Raises:
        TypeError: `rule` is no Rule.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule: got {type(rule).__name__}, wanted a sdfast.ntk.layers.Rule")
    for function in functions:
        _RULES.setdefault(function, []).insert(0, rule)


def registered() -> int:
    """How many rules there are for all functions together."""
    return sum(map(len, _RULES.values()))


def rule_for(call: Call) -> Rule:
    """The first rule that serves a call; the generic one where none does."""
    return next((rule for rule in _RULES.get(call.function, ()) if rule.serves(call)), GENERIC)


for _family in (linear, convolution, normalization, embedding):
    for _rule, _functions in _family.RULES:
        register(_rule, *_functions)
