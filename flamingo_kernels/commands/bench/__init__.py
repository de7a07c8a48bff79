"""Times operators and layers against their rivals, after checking that they compute the same.

shapes     what is timed and what must be reached, as data
baselines  the contenders' calls
run        check, then time
floors     the bytes a call must move, and how fast the device moves bytes
rows       what is kept of a run
report     tables and the picture
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .rows import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", action="append", metavar="NAME", help="only this operator or layer (repeatable)"
    )
    parser.add_argument("--against", action="append", metavar="NAME", help="only this rival (repeatable)")
    parser.add_argument("--device", default="cpu", help='where to run, as in "cuda:0" (default: cpu)')
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it works, not how fast")
    parser.add_argument("--seconds", type=float, help="how long to time one case (default: 2; 0.1 if quick)")
    parser.add_argument(
        "--load",
        metavar="FILE",
        action="append",
        help="show an earlier --json FILE instead of running (repeatable: the later replaces a case)",
    )
    parser.add_argument("--json", metavar="FILE", help="write every row with its conditions")
    parser.add_argument("--csv", metavar="FILE", help="write the rows for a spreadsheet")
    parser.add_argument("--picture", metavar="FILE", help="draw the speed-ups (.png, .svg, .pdf)")
    parser.add_argument(
        "--readme", metavar="FILE", help="replace the table between this file's bench markers"
    )


def main(options: argparse.Namespace) -> int:
    """The command `bench`: 1 if a result of ours was wrong, 2 if it cannot do what was asked, else 0."""
    from ..measure.figure import new_figure
    from ..readme import around
    from .baselines import OURS
    from .report import BEGIN, END, picture, table, update_readme

    try:
        # What would fail at the end fails before the work.
        if options.picture:
            new_figure()
        if options.readme:
            around(options.readme, BEGIN, END)
        outcome = _load_or_run(options)
    except (ImportError, OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(table(outcome))
    if options.json:
        outcome.save_json(options.json)
    if options.csv:
        outcome.save_csv(options.csv)
    if options.readme:
        update_readme(outcome, options.readme)
    if options.picture:
        picture(outcome, options.picture)
    return int(any(each.refused and each.contender == OURS for each in outcome.skipped))


def _load_or_run(options: argparse.Namespace) -> Run:
    import torch

    from ..info import why_not_on
    from ..measure.progress import ProgressBar
    from .floors import ceilings
    from .report import RIVALS
    from .rows import Run
    from .run import run
    from .shapes import CASES_OF, QUICK

    if options.load:
        return reduce(Run.updated, map(Run.load, options.load))
    if why := why_not_on(options.device):
        raise ValueError(f"{why}.")
    device = torch.device(options.device)
    every = QUICK if options.quick else CASES_OF[device.type]
    ops, against = options.op or [], options.against or []
    _expect_known("--op", ops, [case.op for case in every])
    _expect_known("--against", against, RIVALS)
    cases = [case for case in every if not ops or case.op in ops]
    seconds = options.seconds if options.seconds is not None else 0.1 if options.quick else 2.0
    reached = None
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        reached = ceilings(options.device)
    progress = ProgressBar(len(cases))
    try:
        return run(
            cases,
            against=against,
            seconds=seconds,
            progress=progress,
            device=options.device,
            ceilings=reached,
        )
    finally:
        progress.close()


def _expect_known(option: str, names: list[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {name} is not one of {', '.join(dict.fromkeys(known))}.")
