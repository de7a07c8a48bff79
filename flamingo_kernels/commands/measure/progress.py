"""A line on stderr that says how far a command is, and how long it will take."""

from __future__ import annotations

import sys
import time

from .text import time_left


class ProgressBar:
    """How many of `total` cases are done and what is going on, on one line of stderr.

    Args:
        total: of cases.
        seconds: what one takes at least, where all are alike: then it says how long the rest will take, by
            what those before took.
    """

    def __init__(self, total: int, seconds: float | None = None) -> None:
        self.total, self.done, self.current = total, -1, ""
        self.seconds, self.began = seconds, time.monotonic()
        self.terminal = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        case, _, _ = text.rpartition(": ")
        if case != self.current:
            self.done, self.current = self.done + 1, case
        filled = round(24 * self.done / self.total)
        line = f"{'━' * filled}{'─' * (24 - filled)} {self.done}/{self.total}  {self.left()}{text}"
        # On a terminal over the last one, in a log below it.
        start, end = ("\r\033[K", "") if self.terminal else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)

    def left(self) -> str:
        """How long the cases that are not done will take."""
        if self.seconds is None:
            return ""
        left = self.total - self.done
        if self.done < 1:
            return f"more than {time_left(left * self.seconds)} left  "
        return f"about {time_left(left * (time.monotonic() - self.began) / self.done)} left  "

    def close(self) -> None:
        """Wipe the line."""
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
