"""Tables that are made from code or from a run, and stand between two markers of a page."""

from __future__ import annotations

from pathlib import Path


def row(*cells: str) -> str:
    """One line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def around(path: str | Path, begin: str, end: str) -> tuple[str, str]:
    """What a page holds before and after its two markers.

    Raises:
        ValueError: the markers are not there, each once and in order.
    """
    before, *rest = Path(path).read_text().split(begin)
    _, *after = "".join(rest).split(end)
    if (len(rest), len(after)) != (1, 1) or end in before:
        raise ValueError(f"{path}: expected one {begin!r} and after it one {end!r}.")
    return before, after[0]


def replace(path: str | Path, begin: str, end: str, table: str) -> None:
    """Put a table between the two markers of a page. Raises as `around`."""
    before, after = around(path, begin, end)
    Path(path).write_text(f"{before}{begin}\n\n{table}\n\n{end}{after}")
