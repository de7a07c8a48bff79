"""What a command needs before anything is imported, which takes seconds.

Ctrl-C is one line from the first moment on. And where a standard stream is closed, as by `>&-`, the next file
that is opened would take its place: a checkpoint would have warnings in it.
"""

import io
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Any


def is_command(name: str) -> bool:
    """Whether this process is `python -m NAME`, or the script of the same name with hyphens."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    return program == name.replace("_", "-") or (program == "-m" and name in sys.orig_argv)


def _end(*_: Any) -> None:
    with suppress(OSError):
        os.write(2, b"flamingo: stopped by Ctrl-C\n")
    os._exit(130)


def _tell(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What is wrong already while a command imports, as a variable of the environment, is one line too."""
    if not isinstance(error, (ImportError, ValueError)):
        sys.__excepthook__(kind, error, trace)
        return
    with suppress(OSError):
        os.write(2, f"flamingo: {' '.join(str(error).split())}\n".encode())
    os._exit(2)


def _open_streams() -> None:
    """Puts the null device in the place of standard streams that are closed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115 - it stays open


def _show_otherwise() -> None:
    """An answer is not lost where a terminal cannot show it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def begin() -> None:
    """Before anything slow is imported. Whoever ignores Ctrl-C goes on to."""
    if not (is_command("flamingo") or is_command("flamingo_kernels")):
        return
    _open_streams()
    _show_otherwise()
    sys.excepthook = _tell
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def done() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, and errors are the command's to tell."""
    if sys.excepthook is _tell:
        sys.excepthook = sys.__excepthook__
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


begin()
