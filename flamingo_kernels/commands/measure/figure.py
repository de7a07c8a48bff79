"""Pictures of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flamingo.command_line import expect_writable, remedy


def new_figure(**options: Any) -> Any:
    """An empty matplotlib figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"a picture needs matplotlib. {remedy('bench')}") from error
    return Figure(**options)


def expect_picture(path: str | Path) -> None:
    """Looks, before the work, at what would fail after it.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the name does not end as a picture's.
        OSError: it cannot be written there.
    """
    formats = new_figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise ValueError(f"expected a picture named .{', .'.join(formats)}, got {path}.")
    expect_writable(path)
