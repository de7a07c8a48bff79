"""Pages with places for tables, each between two comments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_MARKER = re.compile(r"<!-- ([\w-]+): (begin|end) -->")


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "benchmarks" / "README.md"]


def names_on(page: Path, text: str) -> list[str]:
    """The tables that a page has a place for, in order.

    Raises:
        ValueError: a place has a beginning without an end, or the reverse, or a name is there twice.
    """
    found = _MARKER.findall(text)
    names = [name for name, _ in found[::2]]
    pairs = [(name, side) for name in names for side in ("begin", "end")]
    if found != pairs or len({*names}) != len(names):
        raise ValueError(f"{page}: expected each table's begin and then its end, once, got {found}.")
    return names


def replaced(page: Path, text: str, tables: Mapping[str, str]) -> str:
    """A page's text with other tables in their places.

    Raises:
        ValueError: as `names_on`, or a table has no place there.
    """
    if missing := {*tables} - {*names_on(page, text)}:
        raise ValueError(f"{page}: expected a place for {', '.join(sorted(missing))}, got none.")
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    return text
