"""The command: see the package."""

from __future__ import annotations

import argparse
import sys

from . import __doc__ as about
from .contents import PICTURE, TABLES, drawn
from .pages import ROOT, names_on, pages, replaced


def main(arguments: list[str] | None = None) -> int:
    """Write every table and the picture, or name those that differ: 1 if there are any."""
    parser = argparse.ArgumentParser("python -m benchmarks.tables", description=str(about).split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and name what is out of date")
    options = parser.parse_args(arguments)
    stale = outdated()
    for path, text in stale.items():
        print(path.relative_to(ROOT))
        if not options.check:
            path.write_text(text)
    return int(options.check and bool(stale))


def outdated() -> dict:
    """The files that differ from what the records say, each with the text that it should have."""
    texts = {page: page.read_text() for page in pages()}
    wanted = {
        page: replaced(page, text, {name: TABLES[name]() for name in names_on(page, text)})
        for page, text in texts.items()
    }
    wanted[PICTURE] = drawn()
    texts[PICTURE] = PICTURE.read_text() if PICTURE.exists() else ""
    return {path: text for path, text in wanted.items() if text != texts[path]}


if __name__ == "__main__":
    sys.exit(main())
