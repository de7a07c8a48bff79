"""A function of the user's, by what names it on the command line: `FILE.py:NAME` or `module:NAME`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

FORMS = "FILE.py:NAME or module:NAME"


def user_function(name: str, forms: str = FORMS) -> Callable[..., Any]:
    """Runs a file, or imports a module, and takes what has this name there.

    It may import what lies beside its file, or a module in the working directory, as under `python FILE.py`.

    Args:
        name: as "mine.py:build", "folder/mine.py:build" or "package.module:Class.method".
        forms: what an error says that is expected.

    Returns:
        The function, or whatever else can be called: it is not called here. What it is given, and what it has
        to return, says the option that names it.

    Raises:
        ValueError: `name` is none of both, there is no such file or nothing of this name in it that can be
            called, or its code fails.
        ImportError: there is no such module, or it needs one that is not there.
        OSError, SyntaxError: of the file.
    """
    where, _, path = name.rpartition(":")
    if not (where and path):
        raise ValueError(f"expected {forms}, got {name!r}, which is none of them.")
    found: Any = _module(where)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        got = "found none" if found is None else f"got {type(found).__name__}"
        raise ValueError(f"expected a function {path} in {where}, {got}.")
    return found


def _module(where: str) -> Any:
    file = Path(where)
    if file.suffix == ".py" and not file.is_file():
        raise ValueError(f"expected a file of Python, found none at {where}.")
    if where.startswith("."):
        raise ValueError(f"expected the whole name of a module, got {where!r}.")
    folder = str(file.parent.resolve())  # of a module: the working directory
    if folder not in sys.path:
        sys.path.append(folder)  # at the end, where it hides nothing
    with users_code(where):
        return _run(file.resolve(), file.stat().st_mtime_ns) if file.suffix == ".py" else import_module(where)


@contextmanager
def users_code(where: str) -> Iterator[None]:
    """What fails in code of the user's is a ValueError of one line.

    Raises:
        ValueError: for whatever it raises, sys.exit included; but not for these:
        ImportError, OSError, SyntaxError: which say enough, and KeyboardInterrupt.
    """
    try:
        yield
    except (ImportError, OSError, SyntaxError):
        raise
    except (Exception, SystemExit) as error:
        lines = f"{type(error).__name__}: {error}".splitlines()
        raise ValueError(f"expected code that can be run in {where}, got {lines[0]}.") from error


@cache
def _run(file: Path, _changed: int) -> Any:
    """The module of a file, which runs once however often it is asked for."""
    spec: Any = spec_from_file_location(file.stem, file)
    module = module_from_spec(spec)
    is_new = sys.modules.setdefault(file.stem, module) is module  # where dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if is_new:
            del sys.modules[file.stem]
        raise
    return module
