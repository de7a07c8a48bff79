"""The kernels of `flamingo_kernels`, for the commands, which use them wherever they are installed.

No other file of this package names them.
"""

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module

from torch import nn


def check_kernels(wanted: bool) -> None:
    """Raises ValueError for an environment variable of theirs without a meaning, before there is a model."""
    if wanted:
        with suppress(ImportError):  # `use_kernels` says so
            import_module("flamingo_kernels")


def use_kernels(model: nn.Module, wanted: bool, say: Callable[[str], object]) -> bool:
    """Swaps a model's modules and linear layers for fast ones; goes on without where they cannot be had.

    Args:
        model: is changed in place and keeps its parameters and their names. Not one that is sharded already.
        wanted: what the command was told.
        say: is given the one line that says what was swapped, or why nothing was.

    Returns:
        Whether the model computes with the kernels.

    Raises:
        ValueError: for an environment variable of theirs that has no meaning, or a damaged table of products.
    """
    if not wanted:
        say("without kernels: they are switched off")
        return False
    try:
        report = import_module("flamingo_kernels").patch(model, linears=True)
    except ImportError as error:
        say(f"without kernels: {error}")
        return False
    except NotImplementedError:  # its message lists all that is known
        say(f"without kernels: they know nothing of what is in a {type(model).__name__}")
        return False
    say(f"with kernels: {len(report.replaced)} modules and {len(report.linears)} linear layers are swapped")
    return True
