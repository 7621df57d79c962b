"""Memory for gradients that is used again from matrix to matrix, and that the system may take back in between.

Memory fresh from the system is given page by page as it is first written, which costs more than the gradients that are
written to it. What was used is therefore marked as free (``MADV_FREE``) and kept: under pressure the system takes its
pages away, and whoever takes it again finds those that it left.
"""

import contextlib
import mmap
import sys
import threading

_LEAST = 2**22  # bytes from which it is worth while
_MOST = 2**31  # bytes that are kept together
_WASTE = 2  # times the bytes wanted that may be taken

_idle: list[mmap.mmap] = []
_lock = threading.Lock()


def take(size: int) -> mmap.mmap | None:
    """So many bytes or some more, of any content.

    Args:
        size: Bytes.

    Returns:
        The memory; ``None`` where that is little, or the system knows no memory of the kind.
    """
    if size < _LEAST or not hasattr(mmap, "MADV_FREE"):
        return None
    with _lock:
        fitting = [memory for memory in _idle if size <= len(memory) <= _WASTE * size]
        if fitting:
            best = min(fitting, key=len)
            _idle.remove(best)
            return best
        _idle.clear()  # of another size: not held beside what is needed now
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def give_back(lent: list[mmap.mmap]) -> None:
    """Keeps memory that no tensor lies in any longer; forgets the other, which goes with its tensors.

    Args:
        lent: Emptied.
    """
    while lent:
        memory, references = _popped(lent)
        if references == _UNUSED and len(memory) <= _MOST:
            with contextlib.suppress(OSError), _lock:
                memory.madvise(mmap.MADV_FREE)
                _idle.append(memory)
                while sum(map(len, _idle)) > _MOST:
                    _idle.pop(0)


def _popped(lent: list[mmap.mmap]) -> tuple[mmap.mmap, int]:
    """The last of them, and how many references there are to it: a tensor holds one."""
    memory = lent.pop()
    return memory, sys.getrefcount(memory)


_UNUSED = _popped([mmap.mmap(-1, mmap.PAGESIZE)])[1]  # as this interpreter counts
