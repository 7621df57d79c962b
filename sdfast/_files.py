"""Files that are whole or not there: a run that dies while writing leaves the version before."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a temporary file in the same folder, then puts it in the place of `path`."""
    path = Path(path)
    # A name of its own, so that two writers cannot meet in one file; and not tempfile's, which nobody else may read.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must survive a power cut too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_atomically` for a text in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))
