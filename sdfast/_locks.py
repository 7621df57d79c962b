"""Folders that two commands must not fill at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # not POSIX
    fcntl = None  # type: ignore[assignment]


@contextmanager
def held(folder: Path, command: str) -> Iterator[None]:
    """Holds a folder against a second command in it, where the system has such locks; a run that dies lets go of it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--output: another {command} is at work in {folder}") from None
        yield
    finally:
        os.close(descriptor)
