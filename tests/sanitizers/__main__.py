"""`python -m tests.sanitizers`: run the operators' tests with each sanitizer, and show what it reports."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.helpers import ROOT
from tests.helpers.scratch import PASSED, Scratch

from . import SANITIZERS, TESTS, run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make sanitize ARGS=...", description=__doc__)
    parser.add_argument(
        "names", nargs="*", default=["address", "undefined"], help=f"of {', '.join(SANITIZERS)}"
    )
    names = parser.parse_args(arguments).names
    if unknown := set(names) - set(SANITIZERS):
        parser.error(f"expected names of {', '.join(SANITIZERS)}, got {', '.join(sorted(unknown))}.")
    clean = True
    for name in names:
        with tempfile.TemporaryDirectory(prefix="sanitize-") as folder:
            print(f"{name}: compiling, then the operators' tests", flush=True)
            done, reports = run(Scratch(ROOT, Path(folder, "copy")), SANITIZERS[name], *TESTS)
        print(done.tail if done.status != PASSED else done.tail.rstrip().splitlines()[-1])
        for line in (*done.failed, *reports):
            print(line)
        print(f"{name}: {len(reports)} reports in {done.seconds:.0f} s", flush=True)
        clean &= done.status == PASSED and not reports
    return int(not clean)


if __name__ == "__main__":
    sys.exit(main())
