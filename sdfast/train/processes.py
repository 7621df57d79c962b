"""What the processes of one training tell each other: by torch's object collectives, on any backend."""

from collections.abc import Callable
from typing import Any

from torch import distributed as dist


def count() -> int:
    """How many processes there are; 1 where none were set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def gathered(value: Any) -> list[Any]:
    """Every process's value at the first; nothing at the others."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.gather_object(value, values if rank() == 0 else None)
    return values if rank() == 0 else []


def scattered(values: list[Any]) -> Any:
    """Each process's own of the first one's values."""
    if count() == 1:
        return values[0]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, values if rank() == 0 else None)
    return mine[0]


def together(work: Callable[[], Any]) -> list[Any]:
    """Every process's result of its own work; where one raises, all do, so that none waits for it.

    Args:
        work: Of this process; its result must be small.

    Returns:
        The results, in the order of the processes.

    Raises:
        RuntimeError: Another process's work failed; this one's own error is raised as it is.
    """
    if count() == 1:
        return [work()]
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    told: list[Any] = [None] * count()
    dist.all_gather_object(told, (result, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    for number, (_, text) in enumerate(told):
        if text is not None:
            raise RuntimeError(f"process {number} stopped with {text}")
    return [value for value, _ in told]
