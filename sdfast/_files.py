"""Files that are whole or not there: a run that dies while writing leaves the version before."""

import glob
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sdfast import _locks

_POSIX = os.name == "posix"


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a temporary file in the same folder, then puts it in the place of `path`.

    Temporary files of writers of the same path that were killed are removed.
    """
    path = Path(path)
    _remove_left(path)
    with _temporary(path) as (file, partial):
        write(file)
        file.flush()
        os.fsync(file.fileno())
        if _POSIX:
            os.replace(partial, path)  # before its lock ends
    if not _POSIX:
        os.replace(partial, path)  # others do not rename what is open
    else:  # the rename itself must survive a power cut too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """An empty file in the same folder, locked while it is open; removed where what is done with it fails.

    With a name of its own, so that two writers cannot meet in one file; and not tempfile's, which nobody else may read.
    """
    while True:
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        with open(partial, "xb") as file:
            if not _held(file):
                continue
            try:
                yield file, partial
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            return


def _held(file: BinaryIO) -> bool:
    """Whether the new file is locked before another writer took it for one of a dead one."""
    try:
        _locks.lock(file.fileno())
    except BlockingIOError:
        return False
    return os.fstat(file.fileno()).st_nlink > 0


def _remove_left(path: Path) -> None:
    """Removes temporary files that no writer holds."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}.partial"):
        with suppress(OSError), open(partial, "r+b") as file:
            if _locks.lock(file.fileno()):
                partial.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_atomically` for a text in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))
