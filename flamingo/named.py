"""A model by what names it on the command line.

::

    run/                  the folder of a run of `python -m flamingo train`, or its TOML file
    model.safetensors     what `save_model` wrote, as `python -m flamingo demo` does
    checkpoint.pt         weights of OpenFlamingo, with --preset, --vision and --language
    module:function       a function without arguments that returns (model, processor), and so
    file.py:function
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from flamingo.processor import Processor
from flamingo.saved import load_model
from flamingo.user_function import user_function, users_code

FORMS = "RUN|MODEL.safetensors|CHECKPOINT.pt|MODULE:FUNCTION|FILE.py:FUNCTION"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a checkpoint, which does not say what it was trained with."""
    of_checkpoint = parser.add_argument_group("with weights of OpenFlamingo")
    of_checkpoint.add_argument("--preset", metavar="NAME", help='of its sizes, as "openflamingo-3b"')
    of_checkpoint.add_argument("--vision", metavar="FOLDER", help="of its CLIP, as transformers keeps it")
    of_checkpoint.add_argument("--language", metavar="FOLDER", help="of its language model and tokenizer")


def find(
    name: str, options: argparse.Namespace, say: Callable[[str], object]
) -> Callable[[], tuple[Any, Processor]]:
    """Looks at what a model is named by, and loads nothing.

    Args:
        name: one of `FORMS`.
        options: of the command.
        say: is told, in a line, what is remarkable about the model.

    Returns:
        What loads the model, in eval mode, and its processor. It raises ValueError or OSError, in a line,
        for what cannot be read.

    Raises:
        ValueError: if it is no such thing, in a line.
        ImportError: if its module, or a library it needs, is not there.
    """
    path = Path(name)
    if _is_checkpoint(path, options):
        towers, config = import_module("flamingo.training.towers"), _towers(path, options)
        towers.check(config)
        load = partial(towers.build, config, say)
    elif path.is_dir() or path.suffix == ".toml":
        load = import_module("flamingo.training.command").find_run(path, say)
    elif path.suffix == ".safetensors":
        if not path.is_file():
            raise ValueError(f"expected a saved model, found none at {path}.")
        import_module("safetensors")
        load = partial(load_model, path)
    else:
        load = partial(_called, _function(name), name)
    return partial(_in_eval_mode, load)


def _in_eval_mode(load: Callable[[], tuple[Any, Processor]]) -> tuple[Any, Processor]:
    model, processor = load()
    return model.eval(), processor


def _is_checkpoint(path: Path, options: argparse.Namespace) -> bool:
    given = [key for key in ("preset", "vision", "language") if getattr(options, key) is not None]
    if path.suffix == ".pt" or (given and path.suffix == ".safetensors"):
        missing = [f"--{key}" for key in ("preset", "vision", "language") if key not in given]
        if missing:
            raise ValueError(
                f"expected {', '.join(missing)} beside {path}, as weights of OpenFlamingo do not say what "
                "they were trained with, got none."
            )
        return True
    if given:
        raise ValueError(f"expected weights of OpenFlamingo with --{given[0]}, got {path}.")
    return False


def _towers(path: Path, options: argparse.Namespace) -> Any:
    config = import_module("flamingo.training.config")
    return config.ModelConfig(
        preset=options.preset, vision=options.vision, language=options.language, checkpoint=str(path)
    )


def _function(name: str) -> Any:
    found = user_function(name, FORMS)
    needed = [
        each.name
        for each in inspect.signature(found).parameters.values()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if needed:
        raise ValueError(
            f"expected {name} to be a function without arguments, got one that needs {', '.join(needed)}."
        )
    return found


def _called(function: Callable[[], Any], name: str) -> tuple[Any, Processor]:
    with users_code(name):
        pair = function()
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Processor)):
        kinds = [type(each).__name__ for each in pair] if isinstance(pair, tuple) else type(pair).__name__
        raise ValueError(f"expected {name} to return (model, Processor), got {kinds}.")
    return pair
