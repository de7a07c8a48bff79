"""Pictures of what was measured."""

from __future__ import annotations

from typing import Any


def new_figure(**options: Any) -> Any:
    """An empty matplotlib figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install flamingo-kernels[bench]") from error
    return Figure(**options)
