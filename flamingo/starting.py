"""Ctrl-C while a command is still importing, for seconds, is one line as it is ever after."""

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


def begin() -> None:
    """Before anything slow is imported. Whoever ignores Ctrl-C goes on to."""
    if (
        (is_command("flamingo") or is_command("flamingo_kernels"))
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _end)


def done() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


begin()
