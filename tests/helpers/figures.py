"""What stands in a picture, read from the figure that is saved."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest


def texts_of(draw: Callable[[], object]) -> str:
    """All texts of the figure that a call saves, a line each; nothing is written."""
    figure_module = pytest.importorskip("matplotlib.figure")
    text = pytest.importorskip("matplotlib.text").Text
    with mock.patch.object(figure_module.Figure, "savefig", autospec=True) as savefig:
        draw()
    figure = savefig.call_args.args[0]
    return "\n".join(each.get_text() for each in figure.findobj(text))
