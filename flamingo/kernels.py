"""The kernels of `flamingo_kernels`, for commands that use them where they are installed.

No other file of this package names them.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def find_patch() -> Callable[[Any], Any] | None:
    """`flamingo_kernels.patch`; None, and a line that says why, where it cannot be imported."""
    try:
        return import_module("flamingo_kernels").patch
    except ImportError as error:
        print(f"without kernels: {error}")
        return None
