"""What a notebook shows of an object: tables and bars, with styles inline, as notebooks take others away.

No colour of text is set, and lines and bars are half transparent: that is readable on black and on white.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

MOST_ROWS = 60  # of a table

_CELL = "padding:1px 8px;text-align:{}"
_LINE = "border-top:1px solid rgba(128,128,128,.4)"


class Raw(str):
    """A cell that is HTML already."""

    __slots__ = ()


def page(*parts: str) -> str:
    """Paragraphs and tables, one below the other."""
    return f'<div style="font-size:90%">{"".join(parts)}</div>'


def paragraph(text: str) -> str:
    """Lines of text."""
    return f'<div style="margin:4px 0">{escape(text).replace(chr(10), "<br>")}</div>' if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column reads from the left, and up to `MOST_ROWS` rows of it."""
    rows = list(rows)
    lines = [_row("th", head), *(_row("td", row) for row in rows[:MOST_ROWS])]
    left = paragraph(f"{len(rows) - MOST_ROWS} more rows are left out.") if len(rows) > MOST_ROWS else ""
    return f'<table style="border-collapse:collapse;margin:4px 0">{"".join(lines)}</table>{left}'


def _row(tag: str, cells: Sequence[str]) -> str:
    shown = (
        f'<{tag} style="{_CELL.format("left" if at == 0 or isinstance(cell, Raw) else "right")}">'
        f"{cell if isinstance(cell, Raw) else escape(cell)}</{tag}>"
        for at, cell in enumerate(cells)
    )
    return f'<tr style="{_LINE}">{"".join(shown)}</tr>'


def bar(share: float) -> Raw:
    """A bar over a share of its cell; what is longer than 1 ends there."""
    width = 160 * min(max(share, 0.0), 1.0)
    return Raw(
        f'<span style="display:inline-block;height:10px;width:{width:.0f}px;'
        'background:rgba(70,130,200,.8)"></span>'
    )


def drawing(lines: Iterable[str]) -> str:
    """Lines of characters that stand below each other."""
    style = "margin:4px 0;line-height:1.15;background:none;color:inherit;overflow-x:auto"
    return f'<pre style="{style}">{escape(chr(10).join(lines))}</pre>'
