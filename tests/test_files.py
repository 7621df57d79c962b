"""Files that are whole or not there, whoever is killed while writing them."""

import os
import signal
import threading

import pytest

from sdfast import _files


def left_by_a_killed_writer(path):
    """The temporary file of a process that dies in the middle of its work."""
    child = os.fork()
    if child == 0:
        try:
            _files.write_atomically(path, lambda file: (file.write(b"half"), file.flush(), signal.pause()))
        finally:
            os._exit(1)
    while not (partial := list(path.parent.glob("*.partial"))) or not partial[0].stat().st_size:
        os.sched_yield()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return partial[0]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "c [1].pt"
    path.write_bytes(b"before")
    partial = left_by_a_killed_writer(path)
    assert partial.exists()
    assert path.read_bytes() == b"before"
    other = tmp_path / "c [1].pt.mine.partial"
    other.write_bytes(b"of a user")
    _files.write_atomically(tmp_path / "d.pt", lambda file: file.write(b"another file"))
    assert partial.exists(), "it was the temporary file of another"
    _files.write_text(path, "after")
    assert path.read_bytes() == b"after"
    assert sorted(tmp_path.iterdir()) == sorted([path, other, tmp_path / "d.pt"])


def test_the_file_of_a_writer_at_work_is_left_alone(tmp_path):
    path = tmp_path / "c.pt"
    begun, go_on = threading.Event(), threading.Event()

    def slowly(file):
        file.write(b"slow")
        begun.set()
        assert go_on.wait(60)

    writer = threading.Thread(target=_files.write_atomically, args=(path, slowly))
    writer.start()
    assert begun.wait(60)
    _files.write_text(path, "quick")
    assert path.read_bytes() == b"quick"
    go_on.set()
    writer.join()
    assert path.read_bytes() == b"slow"
    assert list(tmp_path.iterdir()) == [path]


def test_many_writers_meet(tmp_path):
    path, texts = tmp_path / "c.pt", [bytes([65 + number]) * 5000 for number in range(8)]
    failed = []

    def write(text):
        try:
            for _ in range(40):
                _files.write_atomically(path, lambda file: file.write(text))
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed
    assert path.read_bytes() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_version_before(tmp_path):
    path = tmp_path / "c.pt"
    _files.write_text(path, "before")

    def fail(file):
        file.write(b"half")
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        _files.write_atomically(path, fail)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
