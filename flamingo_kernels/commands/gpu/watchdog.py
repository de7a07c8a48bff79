"""Ends this program when its time is over, whatever it waits for."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """End the program with status 1 if the block takes longer: only what is saved by then is left."""
    timer = threading.Timer(seconds, _end, [seconds])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(seconds: float) -> None:
    print(f"gpu: FAILED: it hangs, and was ended after {seconds:.0f} s", file=sys.stderr, flush=True)
    leave(1)


def leave(status: int) -> None:
    """End this process at once, without waiting for others that it started."""
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(status)
