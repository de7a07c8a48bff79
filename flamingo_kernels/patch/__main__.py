"""`python -m flamingo_kernels.patch`: the hashes of installed classes, for `known.py`."""

from __future__ import annotations

import argparse
import sys

from .known import KNOWN, installed, load
from .source import Unreadable, code_hash, code_read


def main(arguments: list[str] | None = None) -> int:
    """Print the hash of every known class that is installed, or the entry of the classes asked for."""
    parser = argparse.ArgumentParser(prog="python -m flamingo_kernels.patch", description=__doc__)
    parser.add_argument("classes", nargs="*", metavar="MODULE.CLASS", help="print its entry for known.py")
    parser.add_argument("--version", default="?", help='the text of the entry, as in "mmpretrain 1.2.0"')
    parser.add_argument(
        "--like", metavar="MODULE", default="", help="the module that its module is a copy of"
    )
    parser.add_argument("--show", action="store_true", help="print all that was read for the hash too")
    options = parser.parse_args(arguments)
    if not options.classes:
        for name, code in installed():
            print(f"{code}  {name}  {KNOWN[name].get(code, 'unknown')}")
        return 0
    for name in options.classes:
        try:
            cls = load(name)
            code = code_hash(cls, origin=options.like)
        except (ImportError, AttributeError, TypeError, Unreadable) as error:
            print(f"patch: expected a class of modules with its source, got {name}: {error}", file=sys.stderr)
            return 2
        if options.show:
            print(*code_read(cls), sep="\n\n", end="\n\n")
        print(f'"{name}": {{\n    "{code}": "{_version(name, code, options.version)}",\n}},')
    return 0


def _version(name: str, code: str, default: str) -> str:
    """The version that is known to have this code, whatever its class is called there."""
    known = (versions[code] for versions in KNOWN.values() if code in versions)
    return KNOWN.get(name, {}).get(code) or next(known, default)


if __name__ == "__main__":
    sys.exit(main())
