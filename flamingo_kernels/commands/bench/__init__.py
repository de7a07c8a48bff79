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
from collections.abc import Sequence
from difflib import get_close_matches
from functools import reduce
from typing import TYPE_CHECKING

from flamingo.command_line import expect_writable, time_span

if TYPE_CHECKING:
    from .rows import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op",
        action="append",
        metavar="NAME",
        help=f"only this operator or layer, or those with this in their name (repeatable): {_operators()}",
    )
    parser.add_argument(
        "--against", action="append", metavar="NAME", help=f"only this rival (repeatable): {_rivals()}"
    )
    parser.add_argument("--device", default="cpu", help='where to run, as in "cuda:0" (default: cpu)')
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it works, not how fast")
    parser.add_argument(
        "--seconds", type=time_span, help="how long to time one case (default: 2; 0.1 if quick)"
    )
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


def _operators() -> str:
    from .shapes import CASES_OF

    return "; ".join(dict.fromkeys(case.op for cases in CASES_OF.values() for case in cases))


def _rivals() -> str:
    from .report import RIVALS

    return ", ".join(RIVALS)


def main(options: argparse.Namespace) -> int:
    """The command `bench`: 1 if a result of ours was wrong, else 0.

    Raises:
        ImportError, OSError, ValueError: before the work, for what it cannot do or write.
        KeyboardInterrupt: by Ctrl-C, after what was timed until then is shown and written.
    """
    from ..measure.figure import expect_picture
    from ..readme import around
    from .baselines import OURS
    from .report import BEGIN, END
    from .run import Stopped

    if options.picture:
        expect_picture(options.picture)
    if options.readme:
        around(options.readme, BEGIN, END)
    expect_writable(options.json, options.csv)
    try:
        outcome = _load_or_run(options)
    except Stopped as stopped:
        _show(stopped.found, options)
        raise
    _show(outcome, options)
    return int(any(each.refused and each.contender == OURS for each in outcome.skipped))


def _show(outcome: Run, options: argparse.Namespace) -> None:
    """Writes what is asked for, then prints, as nobody may read that any more."""
    from .report import picture, table, update_readme

    if options.json:
        outcome.save_json(options.json)
    if options.csv:
        outcome.save_csv(options.csv)
    if options.readme and outcome.rows:
        update_readme(outcome, options.readme)
    if options.picture and outcome.rows:
        picture(outcome, options.picture)
    print(table(outcome))


def _load_or_run(options: argparse.Namespace) -> Run:
    import torch

    from ..info import expect_device, tell_of_no_kernels
    from ..measure.progress import ProgressBar
    from .floors import ceilings
    from .report import RIVALS
    from .rows import Run
    from .run import run
    from .shapes import CASES_OF, QUICK

    if options.load:
        return reduce(Run.updated, map(Run.load, options.load))
    expect_device(options.device)
    device = torch.device(options.device)
    every = QUICK if options.quick else CASES_OF[device.type]
    ops = _chosen(options.op or [], [case.op for case in every])
    against = options.against or []
    for name in against:
        if name not in RIVALS:
            raise ValueError(f"--against {name} is not one of {', '.join(RIVALS)}.")
    cases = [case for case in every if not ops or case.op in ops]
    seconds = options.seconds if options.seconds is not None else 0.1 if options.quick else 2.0
    reached = None
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        reached = ceilings(options.device)
    tell_of_no_kernels("bench")
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


def _chosen(names: Sequence[str], known: Sequence[str]) -> set[str]:
    """The operators and layers of these names, or all that have one of them in theirs.

    Raises:
        ValueError: for a name that nothing has; it lists the nearest.
    """
    known = list(dict.fromkeys(known))
    chosen: set[str] = set()
    for name in names:
        found = [each for each in known if each == name] or [
            each for each in known if name.lower() in each.lower()
        ]
        if not found:
            near = get_close_matches(name, known, cutoff=0.4)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"--op {name} is not one of {', '.join(known)}.{hint}")
        chosen.update(found)
    return chosen
