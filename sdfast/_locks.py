"""Locks of files and folders, which end with the process that holds them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # not POSIX
    fcntl = None  # type: ignore[assignment]


def lock(descriptor: int) -> bool:
    """Locks an open file or folder until it is closed.

    Args:
        descriptor: Of it.

    Returns:
        Whether there are such locks here.

    Raises:
        BlockingIOError: Another holds it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return False
    return True


@contextmanager
def held(folder: Path, command: str) -> Iterator[None]:
    """Holds a folder against a second command in it, where the system has such locks; a run that dies lets go of it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock(descriptor)
        except BlockingIOError:
            raise ValueError(f"--output: another {command} is at work in {folder}") from None
        yield
    finally:
        os.close(descriptor)
