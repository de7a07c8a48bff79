"""What the command lines of both packages share: one line and an exit status for whatever goes wrong.

::

    0      all is done
    1      the work was done, and what it found is not right
    2      a mistake, told in a line
    130    Ctrl-C, told in a line
    141    nobody reads the output any more, as after `| head`
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from math import inf
from pathlib import Path
from typing import Any, NoReturn

from flamingo import starting

# Which extra of this library brings a package that may be missing, by the name under which it is imported.
_EXTRAS = {
    "PIL": "media",
    "av": "media",
    "matplotlib": "bench",
    "safetensors": "training",
    "skimage": "demo",
    "sklearn": "demo",
    "tensorboard": "training",
    "tomli": "training",
    "tqdm": "training",
    "transformers": "transformers",
}


MOST_THREADS = 1024  # of torch: OpenMP ends the process where it cannot start as many
_LONGEST = 1200  # characters of a line; a path may have some hundreds


class Parser(argparse.ArgumentParser):
    """A parser, and parsers of commands below it, that tell a wrong argument in a line."""

    intermixed = False  # whether options may stand between positional arguments

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register("type", None, _some_text)  # of arguments that name no type

    def add_subparsers(self, **kwargs: Any) -> Any:
        commands = super().add_subparsers(**kwargs)
        commands.type = str  # a command's arguments are its own to read
        return commands

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not self.intermixed:
            return super().parse_known_args(args, namespace)
        self.intermixed = False  # what follows calls this method again
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = True

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {_shortened(message)}. See {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _some_text(text: str) -> str:
    """An argument's type: `--json "$FILE"` with a variable that is not set would be taken for no option."""
    if not text:
        raise argparse.ArgumentTypeError("expected a text, got an empty one")
    return text


def parser_of(module: str, description: str) -> Parser:
    """The parser of a package's commands: `python -m module`, or its script of the same name with hyphens."""
    script = module.replace("_", "-")
    prog = script if Path(sys.argv[0]).name == script else f"python -m {module}"
    parser = Parser(prog=prog, description=description)
    parser.add_argument("--version", action="version", version=f"{script} {_version()}")
    return parser


def _version() -> str:
    try:
        return metadata.version("flamingo-kernels")
    except metadata.PackageNotFoundError:
        return "that is not installed"


def count_from(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """An argument's type: an integer of so much at least, and at most."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        if number > most:
            raise argparse.ArgumentTypeError(f"expected a whole number of at most {most}, got {text!r}")
        return number

    return read


def time_span(text: str) -> float:
    """An argument's type: a time, which may be 0 and ends."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < inf:
        raise argparse.ArgumentTypeError(f"expected seconds of 0 or more, got {text!r}")
    return number


def expect_apart(*files: str | Path | None) -> None:
    """Raises ValueError if two of the files that are given are one: it would be written over."""
    given = [Path(file) for file in files if file is not None]
    if len({os.path.realpath(file) for file in given}) < len(given):
        raise ValueError(f"expected a file for each of what is written, got {', '.join(map(str, given))}.")


def expect_writable(*files: str | Path | None) -> None:
    """Opens the files that are given as if to write; what is in them stays, and none is left behind.

    Raises:
        OSError: for one that cannot be written.
        ValueError: if two are one, or one is a device or a pipe: a file takes its name once it is whole.
    """
    expect_apart(*files)
    for given in (file for file in files if file is not None):
        file = Path(os.path.realpath(given) if os.path.islink(given) else given)
        existed = file.exists()
        if existed and not (file.is_file() or file.is_dir()):
            raise ValueError(f"expected {given} to be a file, got a device or a pipe.")
        file.open("ab").close()
        if not existed:
            file.unlink()


def run_command(name: str, command: Callable[[], int], *, extra: str | None = None) -> int:
    """Runs a command, and tells in a line on stderr what ended it.

    Args:
        name: of the command, for the line.
        command: what returns its exit status.
        extra: which of this library's extras brings all that the command imports.

    Returns:
        The exit status.
    """
    starting.done()
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 141
    except KeyboardInterrupt as interrupt:
        line, status = str(interrupt) or "stopped by Ctrl-C", 130
    except FloatingPointError as error:
        line, status = str(error), 1
    except ImportError as error:
        line, status = _missing(error, extra), 2
    except (OSError, ValueError, SyntaxError) as error:  # that of a file which the user names
        line, status = _told(error), 2
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        line, status = f"expected more memory: {str(error) or 'there is no more'}", 2
    line = " ".join(line.split()).removeprefix(f"{name}: ")
    with suppress(OSError):  # nobody reads what goes wrong either
        print(f"{name}: {_shortened(line)}", file=sys.stderr)
    return status


def _lacks_memory(error: Exception) -> bool:
    """Whether there is too little of it; torch says so of a processor's by the text alone."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|allocate memory", str(error)))


def _shortened(line: str) -> str:
    """A line of a length that can be read: a file may have a number of thousands of digits."""
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 300]} ... {line[-300:]}"


def _missing(error: ImportError, extra: str | None) -> str:
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in _EXTRAS:
        return str(error)
    return f"{package} is missing. {remedy(extra or _EXTRAS[package])}"


def remedy(extra: str) -> str:
    """How what is missing is installed."""
    return f'In a checkout of this library, run: pip install ".[{extra}]".'


def _told(error: Exception) -> str:
    """An error's text; that of the operating system without its number, behind the file that it is about."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__
