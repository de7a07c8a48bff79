"""A folder is one run's: the second is refused, and a kill leaves nothing behind."""

import os
import signal
import time
from contextlib import suppress

import pytest

from flamingo.training.lock import locked


@pytest.fixture
def other(tmp_path):
    """A process that holds the folder, and has a worker."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        with locked(tmp_path):
            worker = os.fork()
            if worker:
                os.write(writer, str(worker).encode())
            time.sleep(60)
            os._exit(0)
    worker = int(os.read(reader, 20))
    yield process
    os.close(reader)
    os.close(writer)
    os.kill(worker, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_another_process_is_refused_and_a_kill_ends_that(tmp_path, other):
    """Though the worker of the one that was killed still lives."""
    with pytest.raises(ValueError) as refused, locked(tmp_path):  # noqa: PT011
        pass
    expected = f"expected {tmp_path} to be this run's alone, got one that process {other} on "
    assert str(refused.value).startswith(expected)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    with locked(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()


def test_who_holds_it_may_hold_it_again(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "made" / "here"), locked(tmp_path / "made" / ".." / "made" / "here"):
            pass


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), locked(tmp_path / "file" / "run"):
        pass


def test_without_locks_it_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", none)
    with locked(tmp_path):
        pass
    assert capsys.readouterr().err == f"train: {tmp_path} cannot be locked here: start no second run in it\n"
