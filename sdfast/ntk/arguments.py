"""The arguments of a call as a flat list and back: what torch's own pytree does, faster for those of most calls."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_SCALARS = (int, float, type(None), str)  # bool is an int


class Plain(NamedTuple):
    """Arguments none of which holds a tensor inside: each is a leaf, tuples of numbers too."""

    positional: int
    names: tuple[str, ...]


Form = Plain | TreeSpec


def flatten(args: tuple, kwargs: dict[str, Any]) -> tuple[list[Any], Form]:
    """All arguments side by side, containers that may hold tensors opened.

    Args:
        args: Positional ones.
        kwargs: Those by name.

    Returns:
        The leaves, and what `unflatten` needs.
    """
    flat = [*args, *kwargs.values()]
    if all(map(_is_leaf, flat)):
        return flat, Plain(len(args), tuple(kwargs))
    return tree_flatten((args, kwargs))


def unflatten(flat: list[Any], form: Form) -> tuple[tuple, dict[str, Any]]:
    """The arguments again, from as many leaves as `flatten` gave."""
    if isinstance(form, Plain):
        return tuple(flat[: form.positional]), dict(zip(form.names, flat[form.positional :], strict=True))
    return tree_unflatten(flat, form)


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors among what a function gave."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, _SCALARS):
        return []
    return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]


def replaced(result: Any, new: Callable[[Tensor], Tensor]) -> Any:
    """What a function gave, with every tensor exchanged for what `new` makes of it."""
    if isinstance(result, Tensor):
        return new(result)
    leaves, spec = tree_flatten(result)
    return tree_unflatten([new(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _is_leaf(argument: Any) -> bool:
    if isinstance(argument, Tensor) or type(argument) in _SCALARS or type(argument) is bool:
        return True
    return type(argument) in (tuple, list) and all(type(part) is int for part in argument)
