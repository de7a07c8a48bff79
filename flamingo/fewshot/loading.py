"""A model and a device by their names, refused before anything is built where they cannot be had."""

import inspect
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

Loader = Callable[[], tuple[nn.Module, Any]]


def find_model(name: str) -> Loader:
    """What makes the model that a command was given by name.

    Args:
        name: a file of training, as "run.toml", or a function without arguments that returns a model and its
            processor, as "package.module:function".

    Returns:
        What loads it: then it raises a ValueError if it is no such pair.

    Raises:
        FileNotFoundError, ImportError, ValueError: if there is no such file, module or function, or it wants
            arguments.
    """
    if name.endswith(".toml"):
        Path(name).open("rb").close()  # whether it can be read

        def load() -> tuple[nn.Module, Any]:
            from flamingo.training import load_run

            return load_run(name)

        return load
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"expected --model run.toml or module:function, got {name!r}.")
    function = getattr(import_module(module), attribute, None)
    if not callable(function) or not _wants_nothing(function):
        raise ValueError(
            f"expected --model {name} to be a function without arguments that returns (model, processor), "
            f"got {'nothing of this name' if function is None else repr(function)[:60]}."
        )
    return lambda: _pair(function(), name)


def _wants_nothing(function: Callable) -> bool:
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        return False
    return True


def _pair(made: Any, name: str) -> tuple[nn.Module, Any]:
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise ValueError(f"expected --model {name} to return (model, processor), got {type(made).__name__}.")
    return made


def find_device(name: str) -> torch.device:
    """A device by its name; "cuda" is the own GPU of each process that torchrun starts.

    Raises:
        ValueError: if there is no such device.
    """
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.type != "meta":  # where there is nothing to compute with
            torch.empty(1, device=device)
            return device
    except Exception as error:
        raise ValueError(
            f"expected --device that is there, got {name!r}: {str(error).splitlines()[0]}"
        ) from error
    raise ValueError(f"expected --device that computes, got {name!r}.")
