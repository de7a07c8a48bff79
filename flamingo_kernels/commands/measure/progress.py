"""A line on stderr that says how far a command is."""

from __future__ import annotations

import sys


class ProgressBar:
    """How many of `total` cases are done and what is going on, on one line of stderr."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.current = total, -1, ""
        self.terminal = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        case, _, _ = text.rpartition(": ")
        if case != self.current:
            self.done, self.current = self.done + 1, case
        filled = round(24 * self.done / self.total)
        line = f"{'━' * filled}{'─' * (24 - filled)} {self.done}/{self.total}  {text}"
        # On a terminal over the last one, in a log below it.
        start, end = ("\r\033[K", "") if self.terminal else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Wipe the line."""
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
