"""Ctrl-C, which is to end a run between two updates."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import distributed


@contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C is only noticed, and the second ends at once, as ever.

    Of torchrun's processes each is sent several for one that a user has typed: there all are only noticed.

    Yields:
        Whether there was one.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone is told of signals
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)
    came = False

    def notice(*_: Any) -> None:
        nonlocal came
        came = True
        if not distributed.is_torchelastic_launched():
            signal.signal(signal.SIGINT, before)
            with suppress(OSError):  # no print: it may have been interrupted in the middle of one
                os.write(2, b"\ntrain: stops after this update; Ctrl-C again ends at once\n")

    signal.signal(signal.SIGINT, notice)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)


def ignore(*_: Any) -> None:
    """For a worker process: the one that it works for decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
