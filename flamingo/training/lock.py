"""A folder for one run at a time: a second would write over the log and the checkpoints of the first."""

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_held: set[Path] = set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder, which is made if need be, until the block ends, or the process however it ends.

    The lock is the operating system's, and this process' own: a kill takes it along, and worker processes,
    which may live a little longer, do not inherit it. Who holds a folder may hold it again.

    Raises:
        ValueError: if another process holds it, or it is a file.
        OSError: if nothing can be written there.
    """
    path = Path(os.path.realpath(folder)) / "lock"
    if path in _held:
        yield
        return
    expect_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:  # it stays: another process may be about to lock it
        _lock(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)


def expect_folder(path: Path) -> None:
    """Raises ValueError for what is there and no folder: a file, or a link that leads nowhere."""
    if os.path.lexists(path) and not path.is_dir():
        raise ValueError(
            f"expected {path} to be a folder, got a {'file' if path.exists() else 'link to nothing'}."
        )


def _lock(file: TextIO, folder: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise ValueError(
            f"expected {folder} to be this run's alone, got one that "
            f"{file.read().strip() or 'another process'} writes to. Wait for its end, or name another folder."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        print(f"train: {folder} cannot be locked here: start no second run in it", file=sys.stderr)
